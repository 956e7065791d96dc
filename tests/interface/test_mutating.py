"""Mutations: the same element of the same crystal, in three ways, each by its own odds; made, judged and compared."""

import json

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from random_models import model_of, without_infilling

import jaxcrystal
from jaxcrystal.cli import main
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.crystals.radii import similar
from jaxcrystal.crystals.substitution import alike, swapped, volumes
from jaxcrystal.errors import UserError
from jaxcrystal.interface.mutating import make
from jaxcrystal.sampling.mutation import KINDS, mutated, mutations

SALT = Structure(Lattice.from_parameters(4.02, 4.02, 4.02, 60, 60, 60), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
CESIUM = Structure.from_spacegroup("Pm-3m", Lattice.cubic(4.1), ["Cs", "Cl"], [[0] * 3, [0.5] * 3])
ARGON = Structure(Lattice.cubic(4.0), ["Ar"], [[0, 0, 0]])  # whose volume is not known


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_of("symmetry", "compact-symmetry", tmp_path_factory.mktemp("model"))


def test_each_kind_by_its_own_odds():
    crystal = jaxcrystal.read(SALT).rows[0].crystal
    logs = np.log(np.random.default_rng(0).dirichlet(np.full(118, 0.2)))
    planned = mutations([crystal], 2000, alike(0.1), 3)
    assert {mutation.element for mutation in planned} == {"Na", "Cl"}
    sodium = [mutation for mutation in planned if mutation.element == "Na"]
    assert abs(len(sodium) - 1000) < 5 * np.sqrt(500)
    lone = jaxcrystal.read(CESIUM).rows[0].crystal  # no ion is as large as that of Cs
    assert {mutation.element for mutation in mutations([lone], 50, alike(0.1), 3)} == {"Cl"}
    others = [symbol for symbol in volumes() if symbol not in ("Na", "Cl")]
    odds = {
        "language": {symbol: np.exp(logs[ATOMIC_NUMBER[symbol] - 1]) for symbol in others},
        "radius": {symbol: 1.0 for symbol in similar("Na", 0.1) if symbol in others},
        "random": dict.fromkeys(others, 1.0),
    }
    for kind in KINDS:
        rows = [mutated(each, "a", crystal, kind, alike(0.1), logs, 3) for each in sodium]
        assert all(row.status == "ok" and row.crystal == swapped(crystal, row.swaps) for row in rows)
        drawn = [row.swaps["Na"] for row in rows]
        weights = np.array(list(odds[kind].values()))
        expected = len(rows) * weights / weights.sum()
        counts = np.array([drawn.count(symbol) for symbol in odds[kind]])
        assert counts.sum() == len(rows)
        common = expected > 5
        spread = ((counts - expected)[common] ** 2 / expected[common]).sum()
        assert spread < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_all_kinds_change_the_same_element(model, capsys):
    few = dataset.load("mp20-test").first(12)
    crystals = {few.ids[i]: few.crystal(i) for i in range(12)} | {"argon": ARGON, "nothing": None}
    with jaxcrystal.load(model) as sampler:
        made = make(sampler, crystals, 2, seed=1, tolerance=0.1)
        again = make(sampler, crystals, 2, seed=1, tolerance=0.1)
        other = make(sampler, crystals, 2, seed=2, tolerance=0.1)
    assert "note: 1 of 14 rows of crystals are no crystal, and not mutated" in capsys.readouterr().err
    assert list(made) == list(KINDS) and all(len(attempts) == 26 for attempts in made.values())
    for rows in zip(*(made[kind].rows for kind in KINDS), strict=True):
        assert len({(row.index, row.template) for row in rows}) == 1
        changed = {tuple(row.swaps) for row in rows if row.swaps is not None}
        assert len(changed) <= 1
    assert {row.status for row in made["random"].rows[24:]} == {"no_swap"}
    assert [row.swaps for row in made["language"]] == [row.swaps for row in again["language"]]
    assert [row.swaps for row in made["language"]] != [row.swaps for row in other["language"]]


@pytest.mark.slow
def test_the_command(model, tmp_path, capsys):
    structures = [SALT, CESIUM]
    table = pd.DataFrame({"material_id": ["salt", "cscl"], "cif": [s.to(fmt="cif") for s in structures]})
    table.to_csv(tmp_path / "two.csv", index=False)
    out = tmp_path / "out"
    options = ["--workers", "0", "--max-steps", "1", "--train", str(tmp_path / "two.csv")]
    assert main(["mutate", str(tmp_path / "two.csv"), "--model", str(model), "--out", str(out), *options]) == 0
    told = capsys.readouterr().out
    assert "Metastable" in told and all(kind in told for kind in KINDS)
    for kind in KINDS:
        rows = pd.read_parquet(out / f"{kind}.parquet")
        assert list(rows["template"]) == ["salt", "cscl"] and set(rows["status"]) == {"ok"}
        metrics = json.loads((out / kind / "metrics.json").read_text())
        assert metrics["counts"]["attempts"] == 2 and metrics["counts"]["relaxed"] == 2
        assert metrics["novelty"]["by_matching"] == 1.0
    assert (out / "comparison/comparison.csv").exists()


@pytest.mark.parametrize(
    ("crystals", "change", "message"),
    [
        ([SALT], {"num": 0}, "num is 0; it must be at least 1"),
        ([SALT], {"seed": -1}, "seed is -1; it must be at least 0"),
        ([SALT], {"tolerance": -0.1}, r"the tolerance is -0\.1 Å"),
        ([None], {}, "crystals holds no crystal: its first row is missing"),
    ],
)
def test_what_cannot_be_done(model, crystals, change, message):
    asked = {"num": 1, "seed": 0, "tolerance": 0.1} | change
    with jaxcrystal.load(model) as sampler, pytest.raises(UserError, match=message):
        make(sampler, crystals, **asked)


def test_a_base_is_for_adapters(model, tmp_path, capsys):
    assert main(["mutate", "mp20-test", "--model", str(model), "--base", str(model), "--out", str(tmp_path / "x")]) == 1
    assert "has no adapters on a base, but weights of its own; leave the base" in capsys.readouterr().err


def test_a_model_that_was_not_trained_to(tmp_path, capsys):
    other = str(without_infilling(tmp_path / "other"))
    assert main(["mutate", "mp20-test", "--model", other, "--out", str(tmp_path / "x")]) == 1
    assert f"{other} was not trained to infill" in capsys.readouterr().err
