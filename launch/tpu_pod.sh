#!/usr/bin/env bash
# Trains or samples on every host of a TPU pod slice. Run it where `gcloud` is logged in, from the checkout:
#   export TPU_NAME=my-v5e-256 ZONE=us-east5-b BUCKET=gs://my-bucket
#   bash launch/tpu_pod.sh train llama2_7b_mp20 --set base=$BUCKET/models/7b --set out=$BUCKET/runs/7b
#   bash launch/tpu_pod.sh sample --model $BUCKET/runs/7b --num 100000 --out samples/a.parquet
# Arguments are those of `jaxcrystal`. Models and runs lie in the bucket; its data/ is copied to every host before
# training, and every host's samples/ into the bucket at the end. A slice that is preempted saves first; run this again
# to go on.
set -euo pipefail
cd "$(dirname "$0")/.."

TPU_NAME=${TPU_NAME:?name of the TPU slice}
ZONE=${ZONE:?its zone}
BUCKET=${BUCKET:?gs:// folder with data/ and models/, which also takes runs/ and samples/}

: "${1:?a verb, as in: train llama2_7b_mp20}"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker all --command "$1"
}

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
tar -czf "$packed/jaxcrystal.tar.gz" --exclude ./.git --exclude ./.venv --exclude ./runs --exclude ./data \
  --exclude ./models --exclude ./samples .
gcloud compute tpus tpu-vm scp "$packed/jaxcrystal.tar.gz" "$TPU_NAME": --zone "$ZONE" --worker all
on_all_hosts "
  set -e
  mkdir -p ~/jaxcrystal/data && tar -xzf jaxcrystal.tar.gz -C ~/jaxcrystal && cd ~/jaxcrystal
  source launch/environment.sh
  [ $1 != train ] || gcloud storage rsync --recursive '$BUCKET/data' data
  install_python && make_environment tpu
"
on_all_hosts "
  cd ~/jaxcrystal && .venv/bin/jaxcrystal $(printf '%q ' "$@") || failed=1
  [ ! -d samples ] || gcloud storage rsync --recursive samples '$BUCKET/samples' || failed=1
  [ -z \"\${failed-}\" ]
"
