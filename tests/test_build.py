"""What the built package contains: recipes and data, in a wheel made from the checkout or from an sdist."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = {path.name for path in (ROOT / "configs").glob("*.yaml")}


def build(checkout: Path, kind: str, out: Path) -> Path:
    """Calls the build backend as pip does, in the folder `checkout`, without fetching anything."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is built, for a build leaves folders behind."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("jaxcrystal", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


def test_wheel_and_sdist_ship_the_recipes_and_take_them_by_name(checkout, tmp_path):
    with tarfile.open(build(checkout, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    for source in (checkout, unpacked):
        site = tmp_path / f"site-{source.name}"
        out = tmp_path / f"wheel-{source.name}"
        out.mkdir()
        zipfile.ZipFile(build(source, "wheel", out)).extractall(site)
        assert {path.name for path in (site / "jaxcrystal" / "configs").iterdir()} == RECIPES
        assert (site / "jaxcrystal" / "texts" / "compact.model").exists()
        boxes = (ROOT / "jaxcrystal/box", site / "jaxcrystal/box")
        ours, shipped = ({str(path.relative_to(box)) for path in box.rglob("[!_]*.*")} for box in boxes)
        assert ours - {"__pycache__"} == shipped >= {"box.json", "mp20.parquet", "mini/model.safetensors"}
        code = (
            "from jaxcrystal.config import Recipe, load, recipes; "
            "print(recipes()['tiny_cpu'], load(Recipe, 'tiny_cpu').out)"
        )
        command, environment = [sys.executable, "-P", "-c", code], {"PYTHONPATH": str(site)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [str(site / "jaxcrystal/configs/tiny_cpu.yaml"), "runs/tiny_cpu"], done.stderr
