"""The texts that are read of a crystal: they mean the same, as often as they should, and are the same at every call."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from some_crystals import SALT, crystals
from symmetric_crystals import random_symmetric

from jaxcrystal.config import Augment, Recipe, TextFormat, to_dict
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.crystals.wyckoff import free_axes
from jaxcrystal.errors import UserError
from jaxcrystal.scoring.descriptions import Ways
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.p1.transformations import TRANSFORMATIONS, unimodular

#: With so many decimals that texts are the crystal.
P1 = form_of(TextFormat(coord_decimals=6))
SYMMETRY = form_of(TextFormat(form="symmetry", coord_decimals=4, length_decimals=4, angle_decimals=2))
TITANATE = Crystal(
    [3.9, 4.0, 4.1], [80, 85, 95], [38, 22, 8, 8], [[0, 0, 0], [0.5, 0.4, 0.6], [0.1, 0.2, 0.7], [0.8] * 3]
)


def distances(crystal: Crystal) -> np.ndarray:
    """Between all atoms of the cell and of those around it up to 6 Å, sorted, with the elements."""
    structure = crystal.to_structure()
    found = [
        (*sorted((site.specie.Z, other.specie.Z)), round(other.nn_distance, 3))
        for site in structure
        for other in structure.get_neighbors(site, 6)
    ]
    return np.array(sorted(found))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_what_is_written_otherwise_is_the_same_crystal(name):
    """By all distances up to 6 Å, within 0.01 Å; and the hand is kept."""
    random = np.random.default_rng(1)
    others = [TRANSFORMATIONS[name](TITANATE, random) for _ in range(5)]
    assert sum(other == TITANATE for other in others) <= 1
    for other in others:
        assert other.volume == pytest.approx(TITANATE.volume, rel=1e-5)
        np.testing.assert_allclose(distances(other), distances(TITANATE), atol=0.01)


@given(crystals(max_atoms=4), st.sampled_from(sorted(TRANSFORMATIONS)), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_composition_and_volume_stay(crystal, name, seed):
    other = TRANSFORMATIONS[name](crystal, np.random.default_rng(seed))
    assert Counter(other.symbols) == Counter(crystal.symbols)
    assert other.volume == pytest.approx(crystal.volume, rel=1e-3)


def test_cells_are_all_of_small_numbers_that_keep_volume_and_hand():
    """As many as a count over all 19,683 matrices finds, by the rule of Sarrus."""
    count = 0
    for a, b, c, d, e, f, g, h, i in np.ndindex(*(3,) * 9):
        a, b, c, d, e, f, g, h, i = (x - 1 for x in (a, b, c, d, e, f, g, h, i))
        count += a * e * i + b * f * g + c * d * h - c * e * g - b * d * i - a * f * h == 1
    assert len(unimodular()) == count == len(np.unique(unimodular(), axis=0)) == 3480
    assert set(unimodular().ravel().tolist()) == {-1, 0, 1}


def test_draws_are_uniform_and_the_crystals_own():
    """Chi-square of 2,000 translations over tenths and of all orders of four atoms; the same draws at every call."""
    shifts = Ways(form_of(TextFormat(coord_decimals=1)), ("translations",), draws=2000).texts(SALT)
    digits = Counter(text.split("\n")[3].split()[0] for text in shifts)
    assert len(digits) == 10 and sum((n - 200) ** 2 / 200 for n in digits.values()) < 27.9  # 0.1 % of 9 degrees
    orders = Counter(Ways(P1, ("orders",), draws=2400).texts(TITANATE))
    assert len(orders) == 24 and sum((n - 100) ** 2 / 100 for n in orders.values()) < 49.7  # of 23
    ways = Ways(P1, ("translations", "orders"), draws=5, seed=3)
    assert ways.texts(TITANATE) == ways.texts(TITANATE) != replace(ways, seed=4).texts(TITANATE)
    assert len(set(ways.texts(TITANATE))) == 5
    assert replace(ways, draws=7).texts(TITANATE)[:5] == ways.texts(TITANATE)  # more draws go on after the first
    assert Ways(P1).texts(TITANATE) == [P1.write(TITANATE)]


@pytest.mark.parametrize("number", [2, 14, 47, 62, 166])
def test_descriptions_are_all_there_are_and_the_same_crystal(number):
    crystal = random_symmetric(number, 0).to_crystal()
    own = symmetrize(crystal).descriptions
    texts = SYMMETRY.described(crystal)
    assert texts[0] == SYMMETRY.write(crystal) and len(texts) == len(set(texts)) == len(own)
    assert not free_axes(number) and Ways(SYMMETRY, ("descriptions",), draws=3).texts(crystal) == texts
    assert Ways(SYMMETRY).texts(crystal) == texts[:1]
    for text in texts:
        assert StructureMatcher(0.01, 0.01, 0.1).fit(SYMMETRY.parse(text).to_structure(), crystal.to_structure())


@pytest.mark.parametrize("number", [1, 4, 99])
def test_where_an_origin_is_free_descriptions_are_drawn(number):
    crystal = random_symmetric(number, 0).to_crystal()
    number = int(SYMMETRY.space_group(SYMMETRY.write(crystal)))  # random atoms may have more symmetry
    assert free_axes(number)
    ways = Ways(SYMMETRY, ("descriptions",), draws=20)
    texts = ways.texts(crystal)
    assert len(set(texts)) == 20 and texts == ways.texts(crystal)
    for text in texts[:5]:
        assert StructureMatcher(0.01, 0.01, 0.1).fit(SYMMETRY.parse(text).to_structure(), crystal.to_structure())
    assert replace(ways, listed=True).texts(crystal) == SYMMETRY.described(crystal)


@pytest.mark.parametrize(
    ("form", "augment", "over"),
    [
        (P1, Augment(), ("translations",)),
        (P1, Augment(permute=True), ("translations", "orders")),
        (P1, Augment(translate=False), ()),
        (SYMMETRY, Augment(translate=False), ()),
        (SYMMETRY, Augment(translate=False, descriptions=True), ("descriptions",)),
        (P1, None, ("translations",)),
        (SYMMETRY, None, ()),
    ],
)
def test_a_crystal_is_scored_by_what_training_drew(form, augment, over, tmp_path):
    if augment is not None:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(to_dict(Recipe(augment=augment))))
    ways = Ways.of_training(tmp_path, form, 20, 0)
    assert ways.over == over and ways.listed == ("descriptions" in over)
    assert Ways.of_training(tmp_path, form, 0, 0).over == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draws": -1}, "draws is -1; it must be at least 0"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
        (
            {"over": ("descriptions",)},
            "texts of the p1 form have no descriptions; they have translations, orders, cells",
        ),
    ],
)
def test_what_there_is_not_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Ways(P1, **change)
