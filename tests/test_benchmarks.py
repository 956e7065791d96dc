"""The benchmarks run from end to end, both sides see the same tokens, and what they write is complete. No timing."""

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from jaxcrystal.config import LlamaConfig, LoraConfig, OptimizerConfig, TextFormat
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.texts.tokenizer import load_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other as siblings; so do the processes that they start."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def only_result(directory: Path) -> dict:
    (path,) = directory.iterdir()
    result = json.loads(path.read_text())
    measured = result["measured"]
    assert path.name.startswith(result["benchmark"]) and result["quick"]
    assert measured["machine"] and measured["cores"] >= 1 and measured["commit"] and measured["date"][:2] == "20"
    assert {"python", "jax", "torch", "transformers", "peft"} <= set(measured["versions"])
    return result


def test_writer(tmp_path):
    import material
    import writer

    writer.main(["--quick", "--out", str(tmp_path)])  # on what lies beside the checkout, or on what is embedded
    result = only_result(tmp_path)
    assert result["tokens"]["device"] == result["tokens"]["host"] > 1000
    assert all(rate > 0 for rate in result["crystals_per_second"].values()) and 0 <= result["padding"] < 1
    assert {writer.SENTENCEPIECE, writer.SENTENCEPIECE_TEXT} <= set(result["ratios"])
    if material.LLAMA2.exists():
        assert result["ratio"] == result["ratios"][writer.TRANSFORMERS] > 0
        assert result["ratio_with_text"] == result["ratios"][writer.TRANSFORMERS_TEXT] > 0
    else:  # transformers has no class for the compact tokenizer
        assert result["ratio"] is None and result["tokenizer"] == "compact"


@pytest.mark.slow
def test_sampler(tmp_path):
    import sampler

    sampler.main(["--quick", "--out", str(tmp_path)])  # asserts that both sides are the same model
    result = only_result(tmp_path)
    with_grammar = {sampler.OURS, sampler.FEW, sampler.NO_REFILL, sampler.ONE, sampler.ALL, sampler.MANY, sampler.INT8}
    sides = with_grammar | {sampler.GENERATE, sampler.FREE}
    assert set(result["crystals_per_second"]) == sides
    assert set(result["ratios"]) == sides - {sampler.OURS, sampler.FEW}
    # The same draws have the same lengths, however they are drawn.
    ours, unfilled = (result["turns"][side][0]["lengths"] for side in (sampler.FEW, sampler.NO_REFILL))
    assert ours == unfilled and len(ours) == 6
    for side in sides - with_grammar:
        lengths = result["turns"][side][0]["lengths"]
        assert result["lengths"]["least"] <= min(lengths) <= max(lengths) <= result["lengths"]["most"]


@pytest.mark.slow
def test_living_sampler(tmp_path, monkeypatch):
    import living_sampler
    import table

    monkeypatch.setenv("JAXCRYSTAL_COMPILATION_CACHE", "off")  # which it sets, and which is set back afterwards
    living_sampler.main(["--quick", "--out", str(tmp_path)])
    result = only_result(tmp_path)
    for name in ("first_8_seconds", "second_request_seconds"):
        assert result[name].keys() == {"cold", "warm"} and min(result[name].values()) > 0
    assert {name: found["crystals"] for name, found in result["many"].items()} == {"one run": 3, "one sampler": 3}
    assert all(found["programs"] >= 2 for found in result["many"].values())
    text = table.rendered(tmp_path)
    assert "3 formulas, a crystal each" in text and "| none are kept |" in text


@pytest.mark.slow
def test_calibration(tmp_path, shared):
    import calibration
    import table

    calibration.main(["--quick", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")])
    result = only_result(tmp_path / "out")
    assert result["relaxations"] == {"converged": 20} and result["formation_energy"]["mae"] < 0.1
    # Corrections that were forgotten would show.
    assert result["formation_energy_uncorrected"] != result["formation_energy"]
    hulls = {(row["hull"], row["energies"]): row for row in result["hulls"]}
    assert hulls[("provided", "stated")]["mae"] < 1e-3 and hulls[("provided", "stated")]["placed"] == 20
    assert hulls[("provided", "found")]["mae"] == pytest.approx(result["formation_energy"]["mae"], abs=0.05)
    own = hulls[("train and val, self-consistent, single-point", "own")]
    assert own["placed"] == 20 and own["mae"] != hulls[("provided", "found")]["mae"]
    assert all(0 <= row["metastable"] <= 1 and row["with_itself"]["bias"] >= row["bias"] for row in hulls.values())
    kept = (tmp_path / "cache/relaxations.jsonl").read_bytes()
    again = calibration.main(["--quick", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "again")])
    assert again["hulls"] == result["hulls"] and (tmp_path / "cache/relaxations.jsonl").read_bytes() == kept
    assert "| provided | found | 20 |" in table.rendered(tmp_path / "out")


@pytest.mark.slow
def test_train_step(tmp_path):
    import train_step

    run = ["--quick", "--data", "prototypes", "--peer", "micro=2", "--set", "model.num_hidden_layers=1"]
    assert train_step.main([*run, "--out", str(tmp_path)]) == 0
    result = only_result(tmp_path)
    ours, peer = result["engines"]
    assert (ours["kind"], peer["kind"]) == ("ours", "peer") and peer["setting"]["micro"] == 2
    (useful,) = result["useful_tokens"]  # one list: each turn had the same tokens in both engines
    assert len(useful) == 2 and min(useful) > 500
    for engine in (ours, peer):
        assert engine["error"] is None and len(engine["rates"]) == len(engine["losses"]) == 2
        assert engine["rate"] > 0 and engine["mfu"] > 0 and engine["peak_memory_bytes"] > 0
        assert 0 <= engine["padding"] < 0.5 and 5 < engine["losses"][0] < 7  # ln 448 is 6.1
    assert result["ratio"] == pytest.approx(ours["rate"] / peer["rate"])


def test_an_engine_that_fails_is_told_and_answers_no_more(capfd):
    import train_step

    ours, theirs = multiprocessing.Pipe()
    train_step.serve(theirs, "peer", False, "float32", "no setting")
    engine = train_step.Engine("broken", "peer", ())
    assert train_step.ask(engine, ours) is None and engine.error.startswith("TypeError")
    assert train_step.ask(engine, ours, [0]) is None and not theirs.poll()
    assert "broken: TypeError" in capfd.readouterr().err
    dead = train_step.Engine("dead", "peer", ())
    theirs.close()
    assert train_step.ask(dead, ours, [0]) is None and dead.error == "its process died"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "70b"], "--weights nf4"),
        (["--quick", "--peer", "micros=2"], "unknown setting 'micros'"),
        (["--quick", "--crystals", "3", "--rows", "64"], "fill one batch"),
    ],
)
def test_what_cannot_be_run(arguments, message):
    import train_step

    from jaxcrystal.errors import UserError

    with pytest.raises(UserError, match=message):
        train_step.main(["--data", "prototypes", "--tokenizer", "compact", *arguments])


def test_the_peers_settings_differ_in_how_and_not_in_what():
    """One step in every setting, from the same weights: padded, in parts, packed, recomputed, in half precision."""
    import material
    from peer import Peer

    crystals = material.crystals("prototypes", 10**6)
    chosen = range(0, len(crystals), len(crystals) // 7)
    shift = np.random.default_rng(0).random(3)
    tasks = [material.Task(crystals.crystal(i), shift, None, crystals.attributes(i)) for i in chosen]
    tasks.append(material.Task(crystals.crystal(8), shift, int(crystals.crystal(8).species[0]), {}))
    config = LlamaConfig(448, 32, 64, 2, 4, 2, 8)
    tokenizer, told = load_tokenizer("compact"), {}
    useful = sum(len(tokenizer.encode(task.text(TextFormat()))) + 2 for task in tasks)
    for words in ("", "micro=1", "micro=2", "packed=512", "packed=512,micro=1", "micro=4,checkpointing", "autocast"):
        setting = material.Setting.parse(words)
        peer = Peer(setting, config, LoraConfig(dropout=0.0), OptimizerConfig(learning_rate=0.1), "compact", [tasks])
        first, second = peer.turn([0]), peer.turn([0])
        told[words] = first["losses"][0], second["losses"][0]
        assert first["useful_tokens"] == useful <= first["computed_tokens"]
        assert (first["computed_tokens"] == useful) == (setting.micro == 1)  # one crystal, or one row, pads nothing
    for words, losses in told.items():
        assert losses == pytest.approx(told[""], abs=2e-2 if words == "autocast" else 1e-4), words
    assert told[""][1] < told[""][0]
    assert told["autocast"] != told[""]


def test_the_text_of_pymatgen_is_ours():
    import material

    crystals = material.crystals("prototypes", 30)
    shift = np.random.default_rng(0).random((30, 3))
    for i in range(30):
        crystal = crystals.crystal(i)
        masked = int(crystal.species[0]) if i % 3 == 0 else None
        task = material.Task(crystal, shift[i], masked, crystals.attributes(i))
        assert task.text_by_pymatgen(crystal.to_structure(), TextFormat()) == task.text(TextFormat())


def test_tokens_that_differ_are_noticed():
    import material

    from jaxcrystal.texts.writer import Rows

    tokens, segments = np.array([[1, 5, 2, 1, 6, 2, 0]]), np.array([[1, 1, 1, 2, 2, 2, 0]])
    rows = Rows(tokens, segments, segments, segments > 0)
    assert material.assert_same_tokens([rows], [[1, 5, 2], [1, 6, 2]]) == 6
    for wrong in ([[1, 5, 2]], [[1, 5, 2], [1, 7, 2]], [[1, 5, 2, 1, 6, 2]]):
        with pytest.raises(AssertionError, match="same tokens"):
            material.assert_same_tokens([rows], wrong)


def test_facts_and_names(tmp_path):
    import machine

    facts = machine.facts(uses_accelerator=False)
    gpu = facts | {"accelerators": ["NVIDIA H200, 143771 MiB"]}
    assert machine.write("x", {"measured": gpu}, tmp_path).name == "x_nvidia-h200.json"
    assert f"{facts['cores']}-cores" in machine.write("x", {"measured": facts}, tmp_path).name
    assert facts["versions"]["jax"] == jax.__version__


def test_the_readme_says_what_the_results_say():
    import table

    assert table.rendered() in (BENCHMARKS / "README.md").read_text(), "run `python benchmarks/table.py`"


def test_the_page_on_pods_is_up_to_date():
    import aot_table

    assert aot_table.rendered() in aot_table.PAGE.read_text(), "run `python benchmarks/aot_table.py`"


def test_a_table_of_results(tmp_path):
    import table

    measured = {"machine": "a machine", "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "load_before": 0.1}
    engines = [
        {"name": "jaxcrystal", "rate": 1234.5, "padding": 0.01, "mfu": 0.5, "peak_memory_bytes": 2**30},
        {"name": "peer", "rate": None, "error": "out of memory"},
    ]
    step = {"benchmark": "train_step", "shape": "7b", "engines": engines, "ratios": {}, "measured": measured}
    (tmp_path / "a.json").write_text(json.dumps(step | {"ratio": None, "quick": False}))
    rates = {"device: x": 3000.4, "host: y": 30.0}
    writer = {"benchmark": "writer", "crystals_per_second": rates, "ratios": {"host: y": 100.0}, "measured": measured}
    (tmp_path / "b.json").write_text(json.dumps(writer | {"quick": False}))
    prepare = {"benchmark": "prepare", "rows": 2000, "median_seconds": {"this version": 4.0, "old": 5.0}, "ratio": 1.25}
    (tmp_path / "c.json").write_text(json.dumps(prepare | {"measured": measured}))
    text = table.rendered(tmp_path)
    assert "| jaxcrystal | 1,234 | 1.0 % | 50.0 % | 1.0 GiB | |" in text and "| peer | out of memory |" in text
    assert "| device: x | 3,000 | |" in text and "| host: y | 30 | 100.00 |" in text and text.count("a machine") == 3
    assert "| this version | 4.0 | |" in text and "| old | 5.0 | 1.25 |" in text
    assert "None yet" in table.rendered(tmp_path / "nothing")
    (tmp_path / "d.json").write_text(json.dumps({"benchmark": "new", "measured": measured}))
    with pytest.raises(ValueError, match="'new', of which no table is made"):
        table.rendered(tmp_path)


def test_prepare(shared, tmp_path):
    """Beside this commit itself, so that it needs no history; asserts that both sides write the same crystals."""
    import machine
    import prepare
    import table

    if machine.facts(uses_accelerator=False)["commit"] == "unknown":
        pytest.skip("needs a git checkout: the earlier version is taken out of the history")
    result = prepare.main(["--quick", "--against", "HEAD", "--out", str(tmp_path)])
    assert result["rows"] == 40 and set(result["median_seconds"]) == {prepare.OURS, "HEAD"}
    assert only_result(tmp_path)["ratio"] == result["ratio"] > 0
    assert "| HEAD |" in table.rendered(tmp_path)


def test_evaluate(tmp_path):
    import evaluate

    evaluate.main(["--quick", "--out", str(tmp_path)])  # asserts that both sides give the same fingerprints
    result = only_result(tmp_path)
    assert result["worst_difference"] <= result["tolerance"] == 1e-6
    assert all(result[name] > 0 for name in ("ratio_generated", "ratio_reference", "ratio_reference_stored"))
    matching = result["matching"]
    assert matching["generated"] == matching["known"] == 4 >= matching["unique"] > 0
    assert sum(matching["seconds"].values()) == pytest.approx(matching["total_seconds"])


def test_reproduction(shared, tmp_path):
    """Small parts of both sets: each choice of crystals is told, and of the draws how far they spread."""
    import reproduction

    paths = [shared / "data/generated/diffcsp_mp20.parquet", shared / "data/mp20/test.parquet"]
    for name, path in zip("ab", paths, strict=True):
        pd.read_parquet(path).head(60).to_parquet(tmp_path / f"{name}.parquet")
    found = reproduction.reproduced(tmp_path / "a.parquet", tmp_path / "b.parquet", None, draws=2)
    published = {name for name in reproduction.PUBLISHED if not name.startswith("validity")}
    assert found["validity.structural"] == 1 and found["without a fingerprint"] == 0
    everything, valid, drawn, draws = (value for value in found.values() if isinstance(value, dict))
    assert published == set(draws) == set(valid) == set(everything)
    assert drawn == valid != everything  # there are fewer than are drawn
    for name, spread in draws.items():
        assert spread["mean"] == pytest.approx(valid[name]["found"]) and spread["deviation"] == pytest.approx(0)


def test_relax(tmp_path):
    import relax

    # Asserts that both sides say the same of every crystal; of M3GNet tests/relaxation/test_potentials.py does.
    relax.main(["--quick", "--potential", "chgnet", "--out", str(tmp_path)])
    (found,) = only_result(tmp_path)["potentials"].values()
    assert found["ratio"] > 0 and found["close"] == 1 and found["statuses"] == {"converged": 3}


@pytest.mark.slow
def test_the_best_rate_lies_between_others():
    from pretraining import _beyond

    def beyond(**nats: float) -> list[float]:
        return _beyond({rate: {"nats": one, "trained_in": "float32"} for rate, one in nats.items()})

    assert beyond(**{"0.0005": 117.0, "0.001": 114.0, "0.002": 112.0}) == [4e-3]
    assert beyond(**{"0.0005": 117.0, "0.001": 114.0, "0.002": 112.0, "0.004": 116.0}) == []
    assert beyond(**{"0.0001": 1.0, "0.0003": 2.0, "0.001": 3.0}) == [3e-5]


def test_pretraining(tmp_path, monkeypatch):
    """Two ways of training, up to two budgets; the base's nats are those that torch has of the texts."""
    import pretraining
    import pretraining_page
    import torch
    import transformers

    from jaxcrystal.crystals import dataset
    from jaxcrystal.texts import prompts
    from jaxcrystal.texts.forms import form_of
    from jaxcrystal.weights.convert import convert

    tokenizer = load_tokenizer("compact")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = transformers.LlamaConfig(vocab_size=tokenizer.vocab_size, head_dim=16, tie_word_embeddings=True, **sizes)
    theirs = transformers.LlamaForCausalLM(shape).eval()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").write_bytes(tokenizer.file)
    convert(tmp_path / "hf", tmp_path / "base")
    (tmp_path / "data").mkdir()
    for name, side in (("train", "train"), ("val", "validation")):
        dataset.store(dataset.load(f"prototypes:{side}"), tmp_path / f"data/{name}.parquet", {})
    ways = (pretraining.ADAPTERS, pretraining.RANDOM)  # all weights are trained as adapters are, but for `lora`
    monkeypatch.setattr(pretraining, "RATES", dict(zip(ways, [(5e-4, 2e-3), (1e-3,)], strict=True)))
    options = ["--base", tmp_path / "base", "--data", tmp_path / "data", "--runs", tmp_path / "runs"]
    command = [*map(str, options), "--quick", "--out", str(tmp_path / "out")]
    assert pretraining.main(command) == 0
    result = only_result(tmp_path / "out")
    base, *points = result["points"]

    crystals, expected = dataset.load("prototypes:validation"), []
    for i in range(8):
        prompt = [*tokenizer.begin, *tokenizer.encode(prompts.generation_prompt(form_of(TextFormat()), {}))]
        text = prompts.generation(form_of(TextFormat()), crystals.crystal(i), {})
        tokens = torch.tensor([[*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id]])
        with torch.no_grad():
            log_p = theirs(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
        expected.append(-float(log_p[len(prompt) - 1 :].sum()))
    np.testing.assert_allclose(base["nats"], np.mean(expected), rtol=1e-5)
    assert [point["variant"] for point in points] == [*ways, *ways]
    assert points[0]["crystals"] == points[1]["crystals"] < points[2]["crystals"]
    assert all(point["nats"] > 0 and point["attempts"] == 2 for point in points)
    tried = result["rates"][pretraining.ADAPTERS]
    assert {one["trained_in"] for one in tried.values()} == {"bfloat16"} == {point["trained_in"] for point in points}
    best = min(tried, key=lambda rate: tried[rate]["nats"])
    assert set(tried) == {"0.0005", "0.002"} and points[0]["rate"] == float(best)

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.npy")}
    (kept,) = (tmp_path / "out").iterdir()
    kept.unlink()
    assert pretraining.main(command) == 0  # nothing is done twice where the runs lie
    assert only_result(tmp_path / "out")["points"] == result["points"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.npy")} == times
    shutil.rmtree(tmp_path / "runs")
    assert pretraining.main(command) == 0  # nor where the result does
    assert only_result(tmp_path / "out")["points"] == result["points"] and not (tmp_path / "runs").exists()

    text = pretraining_page.rendered([result])
    assert f"| from random weights, bfloat16 | {points[1]['rate']:g} | | {points[1]['nats']:.1f} (" in text
    assert f"**{tried[best]['nats']:.1f}** at {points[0]['rate']:g}" in text
    assert "| base, untrained | |" in pretraining_page.rendered([result | {"points": [base]}])
    pretraining_page.draw(result, tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()


def test_decimals(tmp_path):
    import decimals
    import table

    command = ["--data", "prototypes:validation", "--quick", "--potential", "chgnet", "--out", str(tmp_path)]
    assert decimals.main(command) == 0
    made, *rows = only_result(tmp_path)["rows"]
    assert made["text"] == "made symmetric"
    assert [tuple(row["decimals"]) for row in rows[:-1]] == list(decimals.DECIMALS)
    assert rows[-1]["text"] == "P1" and rows[-1]["tokens"] > rows[0]["tokens"] > 10
    by_coordinates = {row["decimals"][0]: row["moved"]["most"] for row in rows[:-1]}
    assert by_coordinates[4] <= by_coordinates[3] <= by_coordinates[2] < 0.5
    assert "| symmetry | 2, 2, 1 |" in table.rendered(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of the symmetry form that was hardly trained."""
    from jaxcrystal.config import Recipe, load
    from jaxcrystal.training.loop import train

    folder = tmp_path_factory.mktemp("models") / "tiny"
    shape = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=1", "num_attention_heads=2"]
    shape += ["num_key_value_heads=2", "head_dim=16"]
    data = ["data.train=prototypes:validation", "data.tokens_per_row=512", "data.rows_per_batch=8"]
    data += ["mesh.data=1", "mesh.fsdp=1"]
    keys = [f"out={folder}", "text.form=symmetry", "tokenizer=compact-symmetry", "augment.translate=false"]
    train(load(Recipe, None, [*keys, *data, *(f"model.{one}" for one in shape), "steps=3", "log_every=2"]))
    return folder


def test_ground_states(tiny, tmp_path, monkeypatch):
    """Compounds on the hull, of formulas that are in train or are not; attempts that are the compound are found."""
    import ground_states
    import table

    from jaxcrystal.crystals import dataset
    from jaxcrystal.interface.tables import Attempts

    trained = dataset.load("mp20")
    formulas = trained.labels["pretty_formula"].to_pylist()
    (one,) = ground_states.ground_states("mp20", set(), 1, 0)
    labels = trained.attributes(trained.ids.index(one["material_id"]))
    lowest = min(
        trained.attributes(i)["formation_energy_per_atom"] for i, f in enumerate(formulas) if f == one["formula"]
    )
    assert labels["e_above_hull"] == 0 and labels["formation_energy_per_atom"] == lowest
    (other,) = ground_states.ground_states("mp20-test", set(formulas), 1, 0)
    assert other["formula"] not in formulas
    command = [str(tiny), "--count", "1", "--num", "3", "--out", str(tmp_path)]
    truth = one["structure"]
    monkeypatch.setattr(Attempts, "structures", lambda self: [None, truth, truth.copy().apply_strain(0.02)])
    assert ground_states.main(command) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [(row["ground_state"], row["first"]) for row in found["rows"]] == [(2, 2), (0, None)]
    assert [told["found"] for told in found["found"].values()] == [1, 0]
    assert f"| of train | {one['formula']} |" in table.rendered(tmp_path)


def test_worth(tiny, tmp_path):
    """What its log says of a model, and shares that are those of its evaluation."""
    import table
    import worth

    (tmp_path / "hull.csv").write_text("formula,formation_energy_per_atom\nNaCl,-2.1\n")
    elements = {s: {"energy": e, "composition": {s: 1}} for s, e in {"Na": -1.3225, "Cl": -1.8485}.items()}
    (tmp_path / "references.json").write_text(json.dumps(elements))
    command = [str(tiny), "--train", "prototypes:train", "--num", "4", "--validation", "prototypes:validation"]
    for name, place in {"work": "work", "hull": "hull.csv", "references": "references.json", "out": "out"}.items():
        command += [f"--{name}", str(tmp_path / place)]
    assert worth.main(command) == 0
    (path,) = (tmp_path / "out").iterdir()
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["model"], row["form"], row["steps"], row["settings"]) == ("tiny", "symmetry", 3, {})
    low, high = row["nats_interval"]
    assert low < row["nats"] < high and 100 < row["nats"] < 60 * np.log(700)  # hardly trained
    assert 3 * 8 < row["crystals_seen"] < 3 * 8 * 512 / 30 and row["step_seconds"] > 0
    drawn = pd.read_parquet(tmp_path / "work/tiny_4.parquet")
    assert row["tokens"] == drawn["tokens"].mean() and row["ok"] == (drawn["status"] == "ok").sum() == 4
    found = json.loads((tmp_path / "work/tiny_4/metrics.json").read_text())
    share, low, high = row["shares"]["validity.structural"]
    assert share == found["validity"]["structural"] and low <= share <= high
    times = {place: place.stat().st_mtime_ns for place in (tmp_path / "work").rglob("*")}
    assert worth.main(command) == 0  # nothing is done twice
    assert {place: place.stat().st_mtime_ns for place in (tmp_path / "work").rglob("*")} == times
    assert "| tiny | 4 |" in table.rendered(tmp_path / "out")
    assert worth.main([*command, "--title", "settings", "--temperature", "0.5", "--new"]) == 0
    (row,) = json.loads(next((tmp_path / "out").glob("settings_*.json")).read_text())["rows"]
    assert row["settings"] == {"temperature": 0.5, "new": True} and row["redraws"] >= 0
    cooler = pd.read_parquet(tmp_path / "work/tiny_4_temperature_0.5_new_True.parquet")
    assert list(cooler["text"]) != list(drawn["text"])
    assert "| tiny, temperature 0.5, new | 4 |" in table.rendered(tmp_path / "out")


def test_conditions(tiny, tmp_path):
    """Wishes of real crystals, by the prompt alone and with the grammar, beside crystals that nobody wished for."""
    import conditions
    import table

    command = [str(tiny), "--wishes", "prototypes:validation", "--num", "3", "--unconditional", "4", "--pairs", "1"]
    assert conditions.main([*command, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    (path,) = (tmp_path / "out").iterdir()
    rows = json.loads(path.read_text())["rows"]
    asked = ["formula", "elements", "spacegroup", "formula+elements"]
    assert [(row["asked"], row["grammar"]) for row in rows] == [(one, how) for one in asked for how in (False, True)]
    for row in rows:
        told = json.loads((tmp_path / f"work/tiny_{row['asked']}_{row['grammar']}/metrics.json").read_text())
        assert row["told"] == told["conditions"][row["asked"]] and row["attempts"] == 3
    with_grammar = {row["asked"]: row["told"] for row in rows if row["grammar"]}
    assert with_grammar["formula"]["formula"]["forced_rate"] == 1.0  # what a grammar sees to is no merit of the model
    assert "| tiny | formula+elements | grammar |" in table.rendered(tmp_path / "out")


@pytest.mark.slow
def test_prediction(tiny, tmp_path):
    """Real crystals' formulas, told the number of atoms and not; what is written is what the evaluations hold."""
    import prediction
    import table

    command = [str(tiny), "--truth", "prototypes:validation", "--train", "prototypes:train", "--quick"]
    assert prediction.main([*command, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 0
    rows = only_result(tmp_path / "out")["rows"]
    assert [row["num_atoms_given"] for row in rows] == [True, False]
    for row, name in zip(rows, ("with", "without"), strict=True):
        told = json.loads((tmp_path / f"work/tiny_{name}_atoms/metrics.json").read_text())
        assert row["prediction"] == told["prediction"] and row["truth"]["crystals"] == 3
        drawn = pd.read_parquet(tmp_path / f"work/tiny_{name}_atoms.parquet")
        assert list(drawn["rank"]) == [1, 2, 3, 4, 5] * 3
        sized = [json.loads(asked) for asked in drawn["asked"]]
        assert all(("num_atoms" in asked) == row["num_atoms_given"] for asked in sized)
    assert "| tiny | not given | all | 3 |" in table.rendered(tmp_path / "out")


def test_stated_groups(tmp_path):
    """Of three crystals one has the stated group, one more symmetry, one less."""
    import stated_groups
    import table

    from jaxcrystal.crystals import dataset
    from jaxcrystal.crystals.symmetry import symmetrize

    cell = [4.0, 4.0, 4.0], [90.0, 90.0, 90.0]
    salt = Crystal(*cell, [3, 8], [[0, 0, 0], [0.5, 0.5, 0.5]])
    off = Crystal(*cell, [3, 8], [[0, 0, 0], [0.5, 0.5, 0.45]])
    crystals = [salt, salt, off]
    rows = {"index": [0, 1, 2, 3], "status": ["ok"] * 3 + ["truncated"], "written_group": [221, 215, 221, None]}
    pd.DataFrame(rows | {"cif": [*(one.to_cif() for one in crystals), None]}).to_parquet(tmp_path / "x.parquet")
    (tmp_path / "report").mkdir()
    relaxed = pd.DataFrame({"id": ["0", "2", "3"], "relaxed_cif": [salt.to_cif(), salt.to_cif(), None]})
    relaxed.to_parquet(tmp_path / "report/structures.parquet")
    out = tmp_path / "out"
    assert stated_groups.main([str(tmp_path / "x.parquet"), str(tmp_path / "report"), "--out", str(out)]) == 0
    (path,) = out.iterdir()
    sampled, _, after, _ = json.loads(path.read_text())["rows"]
    assert (sampled["crystals"], sampled["more_symmetric"], sampled["groups"]) == (3, pytest.approx(1 / 3), 2)
    assert sampled["equal"] == pytest.approx(1 / 3) and sampled["evenly"] == pytest.approx(1 / 4)
    assert (after["crystals"], after["equal"]) == (2, 1.0)
    assert "| relaxed | 0.01 | 2 | 100.0 % (" in table.rendered(out)
    trained = dataset.CrystalSet.from_crystals(["salt"], [salt], [{}])
    dataset.store(trained, tmp_path / "train.parquet", {}, [symmetrize(salt)])
    command = [str(tmp_path / "x.parquet"), f"--train={tmp_path / 'train.parquet'}", f"--out={out}"]
    assert stated_groups.main(command) == 0
    apart = {row["crystals_are"]: row for row in json.loads(path.read_text())["rows"] if row["symprec"] == 0.1}
    assert apart["as sampled, none in training"]["crystals"] == 1  # 215
    assert apart["as sampled, 1 to 9 in training"]["equal"] == 0.5 and len(apart) == 3


@pytest.mark.slow
def test_likelihood(tiny, tmp_path):
    """Shares of the likeliest are those that `sample --keep` keeps, and their rates those of their own evaluation."""
    import likelihood
    import table
    from scipy.stats import spearmanr

    import jaxcrystal
    from jaxcrystal.sampling.sampling import sample

    (tmp_path / "hull.csv").write_text("formula,formation_energy_per_atom\nNaCl,-2.1\n")
    elements = {s: {"energy": e, "composition": {s: 1}} for s, e in {"Na": -1.3225, "Cl": -1.8485}.items()}
    (tmp_path / "references.json").write_text(json.dumps(elements))
    command = [str(tiny), "--train", "prototypes:train", "--others", "prototypes:validation", "--quick"]
    for name, place in {"work": "work", "hull": "hull.csv", "references": "references.json", "out": "out"}.items():
        command += [f"--{name}", str(tmp_path / place)]
    assert likelihood.main(command) == 0
    result = only_result(tmp_path / "out")
    assert set(result["sets"]) == {"tiny", "prototypes:validation"}
    assert [(row["share"], row["by"]) for row in result["kept"][:3]] == [
        (1.0, "total"),
        (0.75, "total"),
        (0.75, "token"),
    ]
    (half,) = (row for row in result["kept"] if (row["share"], row["by"]) == (0.5, "atom"))
    report = sample(tiny, 4, tmp_path / "half.parquet", seed=0, keep=0.5, keep_by="atom")
    found = jaxcrystal.evaluate(report.out, tmp_path / "half", train="prototypes:train").metrics
    assert half["crystals"] == found["counts"]["constructed"] == 2
    assert half["rates"]["validity.structural"][0] == found["validity"]["structural_of_kept"]
    assert half["rates"]["validity.compositional"][0] == found["validity"]["compositional_of_kept"]
    assert "| tiny, the likeliest 50 % by atom | 2 |" in table.rendered(tmp_path / "out")

    columns = {"log_probability": [-9.0, -3.0, -6.0, None], "log_probability_per_token": [-0.3, -0.2, -0.1, None]}
    columns |= {"num_atoms": [2, 3, 4, 5], "e_above_hull": [0.3, 0.1, 0.2, 0.0]}
    told = likelihood.correlations(pd.DataFrame(columns))
    assert told["placed"] == 3 and told["correlation"]["total"][0] == 1.0
    assert likelihood.correlations(pd.DataFrame(columns).iloc[2:]) == {"placed": 1, "correlation": None}
    assert told["correlation"]["token"][0] == spearmanr([0.3, 0.2, 0.1], [0.3, 0.1, 0.2]).statistic == 0.5
