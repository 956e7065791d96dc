"""Launch scripts are whole: bash and YAML read them, and what they run is a command of ours."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from jaxcrystal.cli import _parser
from jaxcrystal.config import Recipe, load

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
    (command,) = re.findall(r"(?:jaxcrystal|jaxcrystal\.cli) (train .*)$", text, re.M)
    for shell in ("$recipe $*", '"$@"'):
        command = command.replace(shell, "configs/llama2_7b_mp20.yaml --set steps=5")
    args = _parser().parse_args(command.rstrip('"').split())
    assert load(Recipe, ROOT / args.config, args.set).steps == 5


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
    load(Recipe, ROOT / args.config)
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"]
