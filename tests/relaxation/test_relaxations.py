"""Many relaxations in processes: each is stored when it ends, and a death costs what was in work and no more."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from jaxcrystal.errors import UserError
from jaxcrystal.relaxation import relaxations
from jaxcrystal.relaxation.batch import Relaxation, RelaxationSettings, RelaxationStatus
from jaxcrystal.relaxation.potentials import Potential, PotentialCard, load_potential
from jaxcrystal.relaxation.relaxations import potential_card, relax_all
from jaxcrystal.workers import local

SETTINGS = RelaxationSettings(fmax=0.005)


def crystals(count: int) -> list[Structure]:
    """Caesium chloride in cells of different size, which take different numbers of steps."""
    positions = [[0, 0, 0], [0.5, 0.5, 0.45]]
    return [Structure(Lattice.cubic(4.0 + 0.05 * i), ["Cs", "Cl"], positions) for i in range(count)]


class Poison(Structure):
    """Kills the process that it is sent to."""

    def __reduce_ex__(self, protocol):
        return _die, (os.getpid(),)


def _die(sender: int):
    assert os.getpid() != sender
    os.kill(os.getpid(), signal.SIGKILL)


def keys(folder: Path) -> list[str]:
    return [json.loads(line)["key"] for line in (folder / "relaxations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet", "cpu")


@pytest.mark.slow
def test_a_crystal_that_kills_its_process_costs_itself(chgnet, tmp_path):
    given = crystals(5)
    given.insert(2, Poison.from_sites(crystals(1)[0].scale_lattice(60).sites))
    with local(2) as workers:
        found = relax_all(given, chgnet.card, workers=workers, cache_dir=tmp_path, progress=False)
    assert [r.status for r in found] == [
        RelaxationStatus.CRASHED if i == 2 else RelaxationStatus.CONVERGED for i in range(6)
    ]
    assert len(set(keys(tmp_path))) == len(keys(tmp_path)) == 5  # the next run tries the sixth again
    alone = relax_all(crystals(5), chgnet, progress=False)
    np.testing.assert_allclose([r.energy for i, r in enumerate(found) if i != 2], [r.energy for r in alone], atol=1e-5)


def children() -> list[int]:
    """Processes of ours that work."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z" and b"worker_process" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_what_was_in_work(chgnet, tmp_path, monkeypatch):
    killed, append = [], relaxations._Store.append

    def strike(store, key, relaxation):
        append(store, key, relaxation)
        if len(keys(tmp_path)) == 2:
            killed.extend(children())
            os.kill(*killed, signal.SIGKILL)

    monkeypatch.setattr(relaxations._Store, "append", strike)
    with local(1) as workers:
        found = relax_all(crystals(8), chgnet, SETTINGS, workers=workers, cache_dir=tmp_path, progress=False)
        assert killed and not set(killed) & set(children())
    assert [r.status for r in found] == [RelaxationStatus.CONVERGED] * 8
    assert len(set(keys(tmp_path))) == len(keys(tmp_path)) == 8  # none was relaxed a second time


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_relaxations import SETTINGS, crystals, local, potential_card, relax_all, relaxations

append = relaxations._Store.append

def strike(store, key, relaxation):
    append(store, key, relaxation)
    if len(store.path.read_text().splitlines()) == 3:
        assert "torch" not in sys.modules
        os.kill(os.getpid(), 9)

relaxations._Store.append = strike
with local(1) as workers:
    card = potential_card("chgnet", workers)
    relax_all(crystals(8), card, SETTINGS, workers=workers, cache_dir=sys.argv[2], progress=False)
"""


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_all_that_had_ended(chgnet, tmp_path, monkeypatch):
    """A script without a guard, killed in the middle of its one lot; torch was never in its process."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(set(keys(tmp_path))) == 3
    begun = []

    def spy(structures, potential, settings):
        begun.extend(structures)
        return iter((i, Relaxation(RelaxationStatus.FAILED, "spy")) for i in range(len(begun)))

    monkeypatch.setattr(relaxations, "relax_together", spy)
    found = relax_all(crystals(8), chgnet, SETTINGS, cache_dir=tmp_path, progress=False)
    assert len(begun) == 5 and sum(r.converged for r in found) == 3


def test_a_card_is_the_potential_without_its_means(chgnet, monkeypatch):
    with local(1) as workers:
        card = potential_card("chgnet", workers)
        assert type(card) is PotentialCard and card == chgnet.card
        assert (card.reference, card.atoms_at_once) == (chgnet.reference, chgnet.atoms_at_once)
        with pytest.raises(UserError, match="nowhere is no potential"):
            potential_card("nowhere", workers)
    assert potential_card("chgnet", None) == chgnet
    # Without processes the card is enough too: the potential is loaded here, once.
    loads = []
    monkeypatch.setattr(relaxations, "_LOADED", {})
    monkeypatch.setattr(relaxations, "load_potential", lambda *names: loads.append(names) or chgnet)
    for _ in range(2):
        (found,) = relax_all(crystals(1), card, RelaxationSettings(max_steps=0), progress=False)
        assert found.energy == pytest.approx(chgnet.energies(crystals(1))[0], abs=1e-5)
    assert loads == [("chgnet", "cpu")] and isinstance(chgnet, Potential)


@pytest.mark.parametrize("device", ["cpu", None])
def test_a_worker_loads_a_potential_once(chgnet, monkeypatch, device):
    """Whether for its card or to relax: asked for by a device, or for whichever there is."""
    loads = []
    monkeypatch.setattr(relaxations, "_LOADED", {})
    monkeypatch.setattr(relaxations, "load_potential", lambda *names: loads.append(names) or chgnet)
    assert list(relaxations._cards(["chgnet"])) == [(0, chgnet.card)]
    list(relaxations._relax_in_process("chgnet", device, chgnet.sha256, SETTINGS, []))
    assert loads == [("chgnet", None)]
    with pytest.raises(UserError, match="changed while it was in use"):
        relaxations._relax_in_process("chgnet", device, "other", SETTINGS, [])
