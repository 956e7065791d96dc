"""Rounds from end to end: the same result however often they are killed, and what cannot be run said in one line."""

import shutil

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from random_models import model_of

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.config import LoraConfig, Recipe, from_dict
from jaxcrystal.crystals import dataset
from jaxcrystal.errors import UserError
from jaxcrystal.improvement import rounds
from jaxcrystal.improvement.pool import join, pair
from jaxcrystal.improvement.recipe import Improvement
from jaxcrystal.improvement.story import title
from jaxcrystal.sampling.sampling import sample

TRAINING = ["steps=2", "optimizer.warmup_steps=1", "data.rows_per_batch=2", "data.tokens_per_row=256"]
TRAINING += ["data.validation_rows=2", "checkpoint_every=1", "mesh.data=1", "mesh.fsdp=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dozen crystals, prepared."""
    folder = tmp_path_factory.mktemp("data")
    few = jaxcrystal.read("mp20-val", limit=12)
    jaxcrystal.prepare({"few": few}, folder)
    return folder / "few.parquet"


def recipe(data, out, **changes) -> Improvement:
    settings = {
        "model": "mini",
        "out": str(out),
        "train": str(data),
        "validation": str(data),
        "rounds": 2,
        "sampling": {"num": 3, "temperature": 0.5},
        "selection": {"low": -0.1, "high": 5.0, "phases_of_system": 0},
        "judging": {"num": 2},
        "training": TRAINING,
    }
    return from_dict(Improvement, settings | changes)


@pytest.mark.slow
def test_the_same_however_often_it_is_killed(data, tmp_path, monkeypatch, capsys):
    whole = rounds.improve(recipe(data, tmp_path / "whole"))
    told = capsys.readouterr().err
    assert "note: round 2 of 2: 3 attempts to draw and relax, then training; the last one took" in told
    kills = 0

    def killing(verb):
        """Does its work, and then dies, each second time."""
        calls = []

        def killed(*arguments, **options):
            done = verb(*arguments, **options)
            calls.append(done)
            if len(calls) % 2:
                raise KeyboardInterrupt
            return done

        return killed

    for name in ("sample", "evaluate", "keep", "join", "train"):
        monkeypatch.setattr(rounds, name, killing(getattr(rounds, name)))
    while True:
        try:
            found = rounds.improve(recipe(data, tmp_path / "killed", rounds=1))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills >= 5
    stories = [story[(story["round"] < 2) & (story["quantity"] != "seconds")] for story in (whole, found)]
    pd.testing.assert_frame_equal(*(story.reset_index(drop=True) for story in stories))
    for name in ("train.parquet", "model/synthetic.parquet"):
        one, other = (pq.read_table(tmp_path / out / "round_1" / name) for out in ("whole", "killed"))
        assert one.equals(other) and len(one)
    # What the story says is what lies there.
    sizes = whole[whole["quantity"] == "trained_on"].set_index("round")["value"]
    kept = [len(pq.read_table(tmp_path / f"whole/round_{n}/kept/kept.parquet")) for n in (1, 2)]
    assert sizes.tolist() == [12, 12 + kept[0], 12 + sum(kept)] and min(kept) >= 0
    synthetic = pq.read_table(tmp_path / "whole/round_2/model/synthetic.parquet")["material_id"].to_pylist()
    assert all(name.startswith(("round1-", "round2-")) for name in synthetic) and len(synthetic) == sum(kept)
    # The last model is one like any other.
    shutil.move(tmp_path / "whole/round_2/model", tmp_path / "model")
    with jaxcrystal.load(tmp_path / "model") as sampler:
        drawn = sampler.sample(2, seed=3)
    sample(tmp_path / "model", 2, tmp_path / "samples.parquet", seed=3)
    # Its ledgers, and its attempts, know what it was trained on, its own crystals included.
    for samples in (drawn, tmp_path / "samples.parquet"):
        judged = jaxcrystal.evaluate(samples)
        assert judged.metrics["inputs"]["train"]["rows"] == 12 + sum(kept)
        note = f"drawn by round 2 of {tmp_path}/whole: judged by train {data} and {tmp_path}/model/synthetic.parquet\n"
        assert note in capsys.readouterr().err


def test_a_joined_set_has_all_rows_but_those_without_symmetry(data, tmp_path):
    table = pq.read_table(data)
    place = table.column_names.index("symmetry.space_group")
    column = table.schema.field(place)
    groups = pa.array([None, *table["symmetry.space_group"].to_pylist()[1:]], column.type)
    pq.write_table(table.set_column(place, column, [groups]), tmp_path / "some.parquet")
    own = table.slice(0, 3).append_column("hardness", [[1.0, 2.0, 3.0]])
    pq.write_table(own, tmp_path / "own.parquet")
    assert join([data, tmp_path / "some.parquet", tmp_path / "own.parquet"], tmp_path / "all.parquet") == 1
    joined = pq.read_table(tmp_path / "all.parquet")
    ids = table["material_id"].to_pylist()
    assert joined["material_id"].to_pylist() == [*ids, *ids[1:], *ids[:3]]
    assert joined["hardness"].to_pylist() == [None] * 23 + [1.0, 2.0, 3.0]
    assert joined.slice(0, 12).select(table.column_names).equals(table.combine_chunks())
    assert len(dataset.load(tmp_path / "all.parquet")) == 26
    pq.write_table(table.drop_columns(["symmetry.space_group"]), tmp_path / "broken.parquet")
    with pytest.raises(UserError, match=r"broken\.parquet is no set with symmetry"):
        join([tmp_path / "broken.parquet"], tmp_path / "more.parquet")


def test_pairs_are_of_what_was_kept_and_what_lay_too_high(data, tmp_path):
    """As they were drawn; each of the fewer as often as another; and a model can be trained on them."""
    rows = jaxcrystal.read("mp20-val", limit=12).rows
    verdicts = ["kept"] * 2 + ["too_high"] * 6 + ["known"] * 4
    table = pd.DataFrame({"id": [row.id for row in rows], "cif": [row.crystal.to_cif() for row in rows]})
    table.assign(verdict=verdicts).to_csv(tmp_path / "verdicts.csv", index=False)
    found = pd.read_parquet(pair(table, tmp_path, 3))
    assert sorted(found["dispreferred"]) == sorted(table["id"][2:8])
    assert found["preferred"].value_counts().to_dict() == {name: 3 for name in table["id"][:2]}
    attempts = dataset.load(tmp_path / "pairs/attempts.parquet")
    assert set(attempts.ids) == set(table["id"][:8])
    assert not pd.read_parquet(pair(table, tmp_path, 4)).equals(found)
    settings = {"base": "mini", "out": str(tmp_path / "model"), "data.validation": str(data), "data.accumulate": 1}
    settings |= {"data.train": str(tmp_path / "pairs/attempts.parquet")}
    settings |= {"preferences.pairs": str(tmp_path / "pairs/pairs.parquet"), "text.form": "symmetry"}
    words = [f"{key}={value}" for key, value in settings.items()]
    assert jaxcrystal.train("mini_finetune", [*words, *TRAINING]).steps == 2
    table.assign(verdict="kept").to_csv(tmp_path / "verdicts.csv", index=False)
    with pytest.raises(UserError, match="12 attempts were kept and 0 lay too high; no pairs"):
        pair(table, tmp_path, 3)


def test_what_cannot_be_run_is_told_before_anything_is_drawn(data, tmp_path, capsys):
    random = model_of("symmetry", "compact-symmetry", tmp_path / "random")
    cases = {
        "chgnet would judge the crystals that it selects": {"judging": {"potential": "chgnet"}},
        "has no recipe.yaml": {"model": str(random)},
        "is not a model directory": {"model": str(tmp_path / "none")},
    }
    for words, changes in cases.items():
        with pytest.raises(UserError, match=words):
            rounds.improve(recipe(data, tmp_path / "out", **changes))
    assert main(["improve", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml" in capsys.readouterr().err


def test_a_round_that_keeps_none_says_what_became_of_all(data, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "sample", lambda *arguments, **options: None)
    monkeypatch.setattr(rounds, "evaluate", lambda *arguments, **options: None)
    table = pd.DataFrame({"id": ["1", "2"], "row": [0, 1], "outcome": ["truncated", "ok"], "formula": [None, "NaCl"]})
    table = table.assign(
        structural_valid=[False, True], compositional_valid=True, converged=[False, True], spacegroup_relaxed=225,
        num_elements=2, phases_of_system=5, e_above_hull=0.5, novel_relaxed=True, group_relaxed=[0, 1],
    )  # fmt: skip
    monkeypatch.setattr(rounds.results, "read", lambda folder: type("Results", (), {"table": table}))
    one = rounds.Round(recipe(data, tmp_path, selection={}), 0, None, (data,), data, 0).next()
    with pytest.raises(UserError, match=r"round 1 keeps none of its 2 attempts \(1 no_crystal, 1 too_high\)"):
        one.run(rounds.Round(recipe(data, tmp_path), 0, None, (data,), data, 0))
    assert list(pd.read_csv(tmp_path / "round_1/verdicts.csv")["verdict"]) == ["no_crystal", "too_high"]


def test_another_improvement_in_the_same_folder_is_refused(data, tmp_path):
    (tmp_path / "recipe.yaml").write_text("rounds: 1\nseed: 5\n")
    with pytest.raises(UserError, match="holds an improvement whose train is mp20, not"):
        rounds.improve(recipe(data, tmp_path, rounds=3))


def test_the_title_says_who_judges(data, tmp_path):
    assert "not judged" in title(recipe(data, tmp_path))
    other = recipe(data, tmp_path, judging={"potential": "models/M3GNet"})
    assert title(other) == "mini, improved by what chgnet selects, judged by M3GNet"
    same = recipe(data, tmp_path, judging={"potential": "chgnet", "judge_selects": True})
    assert "which judges too" in title(same)


def test_what_the_first_round_costs_is_told_by_what_judging_took(data, tmp_path):
    (tmp_path / "round_0").mkdir()
    (tmp_path / "round_0/seconds.json").write_text('{"judge": 90}')
    judged = recipe(data, tmp_path, judging={"potential": "M3GNet", "num": 3}, sampling={"num": 9})
    (told,) = rounds._cost(judged, [rounds.Round(judged, 0, None, (data,), data, 0)])
    assert told == (
        "round 1 of 2: 9 attempts to draw and relax, 3 more to be judged, then training; but for the training some "
        "6 minutes, as judging the model took 90 s"
    )


def test_pairs_teach_no_base_what_its_adapters_have_learnt():
    recipe = Improvement(model="runs/mine", teaching="preferences")
    with pytest.raises(UserError, match="runs/mine has adapters, which each round trains anew: merge them"):
        rounds._check_teaching(recipe, Recipe(base="models/x", lora=LoraConfig()))
    rounds._check_teaching(recipe, Recipe())
    rounds._check_teaching(Improvement(model="runs/mine"), Recipe(base="models/x", lora=LoraConfig()))
