"""Other elements at the same sites: the composition changes by exactly the swaps, and the volume as stated."""

import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_crystals import SALT, crystals

from jaxcrystal import box
from jaxcrystal.crystals import packed
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal, cell_volume
from jaxcrystal.crystals.radii import radius
from jaxcrystal.crystals.substitution import alike, random_swaps, swapped, volumes
from jaxcrystal.crystals.symmetric import cell_of
from jaxcrystal.crystals.wyckoff import group
from jaxcrystal.errors import UserError

KNOWN = [ATOMIC_NUMBER[symbol] for symbol in volumes()]


@st.composite
def templates(draw) -> Crystal:
    """Crystals of few elements, of those whose volumes are known."""
    crystal = draw(crystals())
    few = draw(st.lists(st.sampled_from(KNOWN), min_size=1, max_size=6, unique=True))
    species = draw(st.lists(st.sampled_from(few), min_size=len(crystal), max_size=len(crystal)))
    return Crystal(crystal.lengths, crystal.angles, species, crystal.frac_coords)


def cells(name):
    """Of each packed crystal of the package: space group, letters, species of its orbits, atoms/Å³ by element."""
    for row in packed.read(box.crystals(name)):
        here = group(row["space_group"])
        cell = cell_of(here.system, np.array(row["cell"]) / 10**packed.DECIMALS)
        density = np.zeros(len(ELEMENTS))
        for z, letter in zip(row["species"], row["letters"], strict=True):
            density[z] += here.position(letter).multiplicity / cell_volume(cell[:3], cell[3:])
        yield row["space_group"], row["letters"], tuple(row["species"]), density


@given(templates(), st.floats(0.02, 0.4), st.integers(0, 2**32), st.none() | st.integers(1, 7))
def test_composition_changes_by_the_swaps_and_volume_as_stated(crystal, tolerance, seed, count):
    swaps = random_swaps(np.random.default_rng(seed), crystal, alike(tolerance), count)
    there = set(crystal.symbols)
    if swaps is None:
        return
    assert len(swaps) == len(there) if count is None else len(swaps) == min(count, len(there))
    assert swaps.keys() <= there and not there & set(swaps.values()) and len(set(swaps.values())) == len(swaps)
    assert all(abs(radius(old) - radius(new)) < tolerance + 1e-6 for old, new in swaps.items())

    new = swapped(crystal, swaps)
    assert new.symbols == [swaps.get(symbol, symbol) for symbol in crystal.symbols]
    assert sorted(Counter(new.symbols).values()) == sorted(Counter(crystal.symbols).values())
    assert new.formula != crystal.formula
    np.testing.assert_array_equal(new.frac_coords, crystal.frac_coords)
    np.testing.assert_array_equal(new.angles, crystal.angles)
    np.testing.assert_allclose(new.lengths / new.lengths[0], crystal.lengths / crystal.lengths[0], rtol=1e-6)
    share = sum(volumes()[symbol] for symbol in new.symbols) / sum(volumes()[symbol] for symbol in crystal.symbols)
    assert new.volume / crystal.volume == pytest.approx(share, rel=1e-5)

    back = swapped(new, {new: old for old, new in swaps.items()})
    np.testing.assert_array_equal(back.species, crystal.species)
    np.testing.assert_allclose(back.lengths, crystal.lengths, atol=1e-6)


POOL = st.dictionaries(st.sampled_from("ABCD"), st.lists(st.sampled_from("EFGHA"), max_size=3, unique=True))


@given(POOL, st.none() | st.integers(1, 4), st.integers(0, 2**32))
def test_there_are_none_only_where_there_is_no_choice(pool, count, seed):
    names = dict(zip("ABCDEFGH", ["Li", "Na", "K", "Rb", "Mg", "Ca", "Sr", "Ba"], strict=True))
    pool = {names[old]: [names[new] for new in each] for old, each in pool.items()}
    crystal = Crystal([5] * 3, [90] * 3, [3, 11, 19], np.zeros((3, 3)))
    wanted = 3 if count is None else min(count, 3)
    choices = {
        tuple(zip(chosen, new, strict=True))
        for chosen in itertools.combinations(["K", "Li", "Na"], wanted)
        for new in itertools.product(*([one for one in pool.get(old, []) if one != "Li"] for old in chosen))
        if len(set(new)) == wanted and {"Li", "Na", "K"} <= pool.keys()
    }
    swaps = random_swaps(np.random.default_rng(seed), crystal, pool, count)
    if wanted == 3:
        assert (swaps is None) == (not choices)
    assert swaps is None or tuple(swaps.items()) in choices


def test_every_choice_is_as_likely():
    pool = {"Na": ["K", "Rb"], "Cl": ["K", "Br"]}
    rng = np.random.default_rng(0)
    seen = Counter(tuple(random_swaps(rng, SALT, pool).values()) for _ in range(3000))  # of Cl, of Na
    assert set(seen) == {("K", "Rb"), ("Br", "K"), ("Br", "Rb")}
    assert all(abs(count - 1000) < 5 * np.sqrt(3000 * 2 / 9) for count in seen.values())
    one = Counter(next(iter(random_swaps(rng, SALT, pool, 1))) for _ in range(1000))
    assert set(one) == {"Na", "Cl"} and abs(one["Na"] - 500) < 80


def test_an_element_that_nothing_is_like_stays_or_stops_it():
    caesium = Crystal([5] * 3, [90] * 3, [55, 17], np.zeros((2, 3)))
    rng = np.random.default_rng(0)
    assert random_swaps(rng, caesium, alike(0.1)) is None
    assert random_swaps(rng, caesium, alike(0.1), 1) == {"Cl": "S"}
    fermium = Crystal([5] * 3, [90] * 3, [100, 17], np.zeros((2, 3)))
    assert random_swaps(rng, fermium, alike(0.1), 1) is None


def test_elements_can_change_places():
    ordered = Crystal([5] * 3, [90] * 3, [26, 25, 25], np.zeros((3, 3)))
    assert swapped(ordered, {"Fe": "Mn", "Mn": "Fe"}).symbols == ["Mn", "Fe", "Fe"]
    assert swapped(ordered, {}) == ordered


@pytest.mark.parametrize(
    ("species", "swaps", "message"),
    [
        ([11, 17], {"K": "Rb"}, "K cannot become Rb: ClNa has no K"),
        ([11, 17], {"Na": "D"}, "Na cannot become 'D', which is no chemical element"),
        ([11, 17], {"Na": "Cl"}, "Cl and Na of ClNa cannot both be Cl"),
        ([11, 17], {"Na": "Br", "Cl": "Br"}, "Cl and Na of ClNa cannot both be Br"),
        ([11, 17], {"Na": "Fm"}, "how large an atom of Fm is, is not known: MP-20's training set has none"),
        ([100, 17], {"Cl": "Br"}, "how large an atom of Fm is, is not known: MP-20's training set has none"),
    ],
)
def test_bad_input(species, swaps, message):
    with pytest.raises(UserError) as caught:
        swapped(Crystal([5] * 3, [90] * 3, species, np.zeros((2, 3))), swaps)
    assert str(caught.value) == message


def test_volumes_are_nearest_to_those_of_the_training_set():
    densities = np.array([density for *_, density in cells("mp20")])
    there = np.flatnonzero(densities.any(0))
    expected = np.linalg.lstsq(densities[:, there], np.ones(len(densities)), rcond=None)[0]
    assert list(volumes()) == [ELEMENTS[z] for z in there]
    np.testing.assert_allclose(list(volumes().values()), expected, atol=0.0051)


def test_volumes_of_known_crystals_are_foretold():
    """Crystals of the test set, each from others that have its space group, letters and arrangement of elements."""
    families = defaultdict(list)
    for number, letters, species, density in cells("mp20-test"):
        kinds = list(dict.fromkeys(species))
        families[number, letters, tuple(map(kinds.index, species))].append((kinds, density))
    pool, shares = alike(0.1), np.array([volumes().get(symbol, 0.0) for symbol in ELEMENTS])
    scaled, same = [], []
    for family in families.values():
        for (old, before), (new, after) in itertools.combinations(family[:60], 2):
            if all(ELEMENTS[b] in pool.get(ELEMENTS[a], ()) for a, b in zip(old, new, strict=True)):
                ratio = before.sum() / after.sum()  # of volumes an atom
                moved = np.zeros(len(ELEMENTS))
                moved[new] = before[old]
                scaled.append(moved @ shares / (before @ shares) / ratio - 1)
                same.append(1 / ratio - 1)
    assert len(scaled) > 1000
    assert np.median(np.abs(scaled)) < 0.06 and np.median(np.abs(same)) > 0.1
