"""Fingerprints against matminer's, for ideal, generated and real crystals; then what is stored."""

from dataclasses import replace

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from jaxcrystal.crystals.crystal import ELEMENTS, Crystal
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.evaluation.likeness import fingerprints as module
from jaxcrystal.evaluation.likeness import magpie
from jaxcrystal.evaluation.likeness.fingerprints import COLUMNS, fingerprints, stored_fingerprints
from jaxcrystal.reader.reading import read
from jaxcrystal.workers import local

SALT = Crystal([5.69 / 2**0.5] * 3, [60, 60, 60], [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])
TWICE = Crystal([4, 4, 4], [90, 90, 90], [11, 17], [[0, 0, 0], [0, 0, 0]])


def assert_equal(crystals, peer):
    found = fingerprints(crystals)
    assert found.known.all()
    for crystal, mine in zip(crystals, found.structure, strict=True):
        theirs = peer(crystal.to_structure())
        worst = np.abs(mine - theirs).argmax()
        assert mine == pytest.approx(theirs, abs=1e-6), (crystal.formula, COLUMNS[worst])


def test_there_are_as_many_columns_as_matminer_has():
    assert len(COLUMNS) == 61 and COLUMNS[:3] == ((1, "wt"), (1, "sgl_bd"), (2, "wt")) and COLUMNS[-1] == (24, "wt")


def test_rock_salt_is_octahedral():
    values = dict(zip(COLUMNS, fingerprints([SALT]).structure[0], strict=True))
    assert values[6, "wt"] == pytest.approx(1.0) and values[6, "octahedral"] == pytest.approx(1.0)
    assert sum(values[n, "wt"] for n in range(1, 25)) == pytest.approx(1.0)


def test_ideal_structures_equal_matminers(peer):
    """Symmetry is where rounding decides: equal weights, right angles, vertices where many cells meet."""
    small = [entry.crystal for entry in embedded() if len(entry.crystal) <= 6]
    assert_equal(small[:: len(small) // 25], peer)


@pytest.mark.parametrize("name", ["generated/diffcsp_mp20.parquet", "mp20/test.parquet"])
def test_generated_and_real_crystals_equal_matminers(name, shared, peer):
    samples = read(shared / "data" / name, limit=600).rows
    small = [sample.crystal for sample in samples if len(sample.crystal) <= 10]
    assert_equal(small[:: len(small) // 20], peer)


def test_rounding_is_pymatgens_where_it_decides(peer, monkeypatch):
    """In body-centred iron right angles and equal weights leave the body-centred order parameter to rounding."""
    crystals = [Crystal.from_structure(s) for s in noisy()]
    asked = []
    original = module.as_pymatgen_rounds
    monkeypatch.setattr(module, "as_pymatgen_rounds", lambda *site: asked.append(site) or original(*site))
    assert_equal(crystals, peer)
    assert asked


def noisy():
    yield Structure.from_spacegroup("Im-3m", Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]])
    yield Structure.from_spacegroup(
        "P4/mcc", Lattice.tetragonal(6.5, 6.8), ["Nb", "Te"], [[0, 0, 0.25], [0.143, 0.327, 0]]
    )
    tetragonal = Lattice.tetragonal(4.2, 10.4)
    yield Structure.from_spacegroup("P4/mmm", tetragonal, ["Co", "Ga", "Sm"], [[0, 0, 0], [0, 0.5, 0.12], [0, 0, 0.3]])


def test_what_has_no_fingerprint_has_a_reason():
    found = fingerprints([SALT, None, TWICE, SALT])
    assert found.known.tolist() == [True, False, False, True]
    assert found.reasons == ("", "there is no crystal", "the Voronoi cell of atom 0 (Na) is open or empty", "")
    assert np.isnan(found.structure[1:3]).all() and np.isnan(found.composition[1]).all()
    assert found.composition[2] == pytest.approx(magpie.standardised(magpie.features([11, 17])))
    assert len(found[found.known]) == 2 and found[np.array([1])].reasons == ("there is no crystal",)
    assert fingerprints([]).structure.shape == (0, 61)


def test_every_element_has_a_fingerprint_or_a_reason():
    oxides = [Crystal([4, 4, 4], [90, 90, 90], [z, 8], [[0, 0, 0], [0.5, 0.5, 0.5]]) for z in range(1, len(ELEMENTS))]
    found = fingerprints(oxides)
    unknown = [symbol for symbol, known in zip(ELEMENTS[1:], found.known, strict=True) if not known]
    assert unknown == list(ELEMENTS[97:]) and found.reasons[96] == "no radius of Bk is known"
    assert (found.known == ~np.isnan(found.structure).any(axis=1)).all()


def test_where_pymatgen_has_no_answer_a_crystal_has_a_reason(monkeypatch):
    def fails(*arguments):
        raise ValueError("No Voronoi neighbors found")

    monkeypatch.setattr("pymatgen.analysis.local_env.CrystalNN.get_nn_data", fails)
    iron = Crystal.from_structure(next(noisy()))
    reason = "pymatgen finds no eight neighbours of atom 1: No Voronoi neighbors found"
    found = fingerprints([SALT, iron, SALT])
    assert found.reasons == ("", reason, "") and np.isnan(found.structure[1]).all()


def test_processes_change_nothing():
    crystals = [entry.crystal for entry in embedded()[:60]]
    with local(2) as workers:
        alone, shared_out = fingerprints(crystals), fingerprints(crystals, workers=workers)
    assert np.array_equal(alone.structure, shared_out.structure) and alone.reasons == shared_out.reasons


def test_a_run_that_was_stopped_goes_on_at_the_block_where_it_stood(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 2)
    crystals = [entry.crystal for entry in embedded()[:5]]
    asked = []

    def until(limit):
        def made(block, *, workers):
            if len(asked) == limit:
                raise KeyboardInterrupt
            asked.append(len(block))
            return fingerprints(block, workers=workers)

        return made

    with monkeypatch.context() as patch:
        patch.setattr(module, "fingerprints", until(2))
        with pytest.raises(KeyboardInterrupt):
            stored_fingerprints(crystals, tmp_path)
        patch.setattr(module, "fingerprints", until(3))
        found = stored_fingerprints(crystals, tmp_path)
    assert asked == [2, 2, 1]
    whole = fingerprints(crystals)
    assert np.array_equal(found.structure, whole.structure) and found.reasons == whole.reasons
    assert np.array_equal(found.composition, whole.composition)


def test_a_second_run_reads_what_the_first_stored(tmp_path, monkeypatch):
    crystals = [SALT, None, TWICE]
    first = stored_fingerprints(crystals, tmp_path)
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "fingerprints", None)  # not called
        again = stored_fingerprints(crystals, tmp_path)
    for name in ("structure", "composition"):
        assert np.array_equal(getattr(first, name), getattr(again, name), equal_nan=True)
    assert first.reasons == again.reasons
    # Other crystals, another order, another version: another file. A broken file is written anew.
    moved = TWICE.frac_coords + 0.1
    changes = {"lengths": [4, 4, 4.1], "angles": [90, 90, 91], "species": [11, 35], "frac_coords": moved}
    others = [[SALT, None, replace(TWICE, **{name: value})] for name, value in changes.items()]
    for different in [crystals[::-1], crystals[:2], *others]:
        stored_fingerprints(different, tmp_path)
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    stored_fingerprints(crystals, tmp_path)
    files = 1 + 2 + len(changes) + 1
    assert len(list(tmp_path.iterdir())) == files
    monkeypatch.undo()
    path.write_bytes(b"PK broken")
    assert stored_fingerprints(crystals, tmp_path).reasons == first.reasons
    assert path.stat().st_size > 100 and len(list(tmp_path.iterdir())) == files


def test_where_nothing_can_be_stored_that_is_said(tmp_path, capsys):
    (tmp_path / "file").touch()
    found = stored_fingerprints([SALT], tmp_path / "file" / "folder")
    assert found.known.all() and f"could not be stored in {tmp_path / 'file' / 'folder'}" in capsys.readouterr().out
