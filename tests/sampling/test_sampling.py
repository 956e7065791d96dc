"""From a model directory to the finished ledger, with a small model that has learnt four crystals by heart."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Structure

import jaxcrystal
from jaxcrystal.config import LlamaConfig, LoraConfig, MeshConfig, TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.model.llama import Llama, initialize
from jaxcrystal.model.quantize import quantize
from jaxcrystal.sampling import sampler
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.ledger import Ledger, Part, Request
from jaxcrystal.sampling.sampling import fingerprint, sample
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.saved import describe, load_model, record_checksum, save_weights

P1 = form_of(TextFormat())
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
    prompt = [*tokenizer.begin, *tokenizer.encode(generation_prompt(P1, {}))]
    whole = [generation_prompt(P1, {}) + text for text in (*GOOD, *BAD.values())]  # encoded at once, as in training
    texts = [[*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id] for text in whole]
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
    describe(out, CONFIG, None, TextFormat(), load_tokenizer("compact"))
    with ocp.CheckpointManager((out / "checkpoints").resolve()) as manager:
        manager.save(0, args=ocp.args.Composite(weights=ocp.args.StandardSave(variables)))
    return out


RUN = {"temperature": 1.0, "top_p": 0.99, "seed": 1, "slots": 1}


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory) -> list[dict]:
    """An uninterrupted run of 300, eight at once, on eight devices."""
    out = tmp_path_factory.mktemp("whole") / "s.parquet"
    sample(model_dir, 300, out, mesh=make_mesh(MeshConfig(8, 1, 1)), **RUN)
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
        assert (row["seed"], row["prompt"], row["conditions"]) == (1, generation_prompt(P1, {}), "{}")
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


def test_without_the_grammar_only_pieces_of_the_tokenizer_are_drawn(tmp_path):
    """A model with more rows than pieces, as version a3d077c converted them, whose rows all had a logit."""
    describe(tmp_path / "model", replace(CONFIG, vocab_size=600), None, TextFormat(), load_tokenizer("compact"))
    variables = initialize(Llama(replace(CONFIG, vocab_size=600)), jax.random.key(0), make_mesh(MeshConfig(1, 1, 1)))
    save_weights(tmp_path / "model", variables)
    report = sample(tmp_path / "model", 4, tmp_path / "s.csv", grammar=False, top_p=1.0, max_new_tokens=40)
    assert report.attempts == 4  # 160 tokens, a quarter of which would have no piece to be decoded to


def test_a_killed_run_goes_on_as_if_nothing_had_happened(model_dir, whole, tmp_path):
    out = tmp_path / "s.parquet"
    # However late the kill comes, it comes before the end: the journal takes no more than 40 rows after it is due.
    command = (
        "import sys, time\nfrom jaxcrystal.config import MeshConfig\nfrom jaxcrystal.mesh import make_mesh\n"
        "from jaxcrystal.sampling.ledger import Ledger\nfrom jaxcrystal.sampling.sampling import sample\n"
        "append = Ledger.append\n"
        "def until(ledger, attempt):\n"
        "    if len(ledger) >= int(sys.argv[1]) + 40: time.sleep(600)\n"
        "    append(ledger, attempt)\n"
        "Ledger.append = until\n"
        f"sample({str(model_dir)!r}, 300, {str(out)!r}, mesh=make_mesh(MeshConfig(8, 1, 1)), **{RUN})"
    )
    journal = tmp_path / "s.parquet.journal"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    for rows in np.sort(np.random.default_rng().integers(1, 200, 2)):  # killed twice, at other moments each time
        process = subprocess.Popen(
            [sys.executable, "-c", command, str(rows)], stderr=subprocess.DEVNULL, env=environment
        )
        while not journal.exists() or journal.read_bytes().count(b"\n") < rows:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not out.exists()
    there = journal.read_bytes().count(b"\n")
    assert rows <= there < 300
    report = sample(model_dir, 300, out, mesh=make_mesh(MeshConfig(8, 1, 1)), **RUN)
    assert (report.resumed, report.attempts) == (there, 300)
    assert pq.read_table(out).to_pylist() == whole


def test_a_finished_run_is_not_drawn_again(model_dir, tmp_path):
    options = {"temperature": 1.0, "top_p": 0.99, "seed": 1, "slots": 8}
    first = sample(model_dir, 20, tmp_path / "s.csv", **options)
    again = sample(model_dir, 20, tmp_path / "s.csv", **options)
    assert again.resumed == 20
    assert again.counts == first.counts
    with pytest.raises(UserError, match="seed was 1, now it is 2"):
        sample(model_dir, 20, tmp_path / "s.csv", **{**options, "seed": 2})


def test_a_run_that_is_made_longer_keeps_its_rows(model_dir, tmp_path, capsys):
    """And is, with the same slots, the run that was as long from the beginning."""
    options = {"conditions": [{"band_gap": 1.0}, {}], "seed": 1, "slots": 8}
    sample(model_dir, 10, tmp_path / "whole.parquet", **options)
    sample(model_dir, 4, tmp_path / "s.parquet", **options)
    report = sample(model_dir, 10, tmp_path / "s.parquet", **options)
    assert (report.resumed, report.attempts) == (8, 20)
    assert "s.parquet had 4 attempts for each prompt, and goes on to 10\n" in capsys.readouterr().err
    found, expected = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("s", "whole"))
    assert_same_rows(found, expected)
    with pytest.raises(UserError, match="num was 10, now it is 4"):
        sample(model_dir, 4, tmp_path / "s.parquet", **options)


def test_a_damaged_journal_costs_its_lines_and_is_ended_with_the_slots_that_began_it(model_dir, tmp_path, capsys):
    out, options = tmp_path / "s.parquet", {"seed": 1, "num_atoms": (2, 4)}
    sample(model_dir, 20, out, slots=8, **options)
    table, header = pq.read_table(out), json.loads((tmp_path / "s.parquet.json").read_text())
    out.unlink()
    (tmp_path / "s.parquet.json").write_text(json.dumps({key: header[key] for key in ("request", "slots")}))
    rows = [json.dumps(row | {"crc32": zlib.crc32(json.dumps(row).encode())}) + "\n" for row in table.to_pylist()[:15]]
    rows[5] = rows[5].replace('"index"', "@")
    (tmp_path / "s.parquet.journal").write_text("".join(rows))
    assert sample(model_dir, 20, out, slots=16, **options).resumed == 14
    said = capsys.readouterr().err
    assert f"note: 1 line of {out}.journal cannot be read; row 5 is drawn again\n" in said
    assert f"note: {out} was begun with 8 slots and goes on with them, not with 16\n" in said
    assert pq.read_table(out).equals(table)
    assert json.loads((tmp_path / "s.parquet.json").read_text()) == header


def test_attempts_are_drawn_again_by_their_weights(model_dir, tmp_path, capsys):
    """As `Attempts.resample` does, prompt by prompt; another number takes no new draw."""
    out, options = tmp_path / "s.parquet", {"temperature": 1.0, "top_p": 1.0, "seed": 4, "slots": 8}
    conditions = [{"band_gap": 1.0}, {}]
    plain = sample(model_dir, 12, out, conditions=conditions, **options)
    assert plain.effective_number is None
    before = pq.read_table(out).to_pylist()
    assert {row["resampled"] for row in before} == {None}
    with jaxcrystal.load(model_dir, temperature=1.0, top_p=1.0, slots=8) as sampler:
        attempts = sampler.sample(12, conditions=conditions, seed=4)
    for count in (5, 30):
        report = sample(model_dir, 12, out, conditions=conditions, resample=count, **options)
        assert report.resumed == 24 and report.effective_number == pytest.approx(attempts.effective_number)
        rows = pq.read_table(out).to_pylist()
        expected = Counter(row.index for row in attempts.resample(count, 4))
        assert {row["index"]: row["resampled"] for row in rows if row["resampled"]} == expected
        assert [row | {"resampled": None} for row in rows] == before
        again = sample(model_dir, 12, out, conditions=conditions, resample=count, **options)
        assert again.effective_number == report.effective_number
    longer = sample(model_dir, 14, out, conditions=conditions, resample=5, **options)
    assert longer.resumed == 24 and longer.attempts == 28
    assert sum(row["resampled"] for row in pq.read_table(out).to_pylist()) == 10
    sample(model_dir, 14, out, conditions=conditions, **options)
    assert {row["resampled"] for row in pq.read_table(out).to_pylist()} == {None}


def test_where_the_slots_of_a_run_do_not_fit_it_says_so(model_dir, tmp_path, monkeypatch):
    out = tmp_path / "s.parquet"
    monkeypatch.setattr(Ledger, "finish", lambda ledger: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample(model_dir, 20, out, slots=16)
    journal = tmp_path / "s.parquet.journal"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:5]))
    monkeypatch.setattr(sampler, "memory_left", lambda mesh: 2**20)  # bytes: less than 16 slots take
    message = r"s\.parquet was begun with 16 slots, and goes on with them: 16 slots take .* would fit"
    with pytest.raises(UserError, match=message) as error:
        sample(model_dir, 20, out)
    assert "\n" not in str(error.value) and len(journal.read_text().splitlines()) == 5


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


def test_what_the_grammar_removes_is_told_so_exactly_that_the_free_model_is_known(model_dir, tmp_path):
    """The mean of exp(grammar_log_probability) over draws with the grammar is how often the model alone writes so."""

    def rows(grammar):
        options = {"temperature": 1.0, "top_p": 1.0, "seed": 1, "slots": 32, "grammar": grammar}
        sample(model_dir, 400, tmp_path / f"{grammar}.parquet", **options)
        return pq.read_table(tmp_path / f"{grammar}.parquet").to_pylist()

    free, kept = rows(False), rows(True)
    assert {row["status"] for row in kept} == {"ok"}
    of_free = {row["text"]: row["log_probability"] for row in free if row["status"] == "ok"}
    assert set(GOOD) <= set(of_free)
    for row in kept:
        assert row["log_probability"] == pytest.approx(of_free.get(row["text"], row["log_probability"]), abs=1e-3)
    weight = np.exp([row["grammar_log_probability"] for row in kept])
    for same in (lambda row: row["status"] == "ok", *(lambda row, t=text: row["text"] == t for text in GOOD)):
        estimates = weight * [same(row) for row in kept]
        spread = np.sqrt((estimates.var() + 0.25) / 400)
        assert abs(estimates.mean() - np.mean([same(row) for row in free])) < 3 * spread


WISHES = [{}, {"pretty_formula": "NaCl"}, {"pretty_formula": "MgO", "band_gap": 5.0}, {"band_gap": 1.0}]


class Run(NamedTuple):
    out: Path
    rows: list[dict]


@pytest.fixture(scope="module")
def many(model_dir, tmp_path_factory) -> Run:
    """Ten attempts of each of four prompts, in one run."""
    out = tmp_path_factory.mktemp("many") / "s.parquet"
    assert sample(model_dir, 10, out, conditions=WISHES, seed=3, slots=8).attempts == 40
    return Run(out, pq.read_table(out).to_pylist())


def assert_same_rows(ours, theirs, but=("log_probability", "grammar_log_probability")):
    """Log-probabilities may differ in a last bit where other crystals shared a batch."""
    for a, b in zip(ours, theirs, strict=True):
        for name in but:
            assert a[name] == pytest.approx(b[name], abs=1e-3)
        assert {k: v for k, v in a.items() if k not in but} == {k: v for k, v in b.items() if k not in but}


def test_prompts_of_one_run_give_what_each_gives_alone(model_dir, many, tmp_path):
    assert [(row["index"], row["draw"]) for row in many.rows] == [(i, i % 10) for i in range(40)]
    for number in (1, 2):
        sample(model_dir, 10, tmp_path / f"{number}.parquet", conditions=WISHES[number], seed=3, slots=3)
        alone = pq.read_table(tmp_path / f"{number}.parquet").to_pylist()
        assert_same_rows(
            many.rows[10 * number : 10 * number + 10], [row | {"index": row["index"] + 10 * number} for row in alone]
        )
    assert {row["formula"] for row in many.rows[10:20]} == {"ClNa"}
    assert {row["formula"] for row in many.rows[20:30]} == {"MgO"}
    assert len({row["prompt"] for row in many.rows}) == 4


TWO = """
import contextlib, sys, time
from pathlib import Path
from jaxcrystal import hosts
from jaxcrystal.sampling.sampling import sample
hosts.start(sys.argv[1], 2, int(sys.argv[2]))
apart = hosts.apart

@contextlib.contextmanager
def apart_until_joined(name):
    with apart(name):
        yield
    while list(Path(sys.argv[4]).parent.glob("*-of-*")):
        time.sleep(0.1)

if sys.argv[2] == "1":
    hosts.apart = apart_until_joined
report = sample(sys.argv[3], 10, sys.argv[4], conditions=%r, seed=3, slots=8)
print(report.out, report.attempts, report.resumed)
"""


@pytest.mark.slow
def test_two_processes_write_what_one_would(model_dir, many, tmp_path):
    """Each its part, of which the second one's had been begun; the first joins them, here before the second goes on."""
    out = tmp_path / "s.parquet"
    request = Request(**json.loads((many.out.parent / "s.parquet.json").read_text())["request"])
    begun = Ledger(out, request, Part(1, 2))
    for row in many.rows[20:27]:
        begun.append(Attempt(**row))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO % WISHES, address, str(i), str(model_dir), str(out)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=600)[0].splitlines()[-1:] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert told == [[f"{out} 40 0"], [f"{tmp_path / 's-00001-of-00002.parquet'} 20 7"]]
    assert_same_rows(pq.read_table(out).to_pylist(), many.rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.parquet", "s.parquet.json"]
    assert sample(model_dir, 10, out, conditions=WISHES, seed=3).resumed == 40


def test_guidance_presses_what_is_stated(model_dir, tmp_path):
    def rows(name, **options):
        sample(model_dir, 20, tmp_path / f"{name}.parquet", conditions={"band_gap": 2.0}, slots=8, **options)
        return pq.read_table(tmp_path / f"{name}.parquet").to_pylist()

    plain, one, three = rows("plain"), rows("one", guidance=1.0), rows("three", guidance=3.0)
    assert [row["text"] for row in one] == [row["text"] for row in plain]
    assert [row["text"] for row in three] != [row["text"] for row in plain]
    assert {row["status"] for row in three} == {"ok"}
    with pytest.raises(UserError, match="prompt 2 states nothing that this model was trained on"):
        sample(model_dir, 2, tmp_path / "t.parquet", conditions=[{"band_gap": 2.0}, {}], guidance=2.0)


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"guidance": 1e38, "conditions": {"band_gap": 1.0}}])
def test_where_methods_leave_no_numbers_that_is_the_outcome(model_dir, tmp_path, options):
    """A logit over 1e-40, or 1e38 times a difference of logits, is beyond float32."""
    report = sample(model_dir, 4, tmp_path / "s.parquet", slots=4, **options)
    assert report.counts == {"nan_logits": 4}
    assert {row["cif"] for row in pq.read_table(tmp_path / "s.parquet").to_pylist()} == {None}


def test_a_cache_of_int8_is_another_run(model_dir, tmp_path):
    options = {"seed": 1, "slots": 8, "cache_dtype": "int8"}
    sample(model_dir, 20, tmp_path / "s.parquet", **options)
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    exact = sample(model_dir, 20, tmp_path / "exact.parquet", **{**options, "cache_dtype": None})
    told = [row["log_probability"] for row in pq.read_table(exact.out).to_pylist()]
    assert told != [row["log_probability"] for row in rows]
    with pytest.raises(UserError, match="cache was 'int8', now it is 'float32'"):
        sample(model_dir, 20, tmp_path / "s.parquet", **{**options, "cache_dtype": None})


def test_another_dtype_is_another_run(model_dir, tmp_path):
    """The model's own is float32; in bfloat16 texts have other log-probabilities, and so they have again."""
    told = []
    for name, dtype in (("a", "bfloat16"), ("b", "bfloat16"), ("c", "float32"), ("d", None)):
        report = sample(model_dir, 20, tmp_path / f"{name}.parquet", slots=8, dtype=dtype)
        told.append([row["log_probability"] for row in pq.read_table(report.out).to_pylist()])
    assert told[0] == told[1] != told[2] == told[3]
    assert np.mean(np.array(told[0]) == told[2]) < 0.5
    with pytest.raises(UserError, match="dtype was 'bfloat16', now it is None"):
        sample(model_dir, 20, tmp_path / "a.parquet", slots=8)
    assert sample(model_dir, 21, tmp_path / "d.parquet", slots=8, dtype="float32").resumed == 20  # its own, said
    with pytest.raises(UserError, match="dtype is 'float16'; it must be float32 or bfloat16"):
        sample(model_dir, 20, tmp_path / "e.parquet", dtype="float16")


def test_symprec_decides_which_symmetry_is_told(model_dir, tmp_path):
    constraints = Constraints(formula="NaCl", num_atoms=(2, 2), lengths=(3.0, 9.9))
    groups = []
    for symprec in (0.01, 3.0):
        out = tmp_path / f"{symprec}.parquet"
        sample(model_dir, 30, out, constraints=constraints, temperature=2.0, top_p=1.0, slots=8, symprec=symprec)
        rows = pq.read_table(out).to_pylist()
        groups.append([row["space_group"] for row in rows])
        for row in rows:
            assert row["status"] == "ok" and "'P 1'" in row["cif"]
            assert (row["space_group"] is None) == (row["symmetrized_cif"] is None)  # atoms within symprec of others
            if row["space_group"] is not None:
                # A smaller one, where none fits at that which was asked for.
                assert 0 < float(re.search(r"symprec (\S+) Angstrom", row["symmetrized_cif"])[1]) <= symprec
                assert f"_space_group_IT_number {row['space_group']}\n" in row["symmetrized_cif"]
    assert None not in groups[0] and groups[0] != groups[1]


def test_conditions_are_stated_in_the_prompt(model_dir, tmp_path):
    conditions = {"pretty_formula": "NaCl", "band_gap": 5.0}
    sample(model_dir, 3, tmp_path / "s.parquet", conditions=conditions, slots=3)
    (row, *_) = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert row["prompt"] == generation_prompt(P1, conditions)
    assert json.loads(row["conditions"]) == conditions
    with pytest.raises(UserError, match="unknown condition 'colour'"):
        sample(model_dir, 3, tmp_path / "t.parquet", conditions={"colour": "red"})


def test_a_refused_run_leaves_nothing_behind(model_dir, tmp_path):
    for options, match in (
        ({"max_new_tokens": 250}, "the model's context holds 256: set max_new_tokens to at most"),
        ({"conditions": {"elements": ELEMENTS[1:]}}, "the model's context holds 256: shorten the prompt"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"seed": -1}, "seed -1"),
        ({"slots": 0}, "slots is 0"),
        ({"num": 0}, "num is 0"),
        ({"num_valid": 0}, "num_valid is 0"),
        ({"num_valid": 999}, "num_valid is 999"),
        ({"resample": 0}, "resample is 0; it must be at least 1"),
        ({"resample": 5}, "exact at temperature 1 and top-p 1"),
        (
            {"resample": 5, "temperature": 1.0, "top_p": 1.0, "num_valid": 2},
            "num_valid ends earlier: leave one out",
        ),
        ({"resample": 5, "temperature": 1.0, "top_p": 1.0, "grammar": False}, "without a grammar the draws are the"),
        ({"top_k": 0}, "top-k is 0"),
        ({"min_p": 0.0}, "min-p is 0.0"),
        ({"symprec": 0.0}, "symprec is 0.0"),
        ({"guidance": -1.0}, "guidance weight is -1.0"),
        ({"guidance": 2.0}, "prompt 1 states nothing"),
        ({"conditions": []}, "there is no row of conditions"),
        ({"conditions": [{"band_gap": 1.0}, {}, {"band_gap": 1.0}]}, "row 3: the same as row 1; raise num"),
        ({"conditions": [{}, {"pretty_formula": "NaXx"}]}, "conditions, row 2: 'Xx' of the formula 'NaXx'"),
        ({"conditions": [{}, {"spacegroup.number": 231}]}, "conditions, row 2: space group 231 does not exist"),
        ({"conditions": [{}, {"band_gap": 1.0}], "num_valid": 2}, "num_valid counts along one row of attempts"),
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


def test_another_base_is_another_run(tmp_path):
    """Adapters on a float base and on what int8 makes of it: the ledger knows which."""
    mesh, lora, run = make_mesh(MeshConfig(1, 1, 1)), LoraConfig(rank=2, targets=("q_proj",)), tmp_path / "run"
    params = initialize(Llama(CONFIG), jax.random.key(0), mesh)["params"]
    stored = replace(CONFIG, weights="int8")
    for base, config, weights in (
        ("float", CONFIG, params),
        ("int8", stored, quantize(jax.tree.map(jnp.copy, params), stored, mesh)),
    ):
        describe(tmp_path / base, config, None, TextFormat(), load_tokenizer("compact"))
        save_weights(tmp_path / base, {"params": weights})
        record_checksum(tmp_path / base, "a hash of the same weights")
    describe(run, CONFIG, lora, TextFormat(), load_tokenizer("compact"), base=tmp_path / "float")
    save_weights(run, initialize(Llama(CONFIG, lora), jax.random.key(1), mesh, ["lora"]))
    record_checksum(run, "a hash of the same weights")
    rows = []
    for base in (None, tmp_path / "int8"):
        out = tmp_path / f"{base and base.name}.parquet"
        sample(run, 2, out, base=base, slots=2, max_new_tokens=100)
        rows.append(pq.read_table(out).to_pylist())
    probabilities = np.array([[row["log_probability"] for row in each] for each in rows])
    assert (probabilities[0] != probabilities[1]).all()
    with pytest.raises(UserError, match=r"belongs to another run: model was '\w{16}', now it is '\w{16}'"):
        sample(run, 3, tmp_path / "None.parquet", base=tmp_path / "int8", slots=2, max_new_tokens=100)
    # The same crystals, whoever holds the model: the verb, or what `jaxcrystal.load` gives.
    with jaxcrystal.load(run, base=tmp_path / "int8", slots=2, max_new_tokens=100) as living:
        assert [attempt.text for attempt in living.sample(2)] == [row["text"] for row in rows[1]]


def test_a_bare_host_samples_without_pymatgen_or_torch(model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    command = (
        "import sys; sys.modules['pymatgen'] = sys.modules['torch'] = None\n"
        "from jaxcrystal.sampling.sampling import sample\n"
        f"assert sample({str(tmp_path / 'model')!r}, 30, {str(tmp_path / 'cifs')!r}, slots=8).ok"
    )
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}  # finds what was compiled here
    subprocess.run([sys.executable, "-c", command], check=True, stderr=subprocess.DEVNULL, env=environment)
    assert list((tmp_path / "cifs").glob("*.cif"))
