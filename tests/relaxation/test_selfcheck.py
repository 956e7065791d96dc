"""The self-check: every element's energy is looked at, on the Materials Project's scale and on a scale of its own."""

from functools import partial

import numpy as np
import pytest
from pymatgen.core import Composition, Element

from jaxcrystal.errors import UserError
from jaxcrystal.relaxation import potentials
from jaxcrystal.relaxation.known_crystals import known_crystals
from jaxcrystal.relaxation.potentials import Potential, load_potential
from jaxcrystal.relaxation.selfcheck import TOLERANCE, EnergyReference, check

KNOWN = known_crystals()
ELEMENTS = sorted({symbol for crystal in KNOWN for symbol in crystal.symbols})


def exact(structures, *, corrected=False, offsets=None, noise=0.0):
    """The table's own energies in eV per cell, with so many eV added to each atom of some elements."""
    rng, found = np.random.default_rng(0), []
    table = {tuple(c.symbols): c for c in KNOWN}
    for structure in structures:
        symbols = [site.specie.symbol for site in structure]
        crystal = table[tuple(symbols)]
        energy = crystal.energy + corrected * crystal.correction + rng.normal(0, noise)
        found.append(energy * len(symbols) + sum((offsets or {}).get(symbol, 0.0) for symbol in symbols))
    return found


def test_the_table_holds_every_element_well():
    """89 elements; each with half of a crystal's atoms, so that its offset is not thinned out; no crystal twice."""
    assert len(ELEMENTS) == 89
    for symbol in ELEMENTS:
        assert max(c.symbols.count(symbol) / len(c.symbols) for c in KNOWN) >= 0.5
    assert len({tuple(c.symbols) for c in KNOWN}) == len(KNOWN)
    assert all(-15 < c.energy < 0 and -0.5 < c.correction < 0.1 for c in KNOWN)


def test_the_crystals_are_those_of_their_prototypes():
    """Space group and formula, by spglib and pymatgen; distances are possible."""
    groups = {"fcc": 225, "bcc": 229, "hcp": 194, "rocksalt": 225, "zincblende": 216, "CsCl": 221, "fluorite": 225}
    groups |= {"WC": 187, "AlB2": 191, "AuCu3": 221, "BiF3": 225}
    for crystal in KNOWN:
        structure = crystal.structure()
        assert structure.get_space_group_info()[1] == groups[crystal.prototype], crystal
        assert structure.composition.reduced_composition == Composition(str(crystal).split()[0])
        nearest = min(n.nn_distance for site in structure for n in structure.get_neighbors(site, 7))
        radii = [Element(symbol).atomic_radius or 1.0 for symbol in crystal.symbols]
        assert 0.6 < nearest / (2 * np.mean([float(r) for r in radii])) < 4.5, crystal


@pytest.mark.parametrize("corrected", [False, True])
def test_each_scale_is_recognised(corrected):
    found = check(partial(exact, corrected=corrected, noise=0.03), ELEMENTS)
    assert found.reference is (EnergyReference.MP2020 if corrected else EnergyReference.MP)
    assert found.passed and found.rows == found.total and not found.unchecked and not found.suspects


def test_an_offset_on_any_element_is_found_and_named():
    for symbol in ELEMENTS:
        for offset in (0.5, -0.5):
            found = check(partial(exact, offsets={symbol: offset}), ELEMENTS)
            assert found.reference is EnergyReference.MP and not found.passed, symbol
        assert symbol in found.suspects or len([c for c in KNOWN if symbol in c.symbols]) > 1
    assert "every crystal of Fe is wrong" in str(check(partial(exact, offsets={"Fe": 2.0}), ELEMENTS))


def test_shifts_of_every_element_are_a_scale_of_its_own():
    """Another functional's elements differ by eV; compounds that disagree are found all the same."""
    rng = np.random.default_rng(0)
    offsets = {symbol: rng.normal(0, 1) for symbol in ELEMENTS}
    found = check(partial(exact, offsets=offsets, noise=0.02), ELEMENTS)
    assert found.reference is EnergyReference.OWN and found.passed
    assert {"He", "Xe"} <= set(found.unchecked) and not {"Fe", "O", "W"} & set(found.unchecked)  # one crystal each
    swapped = {"Fe": "Cl", "Cl": "Fe"}

    def exchanged(structures):
        return [
            energy + 1.0 * sum(site.specie.symbol in swapped for site in structure) * (len(structure.composition) > 1)
            for energy, structure in zip(exact(structures, offsets=offsets), structures, strict=True)
        ]

    assert not check(exchanged, ELEMENTS).passed


def test_no_number_for_a_crystal_is_no_pass():
    for offsets in (None, {symbol: 3.0 * (len(symbol) - 1.5) for symbol in ELEMENTS}):

        def silent(structures, offsets=offsets):
            energies = zip(exact(structures, offsets=offsets), structures, strict=True)
            return [np.nan if s.composition.reduced_formula == "MgO" else energy for energy, s in energies]

        found = check(silent, ELEMENTS)
        assert found.reference is (EnergyReference.OWN if offsets else EnergyReference.MP)
        assert found.worst == float("inf") and not found.passed


def test_only_the_potentials_elements_are_looked_at():
    found = check(exact, ["Al", "Ni", "Co", "Fe", "Pu"])
    assert {symbol for row in found.rows for symbol in row.elements} == {"Al", "Ni", "Co", "Fe", "Pu"} - {"Pu"}
    assert found.unchecked == ("Pu",)
    assert not found.passed and "of only 6 of the known crystals" in str(found)
    assert check(exact, []).worst == float("inf")


def chgnet_with(change) -> Potential:
    """CHGNet with some of its weights changed."""
    import torch

    potential = load_potential("chgnet")
    with torch.no_grad():
        change(potential.answer.args[0])
    return potential


def offset_on_iron(model):
    model.composition_model.fc.weight[0, Element("Fe").Z - 1] += 0.5


def iron_and_cobalt_exchanged(model):
    table = model.atom_embedding.embedding.weight
    rows = [Element("Fe").Z - 1, Element("Co").Z - 1]
    table[rows] = table[rows[::-1]].clone()


@pytest.mark.parametrize("change", [offset_on_iron, iron_and_cobalt_exchanged])
def test_weights_of_one_element_that_are_wrong_are_refused(change, monkeypatch):
    wrong = chgnet_with(change)
    found = check(wrong.energies, wrong.elements)
    assert found.reference is EnergyReference.MP2020 and not found.passed
    monkeypatch.setattr(potentials, "_chgnet", lambda device: iter([Potential.checked(**fields_of(wrong))]))
    with pytest.raises(UserError, match=rf"fails its self-check by more than {TOLERANCE} .*Fe.*damaged or do not fit"):
        load_potential("chgnet")


def fields_of(potential: Potential) -> dict:
    return {name: getattr(potential, name) for name in potential.__dataclass_fields__ if name != "check"}
