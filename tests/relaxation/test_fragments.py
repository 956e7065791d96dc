"""Atoms and molecules that nothing holds are no crystals, whatever potential looks at them."""

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Lattice, Structure
from single_points import potential
from test_batch import Fixed

from jaxcrystal.relaxation import batch
from jaxcrystal.relaxation.batch import RelaxationStatus, relax
from jaxcrystal.relaxation.fragments import isolated
from jaxcrystal.relaxation.potentials import load_potential
from jaxcrystal.relaxation.systems import Systems


def alone(structure) -> str:
    return isolated(Systems.of([structure]))


def oxygen(box, shift=(0.0, 0.0, 0.0)):
    """O2, 1.2 Å long, in a cubic box (Å)."""
    return Structure(
        Lattice.cubic(box), ["O", "O"], np.array([[0, 0, 0], [1.2, 0, 0]]) + shift, coords_are_cartesian=True
    )


def salt_and(symbol, height):
    """A layer of rock salt, and one more atom so high above it (Å)."""
    layer = [[0, 0, 0], [2.8, 2.8, 0], [2.8, 0, 0], [0, 2.8, 0]]
    lattice = Lattice.tetragonal(5.6, 2 * height)
    return Structure(lattice, ["Na", "Na", "Cl", "Cl", symbol], [*layer, [0, 0, height]], coords_are_cartesian=True)


@pytest.mark.parametrize(
    ("structure", "found"),
    [
        (oxygen(8), "1 x O2"),
        (oxygen(8, shift=(7.5, 7.9, 7.9)), "1 x O2"),  # across the box's faces
        (oxygen(4.5), ""),
        (Structure(Lattice.cubic(14), ["Na"], [[0, 0, 0]]), "1 x Na"),
        (Structure(Lattice.cubic(7), ["Cs"], [[0, 0, 0]]), "1 x Cs"),
        (Structure(Lattice.cubic(9), ["Pm", "Ar"], [[0, 0, 0], [0.5, 0.5, 0.5]]), "1 x Ar, 1 x Pm"),
        (salt_and("He", 10), "1 x He"),
        (salt_and("He", 3), ""),
        # A chain, and a layer, in empty space are held: along themselves.
        (Structure(Lattice.tetragonal(20, 2.4), ["C"], [[0, 0, 0]]), ""),
        (Structure(Lattice.hexagonal(2.46, 20), ["C", "C"], [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0]]), ""),
    ],
)
def test_a_piece_without_neighbours_is_named(structure, found):
    assert alone(structure) == found
    doubled = structure.copy()
    doubled.make_supercell([2, 1, 1])
    assert bool(alone(doubled)) == bool(found)


def bulk(symbol, group, a, x, c=None):
    return Structure.from_spacegroup(group, Lattice.cubic(a) if c is None else Lattice.hexagonal(a, c), [symbol], [x])


@pytest.mark.parametrize(
    "structure",
    [
        bulk("Cs", "Im-3m", 6.16, [0, 0, 0]),  # 5.33 Å apart, farther than M3GNet sees
        bulk("Xe", "Fm-3m", 6.7, [0, 0, 0]),
        bulk("I", "Fm-3m", 7.0, [0.11, 0.11, 0.11]),
        bulk("N", "Pa-3", 5.66, [0.055, 0.055, 0.055]),  # α-N2
        bulk("C", "Fm-3m", 14.2, [0.05, 0, 0.24]),
    ],
)
def test_metals_and_molecular_crystals_are_crystals(structure):
    assert alone(structure) == ""


@pytest.mark.parametrize("name", ["chgnet", "M3GNet-MP-2021.2.8-PES"])
def test_gas_is_no_crystal_for_any_potential(name, request):
    judge = load_potential(name if name == "chgnet" else request.getfixturevalue("shared") / "potentials" / name)
    for structure, words in ((oxygen(9), "1 x O2"), (Structure(Lattice.cubic(14), ["Na"], [[0, 0, 0]]), "1 x Na")):
        result = relax(structure, judge)
        assert result.status is RelaxationStatus.ISOLATED and result.reason == f"{words} without neighbours"
        assert result.energy is None and result.structure is None and result.steps == 0


def test_a_crystal_that_comes_apart_is_none_at_its_end(monkeypatch):
    """Held at the start, not where the relaxation ends; also where the potential then has no answer."""
    looks = iter(["", "1 x O2", "", "1 x O2"])
    monkeypatch.setattr(batch, "isolated", lambda systems: next(looks))
    ended = relax(oxygen(4.5), potential(Fixed, ["O"]))
    assert ended.status is RelaxationStatus.ISOLATED and ended.reason == "1 x O2 without neighbours after 0 steps"

    class Silent(Fixed):
        def calculate(self, *_, **__):
            raise ValueError("atoms have no neighbour")

    ended = relax(oxygen(4.5), potential(Silent, ["O"]))
    assert ended.status is RelaxationStatus.ISOLATED and ended.energy is None


def test_real_crystals_are_held(shared):
    """600 of MP-20: the one that is not is a molecule of Li2S8 in a box of 12 Å."""
    found = {}
    for name in ("val", "test"):
        table = pd.read_parquet(shared / f"data/mp20/{name}.parquet")
        light = table[table["material_id"] == "mp-995393"]
        rows = pd.concat([light, table.sample(300, random_state=0)]).drop_duplicates("material_id")
        for row in rows.itertuples():
            if words := alone(Structure.from_str(row.cif, fmt="cif")):
                found[row.material_id] = words
    assert found == {"mp-995393": "1 x Li2S8"}
