"""Which coordinates keep orbits full and apart, against all images of points, in whole numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcrystal.crystals.wyckoff import GRID, GROUPS, group
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS
from jaxcrystal.texts.symmetry.orbits import Orbits, blocked
from jaxcrystal.texts.symmetry.places import PlaceTables, conditions, decides, maps

REUSABLE = [(n, place) for n in GROUPS for place, p in enumerate(group(n).positions) if p.reusable]


def images(number: int, points: np.ndarray, values: int) -> np.ndarray:
    """Of points in units of 1/(GRID·values): all, in the same units."""
    here = group(number).operations
    turned = np.einsum("oij,...j->...oi", here.rotations, points) + here.translations * values
    return turned % (GRID * values)


def points_of(number: int, place: int, coords: np.ndarray, values: int) -> np.ndarray:
    """Representatives, in units of 1/(GRID·values), with these coordinates in units of 1/values."""
    position = group(number).positions[place]
    return (GRID * coords @ position.matrix.T + values * position.shift) % (GRID * values)


def sizes(number: int, points: np.ndarray, values: int) -> np.ndarray:
    """Atoms in the conventional cell."""
    found = images(number, points, values) @ [1, GRID * values, (GRID * values) ** 2]
    found = np.sort(found, axis=-1)
    return 1 + (np.diff(found, axis=-1) != 0).sum(-1)


def slots(written: list[tuple[int, np.ndarray, int, int, np.ndarray | None]]) -> tuple[Orbits, jnp.ndarray]:
    """Of each: group and its position, coordinates before the axis, axis, coordinates of an earlier orbit."""
    of = [group(number).positions[place] for number, place, *_ in written]
    later = [
        sum(1 << a for a in range(3) if p.free[a] and a > axis) for p, (*_, axis, _) in zip(of, written, strict=True)
    ]
    before = [np.zeros(3, int) if earlier is None else earlier for *_, earlier in written]
    orbits = Orbits(
        count=jnp.array([earlier is not None for *_, earlier in written], jnp.int32),
        letters=jnp.array([[place, 0] for _, place, *_ in written], jnp.int8),
        points=jnp.array([[point, [0, 0, 0]] for point in before], jnp.int16),
        letter=jnp.array([place for _, place, *_ in written], jnp.int32),
        axis=jnp.array([axis for *_, axis, _ in written], jnp.int32),
        free=jnp.array(later, jnp.int32),
        point=jnp.array([point for _, _, point, *_ in written], jnp.int16),
    )
    return orbits, jnp.array([number for number, *_ in written], jnp.int32)


def found_blocked(written, decimals: int) -> np.ndarray:
    orbits, groups = slots(written)
    return np.asarray(blocked(orbits, groups, decimals, jnp.ones(len(written), bool)))


def special(random: np.random.Generator, values: int) -> np.ndarray:
    """Coordinates, many of which lie on mirror planes and axes."""
    point = random.integers(0, values, 3)
    choice = random.integers(0, 6)
    if choice == 0:
        point[:] = point[0]
    elif choice == 1:
        point[1] = -point[0] % values
    elif choice == 2:
        point[1] = 2 * point[0] % values
    elif choice == 3:
        point = random.integers(0, 8, 3) * values // 8
    elif choice == 4:
        point[1:] = random.integers(0, 4, 2) * values // 4
    return point


@pytest.mark.parametrize("decimals", [2, 3])
def test_values_with_which_an_orbit_collapses_are_blocked_and_no_others(decimals):
    """The last coordinate, with others before it on which the orbit is still full; all positions of all groups."""
    values, random = 10**decimals, np.random.default_rng(0)
    written, expected = [], []
    for number, place in REUSABLE:
        position = group(number).positions[place]
        *before, last = np.flatnonzero(position.free).tolist()
        for _ in range(1 if not before else 6 if decimals == 2 else 1):
            coords = np.tile(special(random, values) * position.free, (values, 1))
            coords[:, last] = np.arange(values)
            collapsed = sizes(number, points_of(number, place, coords, values), values) < position.multiplicity
            if collapsed.all():  # by the coordinates before
                continue
            written.append((number, place, coords[0] * (np.arange(3) < last), last, None))
            expected.append(collapsed)
    assert len(written) > 1000
    np.testing.assert_array_equal(found_blocked(written, decimals), expected)


def test_values_that_no_later_coordinate_can_mend_are_blocked_and_no_others():
    """A coordinate before the last one, of which there is a choice that is as general as can be behind it."""
    values, random = 100, np.random.default_rng(1)
    fine = values * 1009  # later coordinates in units that no condition hits
    written, expected = [], []
    for number, place in REUSABLE:
        position = group(number).positions[place]
        free = np.flatnonzero(position.free).tolist()
        for at in range(len(free) - 1):
            coords = np.tile(special(random, values) * position.free, (values, 1))
            coords[:, free[at]] = np.arange(values)
            exact = coords * 1009
            exact[:, free[at + 1 :]] = np.array([123_457, 371_239])[: len(free) - at - 1]
            collapsed = sizes(number, points_of(number, place, exact, fine), fine) < position.multiplicity
            if collapsed.all():
                continue
            written.append((number, place, coords[0] * (np.arange(3) < free[at]), free[at], None))
            expected.append(collapsed)
    assert len(written) > 500
    np.testing.assert_array_equal(found_blocked(written, 2), expected)


@pytest.mark.parametrize("decimals", [2, 4])
def test_values_with_which_orbits_meet_are_blocked_and_no_others(decimals):
    """An orbit before, and of the new one the coordinates of one of its points, but for the last."""
    values, random = 10**decimals, np.random.default_rng(2)
    written, expected = [], []
    for number, place in REUSABLE:
        position = group(number).positions[place]
        if 2 * position.multiplicity // group(number).centring > MOST_ATOMS:
            continue
        last = np.flatnonzero(position.free)[-1]
        for _ in range(2 if decimals == 2 else 1):
            other = special(random, values) * position.free
            point = points_of(number, place, other, values)
            if sizes(number, point, values) < position.multiplicity:
                continue
            others = images(number, point, values)
            again = (others @ position.matrix.T + values * position.shift) % (GRID * values)
            on_it = others[(again == others).all(1) & (others[:, position.free] % GRID == 0).all(1)] // GRID
            on_it *= position.free
            like = on_it[random.integers(len(on_it))]
            before = like * (np.arange(3) < last)
            met = on_it[(on_it[:, :last] == before[:last]).all(1), last]
            coords = np.tile(before, (values, 1))
            coords[:, last] = np.arange(values)
            collapsed = np.zeros(values, bool)
            if decimals == 2:
                collapsed = sizes(number, points_of(number, place, coords, values), values) < position.multiplicity
            collapsed[met] = True
            written.append((number, place, before, last, other))
            expected.append(collapsed)
    assert len(written) > 600
    found = found_blocked(written, decimals)
    if decimals == 2:
        np.testing.assert_array_equal(found, expected)
    else:  # those that collapse are too many to be looked for here
        alone = found_blocked([(*each[:-1], None) for each in written], decimals)
        np.testing.assert_array_equal(found, alone | expected)


def test_there_is_always_a_value_left():
    """At two decimals, 64 atoms and any coordinates before: of every position of every group.

    A coordinate is blocked by the conditions that it decides, each with as many values as its factor. The last one also
    by earlier orbits of the letter, 64 / m - 1 at most: each by its points with the same coordinates before. Maps that
    turn the coordinates in the same way lead to the same ones before only if their constants there agree.
    """
    worst = 0
    for number, place in REUSABLE:
        here = group(number)
        position = here.positions[place]
        free = np.flatnonzero(position.free).tolist()
        found = conditions(here, position)
        for axis in free:
            by_conditions = sum(each[0][axis] for each in found if decides(each) == axis)
            others = MOST_ATOMS // (position.multiplicity // here.centring) - 1
            met = 0
            if axis == free[-1] and others > 0:
                constants: dict[tuple, dict[tuple, set[int]]] = {}
                for rows in maps(here, position):
                    turned, before = tuple(row[:3] for row in rows), tuple(row[3] for row in rows[:axis])
                    constants.setdefault(turned, {}).setdefault(before, set()).add(rows[axis][3])
                met = others * sum(max(map(len, by.values())) for by in constants.values())
            worst = max(worst, by_conditions + met)
    assert worst == 72


def test_every_free_coordinate_is_its_own_parameter():
    """What a position's text is made of, in all positions."""
    for number in GROUPS:
        for position in group(number).positions:
            rows = position.matrix[position.free]
            assert (rows == np.eye(3, dtype=int)[position.free]).all() and not position.shift[position.free].any()


def test_tables_are_small():
    tables = PlaceTables.build()
    assert sum(x.nbytes for x in vars(tables).values()) < 50_000
    assert len(tables.condition_start) == 1731
