"""Launch scripts are whole: bash and YAML read them, and what they run is a command of ours."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxcrystal.cli import _parser
from jaxcrystal.config import Recipe, load
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.evaluation.table import read_table

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", [path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")]
)
def test_bash_reads_them(name):
    subprocess.run(["bash", "-n", ROOT / "launch" / name], check=True)


@pytest.mark.parametrize(
    ("name", "variables"),
    [("tpu_pod.sh", ["TPU_NAME", "ZONE", "BUCKET"]), ("slurm.sbatch", ["CHECKOUT", "PYTHON_MODULE", "EXTRA"])],
)
def test_three_variables_are_to_be_filled_in(name, variables):
    text = (ROOT / "launch" / name).read_text()
    assert re.findall(r"^([A-Z_]+)=\$\{", text, re.M) == variables
    examples = [line.split() for line in re.findall(r"^#   .*launch/\S+ ((?:train|sample) .*)$", text, re.M)]
    for verb, *rest in examples:
        if rest[-1] != "...":
            args = _parser().parse_args([verb, *rest])
            assert args.verb == "sample" or load(Recipe, args.config)
    assert {verb for verb, *_ in examples} == {"train", "sample"}


def test_arguments_reach_every_host_as_they_were_typed(tmp_path):
    """With a `gcloud` that notes what it was asked: the last command is run by a shell there."""
    (tmp_path / "gcloud").write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" > {tmp_path}/asked\n')
    (tmp_path / "gcloud").chmod(0o755)
    settings = {"TPU_NAME": "v5e", "ZONE": "east", "BUCKET": "gs://b", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    typed = ["sample", "--model", "runs/a b", "--num", "5", "--formula", "Mg(OH)2", "--out", "runs/s.parquet"]
    script = tmp_path / "checkout/launch/tpu_pod.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "launch/tpu_pod.sh", script)
    subprocess.run(["bash", script, *typed], env=settings, check=True)
    command = (tmp_path / "asked").read_text().split("\0")[-2]
    shell = command.replace("cd ~/jaxcrystal && .venv/bin/jaxcrystal", "printf '%s\\n'")
    told = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == typed


@pytest.mark.slow
def test_a_slurm_job_evaluates(tmp_path):
    """With an `srun` that starts as many processes as Slurm has tasks: two workers relax and judge three crystals."""
    pytest.importorskip("distributed")
    (tmp_path / "srun").write_text('#!/bin/bash\nshift\nfor i in 1 2; do "$@" & done\nwait\n')
    (tmp_path / "srun").chmod(0o755)
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch/evaluate_slurm.sbatch", checkout / "launch")
    (checkout / "launch/environment.sh").write_text(f"make_environment() {{ PYTHON={sys.executable}; }}\n")
    known = [entry.crystal for entry in embedded()[:3]]
    (checkout / "cifs").mkdir()
    for i, crystal in enumerate(known):
        (checkout / f"cifs/{i}.cif").write_text(crystal.to_cif())
    job = {"SLURM_SUBMIT_DIR": str(checkout), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "PYTHONPATH": str(ROOT)}
    script = [checkout / "launch/evaluate_slurm.sbatch", "cifs", "--out", "out", "--potential", "chgnet"]
    done = subprocess.run(
        ["bash", *script, "--max-steps", "2"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table, _ = read_table(checkout / "out/structures.parquet")
    assert list(table["outcome"]) == ["ok"] * 3 and table["energy_per_atom"].notna().all()
    assert not (checkout / "slurm-7.json").exists()


def test_a_missing_variable_is_asked_for():
    done = subprocess.run(
        ["bash", ROOT / "launch/tpu_pod.sh"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode != 0 and "TPU_NAME: name of the TPU slice" in done.stderr


def test_the_jobset_runs_a_recipe_on_as_many_chips_as_it_has():
    text = (ROOT / "launch/gke_jobset.yaml").read_text()
    assert text.count("# <- ") == 3
    (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
    job = job["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    args = _parser().parse_args(container["command"][1:])
    load(Recipe, args.config)
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"]
