"""A crystal's whole way, typed as a user types it: prepare, convert, train, sample, evaluate."""

import csv
import json
import shutil
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals import prototypes
from jaxcrystal.crystals.dataset import is_validation, load
from jaxcrystal.texts.p1 import text
from jaxcrystal.weights.checkpoint_map import to_hf
from jaxcrystal.weights.saved import load_model


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [loss for line in lines if line["event"] == "train" for loss in line["losses"]]


def fingerprints(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_llama_is_converted_fine_tuned_and_sampled(typed, llama, cdvae_csv, shared, tmp_path):
    reference, source = llama
    shutil.copy(shared / "tokenizer" / "llama2" / "tokenizer.model", source)
    assert len(list(source.glob("*.safetensors"))) > 1

    told = typed("prepare", cdvae_csv, "--out", tmp_path / "data")
    assert told.startswith("crystals: 36 rows read, 36 kept (")
    (part,) = read_json(tmp_path / "data" / "report.json")["parts"]
    assert part["kept"] == len(load(tmp_path / "data" / "crystals.parquet")) == 36
    assert set(part["missing"].values()) == {0}

    base, run, data = tmp_path / "llama", tmp_path / "run", tmp_path / "data" / "crystals.parquet"
    assert "2 layers, width 32, 32001 pieces" in typed("convert", source, "--out", base)
    before = fingerprints(base)

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "lora: {rank: 4, targets: [q_proj, v_proj, down_proj]}\nsteps: 1000\noptimizer: {learning_rate: 3e-2}\n"
    )
    settings = {
        "base": base,
        "out": run,
        "steps": 20,
        "data.train": data,
        "data.validation": data,
        "data.tokens_per_row": 512,
        "data.rows_per_batch": 2,
        "data.validation_rows": 2,
        "optimizer.warmup_steps": 2,
        "mesh.fsdp": 2,
        "log_every": 5,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert typed("train", recipe, *overrides).startswith("20 steps, loss ")
    assert len(losses(run)) == 20 and losses(run)[-1] < losses(run)[0] == pytest.approx(np.log(32000), abs=0.5)

    # The weights are still those that transformers wrote; only the adapters, whose `b` starts at zero, have moved.
    assert fingerprints(base) == before
    model = load_model(run)
    theirs = {name: weight.numpy() for name, weight in reference.state_dict().items()}
    ours = dict(to_hf(model.params, layers=2))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():  # of the vocabulary's rows, those behind 32000 are new
        np.testing.assert_array_equal(weight[: len(theirs[name])], theirs[name])
    adapters = jax.tree_util.tree_leaves_with_path(model.adapters)
    assert len(adapters) == 6 and all(np.asarray(leaf).any() for _, leaf in adapters)
    assert model.step == 20 and model.lora.rank == 4

    assert "12 tensors, " in typed(
        "export", "--model", run, "--format", "peft", "--base-name", source, "--out", tmp_path / "peft"
    )
    tuned = peft.PeftModel.from_pretrained(reference, tmp_path / "peft")
    typed("export", "--model", run, "--format", "hf", "--out", tmp_path / "merged", "--shard-size", "3MB")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    prompt = torch.tensor([[1, 13866, 338, 263, 6139]])
    with torch.no_grad():
        logits, expected = merged(prompt).logits, tuned(prompt).logits
    assert merged.config.vocab_size == 32001
    assert (logits[..., :32000] - expected).abs().max() < 1e-4 * expected.abs().max()
    typed("convert", tmp_path / "peft", "--base", base, "--out", tmp_path / "imported")
    assert fingerprints(tmp_path / "imported").keys() >= {"model.json", "tokenizer.model"}
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "imported").adapters, model.adapters)

    samples = tmp_path / "samples.parquet"
    options = ["--num", 4, "--max-new-tokens", 100, "--formula", "NaCl", "--spacegroup", 225, "--slots", 2]
    told = typed("sample", "--model", run, "--out", samples, *options)
    assert told.startswith("4 attempts in ")
    rows = pq.read_table(samples).to_pylist()
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert "The chemical formula is NaCl. The spacegroup number is 225. Generate" in row["prompt"]
        assert row["tokens"] <= 100 and row["log_probability"] < row["grammar_log_probability"] < 0
        assert (row["status"], row["formula"]) == ("ok", "ClNa")
    typed("convert", source, "--weights", "int8", "--out", tmp_path / "int8")
    coded = typed("sample", "--model", run, "--base", tmp_path / "int8", "--out", tmp_path / "int8.parquet", *options)
    assert coded.startswith("4 attempts in ")
    probabilities = [row["log_probability"] for row in pq.read_table(tmp_path / "int8.parquet").to_pylist()]
    assert not set(probabilities) & {row["log_probability"] for row in rows}
    typed("sample", "--model", base, "--out", tmp_path / "base.parquet", *options)
    untuned = pq.read_table(tmp_path / "base.parquet").to_pylist()
    assert [row["text"] for row in untuned] != [row["text"] for row in rows]

    assert typed("evaluate", samples, "--out", tmp_path / "report").startswith("4 attempts, protocol cdvae")
    counts = read_json(tmp_path / "report" / "metrics.json")["counts"]
    assert counts["attempts"] == sum(counts["outcomes"].values()) == 4
    statuses = [row["status"] for row in rows]
    assert counts["outcomes"] == {status: statuses.count(status) for status in statuses}
    assert pq.read_table(tmp_path / "report" / "structures.parquet").num_rows == 4
    assert (tmp_path / "report" / "report.html").read_text().lstrip().lower().startswith("<!doctype html>")


@pytest.mark.slow
def test_a_small_model_writes_the_two_crystals_that_it_was_shown(typed, monkeypatch, tmp_path):
    """From the embedded set (two crystals of it, so that they are soon learnt by heart) to three forms of samples."""
    salts = [e for e in prototypes.embedded() if e.prototype == "rock salt"]
    held_out = next(e for e in salts if is_validation(e.formula))
    shown = [e for e in salts if e.formula in ("NaCl", "MgO")]
    monkeypatch.setattr(prototypes, "embedded", lambda: (*shown, held_out))

    data, run = tmp_path / "data", tmp_path / "run"
    told = typed("prepare", "prototypes", "--out", data)
    assert "prototypes_train: 2 rows read, 2 kept" in told and "prototypes_validation: 1 rows read, 1 kept" in told
    train, validation = data / "prototypes_train.parquet", data / "prototypes_validation.parquet"

    recipe = tmp_path / "recipe.yaml"
    settings = {
        "out": str(run),
        "model": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 256,
        },
        "augment": {"infill": 0.0, "translate": False, "attributes": []},
        "data": {"train": str(train), "validation": str(validation), "tokens_per_row": 256, "rows_per_batch": 1},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 5, "beta2": 0.98},
        "mesh": {"fsdp": 1},
        "steps": 300,
        "log_every": 50,
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(settings))
    assert typed("train", recipe).startswith("300 steps, loss ")
    assert typed("train", recipe).startswith("300 steps, all done before; ")
    assert len(losses(run)) == 300

    rows, metrics = [], []
    for form in ("samples.parquet", "samples.csv", "cifs"):
        samples, report = tmp_path / form, tmp_path / f"report of {form}"
        told = typed("sample", "--model", run, "--num", 12, "--out", samples, "--temperature", 0.5)
        assert told.startswith(f"12 attempts in {samples}: ")
        typed("evaluate", samples, "--train", train, "--out", report)
        metrics.append(read_json(report / "metrics.json"))
        if samples.suffix == ".csv":
            with samples.open(newline="") as file:
                rows.append([(row["text"], row["status"], row["cif"] or None) for row in csv.DictReader(file)])
        else:
            table = pq.read_table(samples / "attempts.parquet" if form == "cifs" else samples).to_pylist()
            rows.append([(row["text"], row["status"], row["cif"]) for row in table])

    assert len(rows[0]) == 12 and rows[0] == rows[1] == rows[2]
    good = [i for i, (_, status, _) in enumerate(rows[0]) if status == "ok"]
    assert sorted(path.name for path in (tmp_path / "cifs").glob("*.cif")) == [f"{i:06d}.cif" for i in good]
    for found in metrics:
        found.pop("versions")  # names and hashes of the files
        for name in ("file", "sha256"):
            found["inputs"]["samples"].pop(name)
        assert found == metrics[0]
    assert metrics[0]["counts"]["attempts"] == 12 and metrics[0]["counts"]["outcomes"]["ok"] == len(good)
    # What it has learnt by heart is written as it was shown, sound, and nothing new.
    texts = {text.write(e.crystal, TextFormat()) for e in shown}
    assert {written for written, _, _ in rows[0]} == texts
    assert metrics[0]["validity"]["structural"] == 1 and metrics[0]["novelty"]["by_matching"] == 0
    assert metrics[0]["counts"]["unique"] == 2
