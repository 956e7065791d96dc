"""From a model directory to the finished ledger, with a small model that has learnt four crystals by heart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Structure

from jaxcrystal.config import LlamaConfig, MeshConfig, TextFormat
from jaxcrystal.crystals.prompts import generation_prompt
from jaxcrystal.crystals.tokenizer import COMPACT, load_tokenizer
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.model.saved import describe, load_model
from jaxcrystal.sample.sampling import fingerprint, sample

GOOD = (
    "5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50",
    "4.2 4.2 4.2\n60 60 60\nMg\n0.00 0.00 0.00\nO\n0.50 0.50 0.50",
)
BAD = {"parse_error:element": "5.6 5.6 5.6\n90 90 90\n0.00", "cell_error": "3.1 3.1 3.1\n30 30 90\nSi\n0.25 0.25 0.25"}
CONFIG = LlamaConfig(
    vocab_size=load_tokenizer("compact").vocab_size,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """After the plain prompt the model writes one of four texts, each about as often as the others."""
    tokenizer = load_tokenizer("compact")
    prompt = [tokenizer.bos_id, *tokenizer.encode(generation_prompt({}))]
    whole = [generation_prompt({}) + text for text in (*GOOD, *BAD.values())]  # encoded at once, as in training
    texts = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in whole]
    tokens = np.zeros((4, max(map(len, texts))), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        weights[row, len(prompt) : len(text)] = 1
    module = Llama(CONFIG)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state):
        def loss(variables):
            logits, _ = module.apply(variables, tokens, positions)
            each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
            return (each * weights[:, 1:]).sum() / weights.sum()

        updates, state = optimizer.update(jax.grad(loss)(variables), state)
        return optax.apply_updates(variables, updates), state

    variables = initialize(module, jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
    state = optimizer.init(variables)
    for _ in range(300):
        variables, state = step(variables, state)
    out = tmp_path_factory.mktemp("trained") / "model"
    describe(out, CONFIG, None, TextFormat(), COMPACT)
    with ocp.CheckpointManager((out / "checkpoints").resolve()) as manager:
        manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(variables)))
    return out


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    """An uninterrupted run of 300."""
    out = tmp_path_factory.mktemp("whole") / "s.parquet"
    sample(model_dir, 300, out, temperature=1.0, top_p=0.99, seed=1, slots=8)
    return pq.read_table(out).to_pylist()


def test_every_attempt_has_its_row(model_dir, tmp_path):
    report = sample(model_dir, 50, tmp_path / "s.parquet", temperature=1.0, top_p=0.99, seed=1, slots=16, grammar=False)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert [row["index"] for row in rows] == list(range(50))
    assert report.attempts == 50 and report.resumed == 0
    assert report.ok == sum(row["status"] == "ok" for row in rows) > 10
    assert report.counts == {status: [r["status"] for r in rows].count(status) for status in report.counts}
    assert set(BAD) <= set(report.counts)
    tokenizer = load_tokenizer("compact")
    for row in rows:
        assert (row["seed"], row["prompt"], row["conditions"]) == (1, generation_prompt({}), "{}")
        if row["text"] in GOOD:
            assert row["status"] == "ok"
            assert row["formula"] == ("ClNa", "MgO")[GOOD.index(row["text"])]
            assert Structure.from_str(row["cif"], fmt="cif").composition.reduced_formula in ("NaCl", "MgO")
        for status, text in BAD.items():
            assert row["text"] != text or (row["status"], row["cif"], row["formula"]) == (status, None, None)
        if row["status"] != "truncated":
            both, prompt = (len(tokenizer.encode(text)) for text in (row["prompt"] + row["text"], row["prompt"]))
            assert row["tokens"] == both - prompt + 1
        assert row["log_probability"] < 0 and row["grammar_log_probability"] is None


def test_a_killed_run_goes_on_as_if_nothing_had_happened(model_dir, whole, tmp_path):
    out = tmp_path / "s.parquet"
    arguments = f"{str(model_dir)!r}, 300, {str(out)!r}, temperature=1.0, top_p=0.99, seed=1, slots=8"
    command = f"from jaxcrystal.sample.sampling import sample; sample({arguments})"
    journal = tmp_path / "s.parquet.journal"
    # As many devices as here: with fewer, it would not find what has been compiled for the uninterrupted run.
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    for rows in (1, 60):  # killed twice
        process = subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL, env=environment)
        while not journal.exists() or journal.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    there = journal.read_bytes().count(b"\n")
    assert 60 <= there < 300
    report = sample(model_dir, 300, out, temperature=1.0, top_p=0.99, seed=1, slots=8)
    assert report.resumed == there
    assert report.attempts == 300
    assert pq.read_table(out).to_pylist() == whole


def test_a_finished_run_is_not_drawn_again(model_dir, tmp_path):
    options = {"temperature": 1.0, "top_p": 0.99, "seed": 1, "slots": 8}
    first = sample(model_dir, 20, tmp_path / "s.csv", **options)
    again = sample(model_dir, 20, tmp_path / "s.csv", **options)
    assert again.resumed == 20
    assert again.counts == first.counts
    with pytest.raises(UserError, match="seed was 1, now it is 2"):
        sample(model_dir, 20, tmp_path / "s.csv", **{**options, "seed": 2})


def test_it_ends_once_so_many_are_ok(model_dir, tmp_path):
    options = {"temperature": 1.0, "top_p": 0.99, "seed": 1, "slots": 16, "grammar": False}
    sample(model_dir, 50, tmp_path / "all.parquet", **options)
    attempts = pq.read_table(tmp_path / "all.parquet").to_pylist()
    report = sample(model_dir, 50, tmp_path / "s.parquet", num_valid=8, **options)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert rows == attempts[: len(rows)]
    assert report.ok == sum(row["status"] == "ok" for row in rows) == 8 and rows[-1]["status"] == "ok"
    assert sample(model_dir, 50, tmp_path / "s.parquet", num_valid=8, **options).resumed == len(rows) < 50
    limit = next(i for i, row in enumerate(attempts) if row["status"] != "ok") + 1  # the last attempt is not ok
    report = sample(model_dir, limit, tmp_path / "limit.parquet", num_valid=limit, **options)
    assert (report.attempts, report.ok) == (limit, limit - 1)


def test_settings_change_what_is_drawn(model_dir, tmp_path):
    def texts(name, **options):
        sample(model_dir, 40, tmp_path / f"{name}.parquet", **{"slots": 8, "seed": 1, "grammar": False, **options})
        return pq.read_table(tmp_path / f"{name}.parquet").to_pylist()

    hot = texts("hot", temperature=3.0, top_p=1.0)
    nucleus = texts("nucleus", temperature=1.0, top_p=0.01)
    for only in ({"top_k": 1}, {"min_p": 1.0}):
        assert len({row["text"] for row in texts(str(only), temperature=1.0, top_p=1.0, **only)}) == 1
    short = texts("short", max_new_tokens=5)
    usual = texts("usual", temperature=1.0, top_p=1.0)
    distinct = [len({row["text"] for row in rows}) for rows in (nucleus, usual, hot)]
    assert distinct[0] == 1 < distinct[1] < distinct[2]
    assert {row["status"] for row in short} == {"truncated"}
    assert all(row["tokens"] == 5 for row in short)
    assert [row["text"] for row in texts("seed", temperature=1.0, top_p=1.0, seed=2)] != [row["text"] for row in usual]


def test_grammar_leaves_alone_what_is_a_crystal_without_it(model_dir, tmp_path):
    """A token drawn from all is drawn from fewer as well, if it is among them: the keys are the same."""

    def rows(grammar):
        options = {"temperature": 1.0, "top_p": 1.0, "seed": 1, "slots": 32, "grammar": grammar}
        sample(model_dir, 400, tmp_path / f"{grammar}.parquet", **options)
        return pq.read_table(tmp_path / f"{grammar}.parquet").to_pylist()

    free, kept = rows(False), rows(True)
    assert {row["status"] for row in kept} == {"ok"}
    same = [(a, b) for a, b in zip(free, kept, strict=True) if a["status"] == "ok"]
    assert 100 < len(same) < 300
    for a, b in same:
        assert a["text"] == b["text"] and a["log_probability"] == pytest.approx(b["log_probability"], abs=1e-3)
    # exp Σ log (probability of what is allowed), over draws with the grammar, has the free model's rate as its mean.
    estimates = np.exp([row["grammar_log_probability"] for row in kept])
    spread = np.sqrt((estimates.var() + 0.25) / 400)
    assert abs(estimates.mean() - len(same) / 400) < 3 * spread


def test_conditions_are_stated_in_the_prompt(model_dir, tmp_path):
    conditions = {"pretty_formula": "NaCl", "band_gap": 5.0}
    sample(model_dir, 3, tmp_path / "s.parquet", conditions=conditions, slots=3)
    (row, *_) = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert row["prompt"] == generation_prompt(conditions)
    assert json.loads(row["conditions"]) == conditions
    with pytest.raises(UserError, match="unknown condition 'colour'"):
        sample(model_dir, 3, tmp_path / "t.parquet", conditions={"colour": "red"})


def test_a_refused_run_leaves_nothing_behind(model_dir, tmp_path):
    for options, match in (
        ({"max_new_tokens": 250}, "the model's context holds 256: set max_new_tokens to at most"),
        ({"conditions": {"elements": ["Fe"] * 200}}, "the model's context holds 256: shorten the prompt"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"seed": -1}, "seed -1"),
        ({"slots": 0}, "slots is 0"),
        ({"num": 0}, "num is 0"),
        ({"num_valid": 0}, "num_valid is 0"),
        ({"num_valid": 999}, "num_valid is 999"),
        ({"top_k": 0}, "top-k is 0"),
        ({"min_p": 0.0}, "min-p is 0.0"),
    ):
        with pytest.raises(UserError, match=match):
            sample(model_dir, **{"num": 3, "out": tmp_path / "new" / "s.parquet", **options})
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_is_that_of_the_weights_wherever_they_lie(model_dir, tmp_path):
    tokenizer = load_tokenizer("compact")
    one = load_model(model_dir)
    assert fingerprint(one, tokenizer) == fingerprint(load_model(model_dir, make_mesh(MeshConfig(2, 4, 1))), tokenizer)
    kernel = one.params["layers"]["mlp"]["up_proj"]["kernel"]
    for change in (
        kernel.at[0, 1, 2].add(1e-7),
        kernel.at[0, 1, 2].set(kernel[0, 2, 1]).at[0, 2, 1].set(kernel[0, 1, 2]),
    ):
        params = jax.tree.map(lambda x: x, one.params)
        params["layers"]["mlp"]["up_proj"]["kernel"] = change
        changed = type(one)(**{**vars(one), "params": params})
        assert fingerprint(changed, tokenizer) != fingerprint(one, tokenizer)


def test_a_bare_host_samples_without_pymatgen_or_torch(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    command = (
        "import sys; sys.modules['pymatgen'] = sys.modules['torch'] = None\n"
        "from jaxcrystal.sample.sampling import sample\n"
        f"assert sample({str(tmp_path / 'model')!r}, 30, {str(tmp_path / 'cifs')!r}, slots=8).ok"
    )
    subprocess.run([sys.executable, "-c", command], check=True, stderr=subprocess.DEVNULL)
    assert list((tmp_path / "cifs").glob("*.cif"))
