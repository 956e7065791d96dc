#!/usr/bin/env bash
# Trains or samples on every host of a TPU pod slice. Run it where `gcloud` is logged in, from the checkout:
#   export TPU_NAME=my-v5e-256 ZONE=us-east5-b BUCKET=gs://my-bucket
#   bash launch/tpu_pod.sh train llama2_7b_mp20
#   bash launch/tpu_pod.sh sample --model runs/llama2_7b_mp20 --num 100000 --out runs/samples.parquet
# Arguments are those of `jaxcrystal`; what lies in data/, models/ and runs/ is the bucket's. A slice that is preempted
# saves first; run this again to go on.
set -euo pipefail
cd "$(dirname "$0")/.."

TPU_NAME=${TPU_NAME:?name of the TPU slice}
ZONE=${ZONE:?its zone}
BUCKET=${BUCKET:?gs:// folder with data/ and models/, which also takes runs/}

: "${1:?a verb, as in: train llama2_7b_mp20}"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker all --command "$1"
}

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
tar -czf "$packed/jaxcrystal.tar.gz" --exclude ./.git --exclude ./.venv --exclude ./runs --exclude ./data --exclude ./models .
gcloud compute tpus tpu-vm scp "$packed/jaxcrystal.tar.gz" "$TPU_NAME": --zone "$ZONE" --worker all
# All hosts write one checkpoint together, so the folder of the run must be the same for all: the bucket, mounted.
on_all_hosts "
  set -e
  mkdir -p ~/jaxcrystal ~/bucket && tar -xzf jaxcrystal.tar.gz -C ~/jaxcrystal && cd ~/jaxcrystal
  mountpoint -q ~/bucket || gcsfuse --implicit-dirs '${BUCKET#gs://}' ~/bucket
  source launch/environment.sh
  mkdir -p ~/bucket/runs
  for each in data models runs; do
    # A folder of the host's own would stand before the bucket's.
    [ -L \$each ] || [ ! -e \$each ] || fail \"~/jaxcrystal/\$each on \$HOSTNAME is no link into the bucket; remove it\"
    ln -sfn ~/bucket/\$each \$each
  done
  install_python && make_environment tpu
"
on_all_hosts "cd ~/jaxcrystal && .venv/bin/jaxcrystal $(printf '%q ' "$@")"
