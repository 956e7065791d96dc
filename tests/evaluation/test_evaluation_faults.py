"""What goes wrong with crystals and potentials, all in one evaluation: nothing is lost, all is counted."""

import json

import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.evaluation.evaluation import evaluate
from jaxcrystal.evaluation.table import read_table
from jaxcrystal.workers import local


def pair(length, a, b, at=(0.5, 0.5, 0.5)):
    return Structure(Lattice.cubic(length), [a, b], [[0, 0, 0], at])


#: Name, crystal, and what becomes of its reading and relaxation.
CRYSTALS = {
    "sound": (pair(4.2, "Cs", "Cl"), "ok", "converged"),
    "diverges": (pair(2.0, "Cs", "Cl"), "ok", "diverged"),  # the volume explodes
    "coincident": (pair(4.2, "Cs", "Cl", (0, 0, 0)), "ok", "invalid"),  # and so not relaxed
    "large": (pair(4.2, "Cs", "Cl") * (6, 5, 5), "ok", "converged"),  # 300 atoms, more than a batch takes
    "unknown": (pair(4.2, "Cs", "Po"), "ok", "unknown_element"),
    "lonely": (Structure(Lattice.cubic(14), ["Na"], [[0, 0, 0]]), "ok", "isolated"),
    "broken": (None, "cif_error", "no_crystal"),
    "empty": ("", "missing", "no_crystal"),
}


@pytest.mark.slow
def test_nothing_is_lost_and_all_is_counted(tmp_path):
    def cif(crystal):
        return str(CifWriter(crystal)) if isinstance(crystal, Structure) else "data_x\nloop_" if crystal is None else ""

    rows = {name: cif(crystal) for name, (crystal, *_) in CRYSTALS.items()}
    pd.DataFrame({"material_id": rows.keys(), "cif": rows.values()}).to_csv(tmp_path / "samples.csv", index=False)
    with local(2) as workers:
        metrics = evaluate(tmp_path / "samples.csv", tmp_path / "out", potential="chgnet", workers=workers)
    table, _ = read_table(tmp_path / "out/structures.parquet")
    assert list(table["id"]) == list(CRYSTALS)
    for row in table.itertuples():
        _, outcome, relaxation = CRYSTALS[row.id]
        assert (row.outcome, row.relaxation) == (outcome, relaxation), row.id
        assert relaxation == "converged" or row.reason or row.relaxation_reason or row.invalid_because
    counts = metrics["counts"]
    assert counts["attempts"] == sum(counts["outcomes"].values()) == len(CRYSTALS)
    assert sum(counts["relaxations"].values()) == len(CRYSTALS)
    large, small = (table.set_index("id").loc[name] for name in ("large", "sound"))
    assert large["num_atoms"] == 300
    assert large["energy_per_atom"] == pytest.approx(small["energy_per_atom"], abs=1e-3)
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())
