"""What the evaluator writes of stability: counts beside the rates, and what was compared with known energies."""

import json

import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from test_evaluation import CLOSE, SALT, rock_salt

from jaxcrystal.evaluation.evaluation import evaluate, summary
from jaxcrystal.evaluation.metrics import FEW, metrics_from_table
from jaxcrystal.evaluation.table import read_table
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull

REFERENCES = ElementReferences({"Na": -1.31, "Cl": -1.84, "K": -1.11, "Br": -1.65})


@pytest.fixture
def hull(tmp_path):
    """A hull file that holds no phase of Na-Br, two of Na-Cl."""
    (tmp_path / "h.csv").write_text("formula,formation_energy_per_atom\nNaCl,-2.03\nNaCl3,-0.6\nKBr,-2.03\n")
    Hull.from_table(tmp_path / "h.csv", REFERENCES).write(tmp_path / "hull.parquet")
    return tmp_path / "hull.parquet"


def written(path, structures):
    pd.DataFrame({"cif": [str(CifWriter(s)) for s in structures]}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize("with_hull", [False, True])
def test_a_set_without_a_valid_crystal_has_its_outcomes(tmp_path, hull, with_hull):
    samples = written(tmp_path / "samples.csv", [CLOSE, CLOSE])
    metrics = evaluate(samples, tmp_path / "out", potential="chgnet", hull=[hull] if with_hull else [])
    assert metrics["counts"]["relaxations"] == {"invalid": 2} and metrics["counts"]["relaxed"] == 0
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())
    table, provenance = read_table(tmp_path / "out/structures.parquet")
    assert metrics == metrics_from_table(table, provenance)
    assert list(table["relaxation"]) == ["invalid"] * 2
    if with_hull:
        assert metrics["stability"]["metastable_rate"] == 0.0 and metrics["counts"]["placed"] == 0


def test_a_set_without_a_valid_crystal_and_crystals_to_label(tmp_path):
    samples = written(tmp_path / "samples.csv", [CLOSE])
    metrics = evaluate(samples, tmp_path / "out", potential="chgnet", hull=[written(tmp_path / "known.csv", [SALT])])
    assert metrics["counts"]["placed"] == 0 and metrics["stability"]["stable_rate"] == 0.0


def test_phases_of_the_system_are_counted_and_the_scale_is_stated(tmp_path, hull):
    molecule = Structure(Lattice.cubic(12), ["Na", "Cl"], [[0, 0, 0], [0.2, 0, 0]])
    crystals = [SALT, rock_salt("Na", "Br", 5.97), rock_salt("K", "Br", 6.6), molecule]
    out = tmp_path / "out"
    metrics = evaluate(written(tmp_path / "s.csv", crystals), out, potential="chgnet", hull=[hull], max_steps=50)
    counts = metrics["counts"]
    table, _ = read_table(out / "structures.parquet")
    assert table["phases_of_system"].tolist()[:3] == [2, 0, 1] and pd.isna(table["phases_of_system"].iloc[3])
    assert table["competing_phases"].tolist()[:3] == [2, 0, 1]
    assert (counts["placed"], counts["no_phase_of_system"], counts["few_phases_of_system"]) == (3, 1, 2)
    # NaBr is placed against elements only, so it lies far below: it counts as neither stable nor metastable.
    assert table["relaxation"].iloc[1] == "far_below_hull" and counts["relaxations"]["far_below_hull"] == 1
    assert table["relaxation"].iloc[3] == "isolated" and counts["relaxations"]["isolated"] == 1
    assert counts["metastable_and_no_phase_of_system"] == 0 and counts["metastable"] == 2
    assert metrics["versions"]["hull scale"].startswith("checked: 2 compounds of known formation energy")
    assert "potential not checked" not in metrics["versions"]
    lines = summary(metrics)
    assert "1 of 3 placed" in lines and f"2 where it knows fewer than {FEW}" in lines


def test_a_table_of_an_earlier_version_has_no_such_counts(tmp_path, hull):
    evaluate(written(tmp_path / "s.csv", [SALT]), tmp_path / "out", potential="chgnet", hull=[hull], max_steps=1)
    table, provenance = read_table(tmp_path / "out/structures.parquet")
    older = metrics_from_table(table.drop(columns=["phases_of_system", "competing_phases"]), provenance)
    assert (
        "placed" not in older["counts"]
        and older["stability"].keys() == metrics_from_table(table, provenance)["stability"].keys()
    )
