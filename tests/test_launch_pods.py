"""tpu_pod.sh and the command of gke_jobset.yaml to their ends, with stand-ins for gcloud, gcsfuse and the TPU image."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

GCLOUD = """#!/bin/bash
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
STAND_INS = {
    "gcloud": GCLOUD, "python3": OLD, "uv.installed": UV, "new": NEW,
    "gcsfuse": '#!/bin/bash\nrmdir "$3" && ln -s "$BUCKET_FOLDER" "$3"\n', "mountpoint": '#!/bin/bash\ntest -L "$2"\n',
    "verb": '#!/bin/bash\necho "$(pwd -P)|$*|$(cat models/base)" >>"$RECORD"\n',
} | dict.fromkeys(["python3.11", "python3.12", "python3.13", "uv"], "#!/bin/bash\nexit 1\n")  # fmt: skip


@pytest.fixture
def pod(tmp_path):
    """Two hosts with empty homes, a bucket, and a checkout with a folder models/ of its own."""
    for name in ("tools", "hosts/0", "hosts/1", "bucket/models", "bucket/data", "checkout/models"):
        (tmp_path / name).mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tmp_path / "tools" / name).write_text(text)
        (tmp_path / "tools" / name).chmod(0o755)
    (tmp_path / "tools" / "uv").unlink()
    (tmp_path / "bucket/models/base").write_text("the bucket's")
    checkout = tmp_path / "checkout"
    (checkout / "models/base").write_text("local")
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


def test_every_host_gets_a_python_and_reads_the_buckets_models(pod, tmp_path):
    for times in (1, 2):  # again, as after a preemption
        done = pod("train", "llama2_7b_mp20", "--set", "out=runs/a b")
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / "record").read_text().splitlines()
        seen = [f"{tmp_path}/hosts/{i}/jaxcrystal|train llama2_7b_mp20 --set out=runs/a b|the bucket's" for i in (0, 1)]
        assert lines == seen * times


def test_a_folder_that_would_shadow_the_buckets_is_refused(pod, tmp_path):
    (tmp_path / "hosts/1/jaxcrystal/models").mkdir(parents=True)
    done = pod("train", "llama2_7b_mp20")
    assert done.returncode == 1 and not (tmp_path / "record").exists()
    assert "~/jaxcrystal/models on" in done.stderr and "is no link into the bucket; remove it" in done.stderr


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
