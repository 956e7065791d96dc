"""What version a3d077c wrote (tests/written_by_a3d077c) is read, or refused in one line that says what to run."""

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxcrystal.cli import main
from jaxcrystal.crystals import dataset
from jaxcrystal.weights.saved import load_model

ARCHIVE = Path(__file__).with_name("written_by_a3d077c") / "written.tar.xz"
SAMPLE = ("sample", "--model", "run", "--num", "3", "--max-new-tokens", "120", "--num-atoms", "1-3", "--out")


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch) -> Path:
    """The archive's folder, where its relative paths are those of the day."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def typed(capsys):
    """Types a command that must succeed; returns what it prints."""

    def type_in(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return type_in


@pytest.fixture
def read_or_refused(capsys):
    """Types a command; returns whether it succeeded. One that is refused must say in one line what to run or remove."""

    def type_in(*arguments: object) -> bool:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        remedy = r"`jaxcrystal \w+|\b(again|remove|build|write|make)\b"
        refused = re.fullmatch(rf"jaxcrystal {arguments[0]}: [^\n]*({remedy})[^\n]*\n", error.split("\r")[-1])
        assert code == 0 or (code == 1 and refused), error
        return code == 0

    return type_in


def losses() -> list[float]:
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    return [loss for line in lines if line["event"] == "train" for loss in line["losses"]]


def test_a_data_set():
    crystals = dataset.load("data/crystals.parquet")
    assert crystals.ids == tuple(f"mp-{name}" for name in ("NaCl", "MgO", "LiF", "KCl", "Si", "CsCl"))
    assert crystals.crystal(1).formula == "MgO"
    np.testing.assert_allclose(crystals.crystal(1).lengths, 4.24 / np.sqrt(2), atol=1e-3)
    assert crystals.attributes(0) == {"pretty_formula": "NaCl", "elements": ["Cl", "Na"], "band_gap": 1.5}


def test_a_converted_model():
    model = load_model("model")
    assert (model.config.vocab_size, model.config.padded_vocab_size, model.step) == (448, 512, 0)
    tokens = np.arange(5)[None]
    logits, _ = model.module.apply(model.variables, tokens, tokens)
    assert np.isfinite(logits[..., :448]).all()


def test_a_run_is_done_and_goes_on(typed):
    before = losses()
    assert "4 steps, all done before" in typed("train", "recipe.yaml")
    assert typed("train", "recipe.yaml", "--set", "steps=5").startswith("5 steps, loss ")
    assert losses()[:4] == before and len(losses()) == 5
    assert load_model("run").step == 5


def test_finished_ledgers_are_done_and_unfinished_ones_refused(typed, capsys):
    """The model's fingerprint and the rows are today's; keys of draws are made otherwise."""
    for out in ("samples.parquet", "samples"):
        before = {path: path.stat().st_mtime_ns for path in Path(".").rglob(f"{out}*") if path.is_file()}
        assert typed(*SAMPLE, out).startswith(f"3 attempts in {out}: 3 ok")
        assert {path: path.stat().st_mtime_ns for path in before} == before
    journal = Path("unfinished.parquet.journal").read_bytes()
    assert main([*SAMPLE, "unfinished.parquet"]) != 0
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unfinished.parquet belongs to another run: draws was None, now it is" in said and "remove" in said
    assert Path("unfinished.parquet.journal").read_bytes() == journal and len(journal.splitlines()) == 2


@pytest.mark.parametrize("samples", ["samples.parquet", "samples"])
def test_samples_are_evaluated(samples, read_or_refused):
    if read_or_refused("evaluate", samples, "--out", "new", "--workers", 1):
        assert pq.read_table("new/structures.parquet").num_rows == 3


def test_evaluations_are_compared(read_or_refused):
    Path("evaluation").rename("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(".", filter="data")
    if read_or_refused("compare", "old", "evaluation", "--out", "comparison"):
        assert "Stability" in Path("comparison/comparison.md").read_text()


def test_an_evaluation_gets_a_new_page(typed):
    """It keeps no training crystals, which the page then does not draw, and no counts of its inputs."""
    before = {path: path.read_bytes() for path in Path("evaluation").iterdir() if path.is_file()}
    assert "evaluation/report.html" in typed("report", "evaluation")
    page = Path("evaluation/report.html").read_text(encoding="utf-8")
    assert "<h1>generated.csv</h1>" in page and "Metastable" in page and 'class="reference"' in page
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_hulls_relaxations_and_fingerprints_are_used_again(read_or_refused):
    """By the very commands that wrote them: nothing is lost, and with the same versions nothing is relaxed again."""
    kept = Path("labelled_hull.labels/relaxations.jsonl"), Path("evaluation/relaxations/relaxations.jsonl")
    before = [path.read_bytes() for path in kept]
    build = ("hull", "build", "data/crystals.parquet", "--potential", "chgnet", "--workers", 1, "--out")
    if read_or_refused(*build, "labelled_hull.parquet"):
        assert kept[0].read_bytes().startswith(before[0])
    data = ("--train", "data/crystals.parquet", "--reference", "data/crystals.parquet")
    judged = ("evaluate", "generated.csv", "--potential", "chgnet", "--workers", 1, *data, "--hull")
    if read_or_refused(*judged, "labelled_hull.parquet", "--out", "evaluation"):
        assert kept[1].read_bytes().startswith(before[1])
    read_or_refused(*judged, "hull.parquet", "--out", "other")
