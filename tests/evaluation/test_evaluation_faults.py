"""What goes wrong with crystals, potentials and processes, all in one evaluation: nothing is lost, all is counted."""

import json
import os
import signal
import threading
import time

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from jaxcrystal.evaluation.evaluation import evaluate
from jaxcrystal.evaluation.table import read_table
from jaxcrystal.relaxation.batch import RelaxationSettings, RelaxationStatus
from jaxcrystal.relaxation.potentials import load_potential
from jaxcrystal.relaxation.relaxations import relax_all
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


class Poison(Structure):
    """Kills the process that it is sent to."""

    def __reduce_ex__(self, protocol):
        return _die, (os.getpid(),)


def _die(sender: int):
    assert os.getpid() != sender
    os.kill(os.getpid(), signal.SIGKILL)


def crystals(count: int) -> list[Structure]:
    return [pair(4.0 + 0.05 * i, "Cs", "Cl", (0.5, 0.5, 0.45)) for i in range(count)]


@pytest.mark.slow
def test_a_crystal_that_kills_its_process_costs_itself(tmp_path):
    potential, given = load_potential("chgnet", "cpu"), crystals(5)
    given.insert(2, Poison.from_sites(pair(3.9, "Cs", "Cl").sites))
    with local(2) as workers:
        found = relax_all(given, potential, workers=workers, cache_dir=tmp_path, progress=False)
    assert [r.status for r in found] == [
        RelaxationStatus.CRASHED if i == 2 else RelaxationStatus.CONVERGED for i in range(6)
    ]
    assert len((tmp_path / "relaxations.jsonl").read_text().splitlines()) == 5  # the next run tries it again
    alone = relax_all(crystals(5), potential, progress=False)
    np.testing.assert_allclose([r.energy for i, r in enumerate(found) if i != 2], [r.energy for r in alone], atol=1e-5)


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_nothing(tmp_path):
    potential = load_potential("chgnet", "cpu")
    settings = RelaxationSettings(fmax=0.005)
    killed = []
    with local(2) as workers:

        def strike():
            while not (pids := list(workers.executor._pids.values())):
                time.sleep(0.05)
            time.sleep(1.5)  # it reads the potential or relaxes
            os.kill(pids[0], signal.SIGKILL)
            killed.append(pids[0])

        striker = threading.Thread(target=strike)
        striker.start()
        found = relax_all(crystals(12), potential, settings, workers=workers, cache_dir=tmp_path, progress=False)
        striker.join()
        assert killed and killed[0] not in workers.executor._pids.values()
    assert [r.status for r in found] == [RelaxationStatus.CONVERGED] * 12
