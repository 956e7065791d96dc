"""tpu_pod.sh and the command of gke_jobset.yaml to their ends, with stand-ins for gcloud and the TPU image."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

GCLOUD = """#!/bin/bash
if [ "$1 $2 $3" = "storage rsync --recursive" ]; then
  from=${4/#gs:\\/\\/b/$BUCKET_FOLDER} to=${5/#gs:\\/\\/b/$BUCKET_FOLDER}
  [ -d "$from" ] && mkdir -p "$to" && cp -r "$from/." "$to"
  exit
fi
for host in "$HOSTS"/*; do
  case "$4" in
    ssh) (cd "$host" && HOME=$host bash -c "${!#}") || exit 1 ;;
    scp) cp "$5" "$host/" ;;
  esac
done
"""
#: Python 3.10, as some TPU images have it: too old for us, but with a pip that can install uv.
OLD = """#!/bin/bash
[ "$1 $2" = "-m pip" ] || exit 1
mkdir -p ~/.local/bin && cp "$TOOLS/uv.installed" ~/.local/bin/uv
"""
UV = """#!/bin/bash
[ "$2" != find ] || echo "$TOOLS/new"
"""
NEW = """#!/bin/bash
[ "$1 $2" = "-m venv" ] || exit 0
mkdir -p "$3/bin" && cp "$TOOLS/new" "$3/bin/python" && cp "$TOOLS/verb" "$3/bin/jaxcrystal"
"""
#: Says where it was run, with what, and which data it sees; `sample` leaves the part of its host, and fails on request.
VERB = """#!/bin/bash
echo "$(pwd -P)|$*|$(cat data/train 2>/dev/null)" >>"$RECORD"
[ "$1" = train ] || { mkdir -p samples && pwd -P >"samples/$(basename "$HOME")"; }
[[ "$*" != *fail* ]]
"""
STAND_INS = {
    "gcloud": GCLOUD, "python3": OLD, "uv.installed": UV, "new": NEW,
    "verb": VERB,
} | dict.fromkeys(["python3.11", "python3.12", "python3.13", "uv"], "#!/bin/bash\nexit 1\n")  # fmt: skip


@pytest.fixture
def pod(tmp_path):
    """Two hosts with empty homes, a bucket, and a checkout with a folder data/ of its own."""
    for name in ("tools", "hosts/0", "hosts/1", "bucket/data", "checkout/data"):
        (tmp_path / name).mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)
    (tmp_path / "tools" / "uv").unlink()
    (tmp_path / "bucket/data/train").write_text("the bucket's")
    checkout = tmp_path / "checkout"
    (checkout / "data/train").write_text("local")
    shutil.copytree(ROOT / "launch", checkout / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {
            "PATH": f"{tmp_path}/tools:/usr/bin:/bin", "TOOLS": f"{tmp_path}/tools", "TPU_NAME": "t", "ZONE": "z",
            "BUCKET": "gs://b", "BUCKET_FOLDER": str(tmp_path / "bucket"), "HOSTS": str(tmp_path / "hosts"),
            "RECORD": str(tmp_path / "record"),
        }  # fmt: skip
        command = ["bash", str(checkout / "launch/tpu_pod.sh"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_every_host_gets_a_python_and_the_buckets_data(pod, tmp_path):
    for times in (1, 2):  # again, as after a preemption
        done = pod("train", "llama2_7b_mp20", "--set", "out=gs://b/runs/a b")
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "record").read_text().splitlines()
        typed = "train llama2_7b_mp20 --set out=gs://b/runs/a b"
        assert lines == [f"{tmp_path}/hosts/{i}/jaxcrystal|{typed}|the bucket's" for i in (0, 1)] * times
    assert not (tmp_path / "bucket/samples").exists()


@pytest.mark.parametrize("formula", ["NaCl", "fail"])
def test_every_hosts_samples_come_to_the_bucket_whatever_became_of_the_run(pod, tmp_path, formula):
    shutil.rmtree(tmp_path / "bucket/data")  # sampling needs none
    done = pod("sample", "--model", "gs://b/runs/a", "--formula", formula, "--out", "samples/a.parquet")
    assert (done.returncode == 0) == (formula == "NaCl"), done.stderr
    found = {path.name: path.read_text().strip() for path in (tmp_path / "bucket/samples").iterdir()}
    hosts = ("0", "1") if formula == "NaCl" else ("0",)  # the stand-in ends with the first host that fails
    assert found == {host: f"{tmp_path}/hosts/{host}/jaxcrystal" for host in hosts}


def test_the_job_sets_command_finds_its_recipe_in_the_volume(tmp_path):
    """In a folder laid out as the volume, with the package as its image installs it: the data are what is missing."""
    pod = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())["spec"]["replicatedJobs"][0]["template"]
    (container,) = pod["spec"]["template"]["spec"]["containers"]
    program, *arguments = container["command"]
    assert program == "jaxcrystal"
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    command = [sys.executable, "-m", "jaxcrystal.cli", *arguments, "--set", "mesh.fsdp=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "models/llama2_7b" in done.stderr and "recipe" not in done.stderr, done.stderr
