"""The main job typed and the main job called: the same files, the same numbers."""

import json

import pandas as pd
import pytest
import yaml

import jaxcrystal
from jaxcrystal.interface.evaluation import Evaluation
from jaxcrystal.sampling.sampling import sample

TINY = {
    "model": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
    },
    "data": {"tokens_per_row": 256, "rows_per_batch": 2},
    "mesh": {"fsdp": 1},
    "steps": 4,
    "log_every": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def kept_here(tmp_path, monkeypatch):
    """Fingerprints of references are not left in the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def without_versions(metrics):
    """Nor names and hashes of the files."""
    return {name: value for name, value in metrics.items() if name not in ("versions", "inputs")}


@pytest.mark.slow
def test_the_main_job(typed, cdvae_csv, tmp_path):
    one, other = tmp_path / "typed", tmp_path / "called"
    train, recipe = "data/crystals.parquet", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(TINY))

    told = typed("prepare", cdvae_csv, "--out", one / "data")
    report = jaxcrystal.prepare(cdvae_csv, other / "data")
    assert told.split(" (")[0] == str(report).split(" (")[0]
    assert (one / train).exists()
    assert pd.read_parquet(one / train).to_json() == pd.read_parquet(other / train).to_json()

    keys = {"out": "run", "data.train": train, "data.validation": train}
    places = {k: {name: str(k / value) for name, value in keys.items()} for k in (one, other)}
    words = [word for name, value in places[one].items() for word in ("--set", f"{name}={value}")]
    told = typed("train", recipe, *words)
    run = jaxcrystal.train(TINY, places[other])
    losses = [
        [json.loads(line).get("losses") for line in (k / "run" / "metrics.jsonl").read_text().splitlines()]
        for k in (one, other)
    ]
    assert losses[0] == losses[1] and sum(map(len, filter(None, losses[0]))) == run.steps == 4
    assert f"4 steps, loss {run.loss:.4f}, " in told

    typed("sample", "--model", one / "run", "--num", 12, "--out", one / "samples.parquet")
    sample(other / "run", 12, other / "samples.parquet")
    texts = [pd.read_parquet(k / "samples.parquet")["text"].tolist() for k in (one, other)]
    assert texts[0] == texts[1]

    options = ["--train", one / train, "--reference", one / train, "--workers", "1"]
    told = typed("evaluate", one / "samples.parquet", "--out", one / "report", *options)
    known = jaxcrystal.read(other / train)
    found = jaxcrystal.evaluate(other / "samples.parquet", other / "report", train=known, reference=known)
    of_typed = Evaluation.read(one / "report")
    assert without_versions(of_typed.metrics) == without_versions(found.metrics)
    pd.testing.assert_frame_equal(of_typed.table, found.table)
    assert told.startswith(str(found)) and found.metrics["counts"]["attempts"] == 12
    names = ("training.parquet", "reference.parquet")
    for name in names:
        pd.testing.assert_frame_equal(pd.read_parquet(one / "report" / name), pd.read_parquet(other / "report" / name))
    page = (one / "report" / "report.html").read_bytes()
    typed("report", one / "report")
    assert (one / "report" / "report.html").read_bytes() == page


@pytest.mark.slow
def test_the_demo(typed, monkeypatch, tmp_path):
    """With a twentieth of its attempts; relaxed and placed by CHGNet all the same."""
    monkeypatch.setattr("jaxcrystal.demo.NEW", 3)
    monkeypatch.setattr("jaxcrystal.demo.WISHED", 2)
    told = typed("demo", "--out", tmp_path / "demo")
    for part, attempts in (("new", 3), ("SrTiO3", 2)):
        found = Evaluation.read(tmp_path / "demo" / part)
        assert found.metrics["counts"]["attempts"] == attempts and str(found) in told
        assert {"stability", "novelty"} < found.metrics.keys() and found.report.exists()
    assert str(tmp_path / "demo/new/report.html") in told and told.count("space group") == 5
    assert (tmp_path / "demo/best.svg").read_text().startswith("<svg ")
