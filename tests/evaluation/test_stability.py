"""Stability rows: numbers against their parts, outcomes that are counted, a run that goes on where it stopped."""

import dataclasses
import json

import pytest
from pymatgen.core import Composition, Lattice, Structure

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation import stability
from jaxcrystal.evaluation.stability import StabilityOutcome, assess
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull
from jaxcrystal.relaxation import relaxations
from jaxcrystal.relaxation.batch import Relaxation, RelaxationSettings, RelaxationStatus, relax
from jaxcrystal.relaxation.potentials import load_potential
from jaxcrystal.relaxation.relaxations import relax_all
from jaxcrystal.workers import Lost, Workers, local


@pytest.fixture(scope="module")
def chgnet():
    return load_potential("chgnet")


@pytest.fixture(scope="module")
def hull(tmp_path_factory):
    path = tmp_path_factory.mktemp("hull") / "hull.csv"
    path.write_text("formula,formation_energy_per_atom\nNaCl,-2.1\nNa,0\nCl,0\nPo,0\n")
    return Hull.from_table(path, ElementReferences({"Na": -1.3225, "Cl": -1.8485}))


def salt(length=5.8):
    return Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(length), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    ).get_primitive_structure()


def broken():
    return Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]])


def with_relaxations(monkeypatch, *results):
    monkeypatch.setattr(stability, "relax_all", lambda *_, **__: list(results))


@pytest.mark.slow
def test_rows_through_processes_and_on_from_the_cache(chgnet, hull, tmp_path, monkeypatch):
    polonium = Structure(Lattice.cubic(3.3), ["Po"], [[0, 0, 0]])
    crystals = [salt(), polonium, broken(), salt()]
    with local(2) as workers:
        rows = assess(crystals, chgnet, hull, fmax=0.02, workers=workers, cache_dir=tmp_path, progress=False)
    assert [row.outcome.value for row in rows] == ["converged", "unknown_element", "diverged", "converged"]
    assert rows[0] == rows[3]

    alone = relax(salt(), chgnet, fmax=0.02)
    assert rows[0].energy_per_atom == pytest.approx(alone.energy / 2, abs=1e-6)
    assert (rows[0].steps, rows[0].converged) == (alone.steps, True)
    formation = alone.energy / 2 + (1.3225 + 1.8485) / 2
    assert rows[0].formation_energy_per_atom == pytest.approx(formation, abs=1e-6)
    assert rows[0].e_above_hull == pytest.approx(formation + 2.1, abs=1e-5)
    relaxed = Structure.from_str(rows[0].cif, fmt="cif")
    assert relaxed.volume == pytest.approx(alone.structure.volume, rel=1e-5)
    assert all(row.reason and row.energy_per_atom is None and row.cif is None for row in rows[1:3])

    # Again: no process is started, and the rows are the same; equal crystals were relaxed once.
    stored = tmp_path / "relaxations.jsonl"
    assert len(stored.read_text().splitlines()) == 3
    with monkeypatch.context() as patch:
        patch.setattr(relaxations, "relax_together", lambda *_: iter(()))
        assert assess(crystals, chgnet, hull, fmax=0.02, cache_dir=tmp_path, progress=False) == rows

    # A kill in the middle of a line loses that line and no other; other settings are other questions.
    stored.write_text("\n".join(stored.read_text().splitlines()[:2]) + '\n{"key": "ab')
    asked = []

    def spy(structures, potential, settings):
        asked.extend(structure.composition.reduced_formula for structure in structures)
        return iter((i, Relaxation(RelaxationStatus.FAILED, "spy")) for i in range(len(structures)))

    monkeypatch.setattr(relaxations, "relax_together", spy)
    relax_all(crystals, chgnet, RelaxationSettings(fmax=0.02), cache_dir=tmp_path, progress=False)
    assert len(asked) == 1
    asked.clear()
    relax_all([salt()], chgnet, RelaxationSettings(fmax=0.03), cache_dir=tmp_path, progress=False)
    relax_all([salt()], chgnet, RelaxationSettings(fmax=0.02, max_steps=9), cache_dir=tmp_path, progress=False)
    relax_all([salt()], dataclasses.replace(chgnet, sha256="0"), RelaxationSettings(0.02), cache_dir=tmp_path)
    assert asked == ["NaCl"] * 3


@pytest.mark.slow
def test_a_crystal_that_takes_too_long_is_an_outcome(chgnet, tmp_path):
    crystal = salt()
    crystal.make_supercell([3, 3, 3])
    crystal.perturb(0.1, seed=0)
    (row,) = assess(
        [crystal], chgnet, None, fmax=1e-9, max_steps=10**6, timeout=2.0, cache_dir=tmp_path, progress=False
    )
    assert row.outcome is StabilityOutcome.TIMEOUT and "2 s" in row.reason
    assert not (tmp_path / "relaxations.jsonl").read_text()  # the next run tries it again


def test_lost_jobs_are_outcomes(chgnet, monkeypatch):
    monkeypatch.setattr(relaxations, "run", lambda *_, **__: iter([(1, Lost.CRASHED), (0, Lost.TIMEOUT)]))
    found = relax_all([salt(), broken()], chgnet, workers=Workers(None, 2), progress=False)
    assert [r.status for r in found] == [RelaxationStatus.TIMEOUT, RelaxationStatus.CRASHED]


@pytest.mark.parametrize("status", list(RelaxationStatus))
def test_every_end_of_a_relaxation_is_an_outcome(chgnet, hull, monkeypatch, status):
    with_relaxations(monkeypatch, Relaxation(status, "why", steps=4))
    (row,) = assess([salt()], chgnet, hull)
    assert (row.outcome.value, row.reason, row.steps, row.e_above_hull) == (status.value, "why", 4, None)


def ended(structure, per_atom, status=RelaxationStatus.CONVERGED):
    return Relaxation(status, "", structure, per_atom * len(structure), 3, 0.05, 0.1, 0.02)


def test_steps_that_ran_out_give_an_upper_bound_that_says_so(chgnet, hull, monkeypatch):
    with_relaxations(monkeypatch, ended(salt(), -3.5, RelaxationStatus.NOT_CONVERGED))
    (row,) = assess([salt()], chgnet, hull)
    assert row.outcome is StabilityOutcome.NOT_CONVERGED and not row.converged
    assert row.e_above_hull == pytest.approx(-3.5 + (1.3225 + 1.8485) / 2 + 2.1)


def test_what_the_hull_does_not_know_is_uncovered(chgnet, hull, monkeypatch):
    magnesia = Structure(Lattice.cubic(4), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    with_relaxations(monkeypatch, ended(magnesia, -6.0))
    (row,) = assess([magnesia], chgnet, hull)
    assert row.outcome is StabilityOutcome.UNCOVERED and "Mg, O" in row.reason
    assert row.converged and row.energy_per_atom == -6.0 and row.formation_energy_per_atom is None
    assert row.competing_phases is None and row.phases_of_system is None


@pytest.mark.parametrize("status", [RelaxationStatus.CONVERGED, RelaxationStatus.NOT_CONVERGED])
@pytest.mark.parametrize(("below", "outcome"), [(0.099, None), (0.101, StabilityOutcome.FAR_BELOW_HULL), (26.0, "far")])
def test_what_lies_far_below_the_hull_is_no_discovery(chgnet, hull, monkeypatch, below, outcome, status):
    """PmRh and KBr4 were stable, at -0.4 eV/atom: an error of the potential, or phases that the hull lacks."""
    on_hull = -2.1 - (1.3225 + 1.8485) / 2
    with_relaxations(monkeypatch, ended(salt(), on_hull - below, status))
    (row,) = assess([salt()], chgnet, hull)
    assert row.formation_energy_per_atom == pytest.approx(-2.1 - below) and row.converged == (status == "converged")
    if outcome is None:
        assert row.outcome == status and row.e_above_hull == pytest.approx(-below)
    else:
        assert row.outcome is StabilityOutcome.FAR_BELOW_HULL and row.e_above_hull is None
        assert row.reason == f"{below:.3f} eV/atom below the hull"


def test_competing_phases_are_counted(chgnet, tmp_path, monkeypatch):
    """Compounds of the crystal's elements or of some of them, and of exactly these; polymorphs count once."""
    rows = "NaCl,-2.1\nNa4Cl4,-2.0\nNaCl3,-0.5\nKCl,-2.2\nNaKCl2,-2.15\nKBr,-2.0\nNa,0\nNa2,0.1\nCl,0\n"
    (tmp_path / "h.csv").write_text("formula,formation_energy_per_atom\n" + rows)
    known = Hull.from_table(tmp_path / "h.csv", ElementReferences({"Na": -1.31, "Cl": -1.84, "K": -1.11, "Br": -1.65}))
    cell = Lattice.cubic(6)
    spots = [[0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]
    cases = {"NaCl": (2, 2), "NaKCl": (4, 1), "NaBr": (0, 0), "NaKBr": (1, 0), "NaKClBr": (5, 0), "Na": (0, 1)}
    for formula, counts in cases.items():
        symbols = [s.symbol for s in Composition(formula).elements]
        crystal = Structure(cell, symbols, spots[: len(symbols)])
        with_relaxations(monkeypatch, ended(crystal, -2.0))
        (row,) = assess([crystal], chgnet, known)
        assert (row.competing_phases, row.phases_of_system) == counts, formula


def test_without_a_hull_crystals_are_relaxed_and_no_more(chgnet, monkeypatch):
    with_relaxations(monkeypatch, ended(salt(), -3.5))
    (row,) = assess([salt()], chgnet, None)
    assert row.outcome is StabilityOutcome.CONVERGED and row.energy_per_atom == -3.5
    assert row.formation_energy_per_atom is None and row.e_above_hull is None
    assert Composition(Structure.from_str(row.cif, fmt="cif").formula).reduced_formula == "NaCl"


def test_another_scale_is_refused_before_any_work(chgnet, hull, monkeypatch):
    from jaxcrystal.relaxation.selfcheck import EnergyReference

    monkeypatch.setattr(stability, "relax_all", lambda *_, **__: pytest.fail("relaxed"))
    foreign = dataclasses.replace(chgnet, check=dataclasses.replace(chgnet.check, reference=EnergyReference.OWN))
    with pytest.raises(UserError, match="energy scale"):
        assess([salt()], foreign, hull)


def test_bad_settings_are_errors(chgnet, tmp_path):
    for bad in ({"fmax": 0}, {"fmax": float("nan")}, {"max_steps": -1}, {"timeout": 0}):
        with pytest.raises(UserError):
            assess([salt()], chgnet, None, **bad)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*relaxations\.jsonl"):
        assess([salt()], chgnet, None, cache_dir=tmp_path / "file")


def test_half_a_line_is_all_that_a_kill_costs(tmp_path):
    store = relaxations._Store(tmp_path)
    store.append("a", ended(salt(), -3.5))
    with store.path.open("a") as file:
        file.write('{"key": "b", "sta')
    again = relaxations._Store(tmp_path)
    again.append("c", ended(salt(), -3.4))
    assert set(again.read({"a", "b", "c"})) == {"a", "c"}


def test_other_code_is_another_question(chgnet, monkeypatch):
    keys = {relaxations._key(salt(), chgnet, RelaxationSettings())}
    keys.add(relaxations._key(salt(), dataclasses.replace(chgnet, package="chgnet 9"), RelaxationSettings()))
    monkeypatch.setattr(relaxations, "VERSION", relaxations.VERSION + 1)
    keys.add(relaxations._key(salt(), chgnet, RelaxationSettings()))
    assert len(keys) == 3


def test_a_stored_relaxation_is_the_same_relaxation(tmp_path):
    store = relaxations._Store(tmp_path)
    kept = ended(salt(), -3.5)
    store.append("k", kept)
    (line,) = store.path.read_text().splitlines()
    assert json.loads(line)["status"] == "converged"
    assert store.read({"k"}) == {"k": kept}
    assert store.read({"other"}) == {}
