"""The ways to describe a crystal by its symmetry, and the one that stands for all.

The same crystal may be written from another origin, along other axes of the same shape, and with other atoms of its
orbits: P-1 has eight places for the origin, and what lies on a from one of them lies on g from another. `descriptions`
gives every distinct one, the canonical one first. It is the least: of the axes those with the shortest cell, then of
all origins and images the one whose orbits, in the order of texts, come first. So it is the same from whatever cell,
origin and order of atoms the crystal came.

    axes      integer matrices that map the group onto itself; only in triclinic, monoclinic and orthorhombic groups do
              some of them change the cell, so that the shortest one must be found
    origins   the shifts that go with each; along free axes (68 polar groups) an orbit of the first element lies at 0
    images    of an orbit all that lie on the first listed representative, of which the least is written

Infilling hides an element, and the order of elements decides which description is canonical: with it a text would
depend on what it hides. So `masked` gives, for each element, the canonical description of the crystal that has a
stand-in in its place (`masking`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from functools import cache

import numpy as np
from jaxtyping import Float, Int

from jaxcrystal.crystals import masking
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.formulas import ordered
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, cell_of, vectors
from jaxcrystal.crystals.wyckoff import (
    GRID,
    LETTERS,
    SYSTEMS,
    Coset,
    cosets,
    cosets_among,
    free_axes,
    group,
    normalizing,
)

DECIMALS = 4  #: to which coordinates are compared
SAME_CELL = 1e-4  #: relative difference of lengths and cosines below which two cells are the same
RANGE = {"triclinic": 1, "monoclinic": 2, "orthorhombic": 1}  #: of the matrices' entries, by crystal system


def descriptions(crystal: SymmetricCrystal) -> list[SymmetricCrystal]:
    """All distinct descriptions, apart from shifts along free axes; the canonical one first."""
    return [description for description, _ in traced(crystal)]


def traced(crystal: SymmetricCrystal) -> list[tuple[SymmetricCrystal, tuple[int, ...]]]:
    """`descriptions`, and which orbit of the crystal each of theirs is."""
    parameters, found_cosets = _axes(crystal)
    cell = cell_of(crystal.group.system, parameters)
    order = _order(crystal.composition)
    found: dict[tuple, tuple[tuple[Orbit, ...], tuple[int, ...]]] = {}
    for coset in found_cosets:
        key, *rest = _least(crystal, coset, order)
        found.setdefault(key, tuple(rest))
    each = (found[key] for key in sorted(found))
    return [(SymmetricCrystal(crystal.space_group, cell[:3], cell[3:], orbits), origins) for orbits, origins in each]


def masked(crystal: SymmetricCrystal) -> list[SymmetricCrystal]:
    """For each element of the composition, in its order, the description in which infilling hides it: the same whatever
    element it is. Orbits in the order of texts."""
    parameters, found_cosets = _axes(crystal)
    cell = cell_of(crystal.group.system, parameters)
    found, usual = [], _order(crystal.composition)
    for symbol in usual:
        left = set(usual) - {symbol}
        stand_in = ELEMENTS[masking.stand_in(left)]
        order = _order({stand_in, *left})
        order[symbol] = order.pop(stand_in)
        _, orbits, _ = min((_least(crystal, coset, order) for coset in found_cosets), key=lambda one: one[0])
        in_order = tuple(sorted(orbits, key=lambda orbit: usual[orbit.symbol]))
        found.append(SymmetricCrystal(crystal.space_group, cell[:3], cell[3:], in_order))
    return found


def _order(symbols: Collection[str]) -> dict[str, int]:
    """The places of elements in texts."""
    return {symbol: place for place, symbol in enumerate(ordered(symbols))}


def _least(
    crystal: SymmetricCrystal, coset: Coset, order: Mapping[str, int]
) -> tuple[tuple, tuple[Orbit, ...], tuple[int, ...]]:
    """What the orbits read as through a coset, by the least of their images: a key to compare, the orbits by the order
    of their elements, and where each was."""
    number, orbits = crystal.space_group, crystal.orbits
    seen = [_images(number, orbit, coset) for orbit in orbits]
    heads = [(order[orbit.symbol], LETTERS.index(letter)) for orbit, (letter, _) in zip(orbits, seen, strict=True)]
    axes = list(free_axes(number))
    shifts = [np.zeros(3)]
    if axes:
        origin = np.zeros((0, 3))
        for head, (_, points) in zip(heads, seen, strict=True):
            if head == min(heads):
                origin = np.concatenate([origin, points])
        along = np.zeros_like(origin)
        along[:, axes] = origin[:, axes]
        shifts = list(along[np.unique(np.round(along, DECIMALS), axis=0, return_index=True)[1]])
    best: tuple | None = None
    for shift in shifts:
        chosen = []
        for place, (head, orbit, (letter, points)) in enumerate(zip(heads, orbits, seen, strict=True)):
            moved = (points - shift) % 1
            rounded = np.round(moved, DECIMALS) % 1
            at = np.lexsort(rounded.T[::-1])[0]
            image = Orbit(orbit.species, letter, tuple(moved[at].tolist()))
            chosen.append(((*head, *rounded[at].tolist()), image, place))
        chosen.sort(key=lambda one: one[0])
        candidate = tuple(zip(*chosen, strict=True))
        if best is None or candidate[0] < best[0]:
            best = candidate
    return best


def _images(number: int, orbit: Orbit, coset: Coset) -> tuple[str, Float[np.ndarray, "images 3"]]:
    """The letter that an orbit has through a coset, and its points on the first listed representative."""
    letter, matrices, shifts = _maps(number, orbit.letter, coset.linear.tobytes(), coset.shift.tobytes())
    return letter, (matrices @ np.array(orbit.frac_coords) + shifts / GRID) % 1


@cache
def _maps(
    number: int, letter: str, linear: bytes, shift: bytes
) -> tuple[str, Int[np.ndarray, "images 3 3"], Int[np.ndarray, "images 3"]]:
    """How a coset, and then the operations, take a representative of a position to those of the position it becomes."""
    here = group(number)
    position = here.position(letter)
    matrix = np.frombuffer(linear, np.int64).reshape(3, 3)
    move = np.frombuffer(shift, np.int64)
    rotations, translations = here.operations.rotations, here.operations.translations
    matrices = rotations @ matrix @ position.matrix
    shifts = (rotations @ (matrix @ position.shift + move) + translations) % GRID
    for target in here.positions:
        if target.multiplicity != position.multiplicity or target.free.sum() != position.free.sum():
            continue
        left = np.eye(3, dtype=np.int64) - target.matrix
        on_it = ((left @ matrices) == 0).all((1, 2)) & ((shifts @ left.T - target.shift) % GRID == 0).all(1)
        if on_it.any():
            found = np.concatenate([matrices.reshape(-1, 9), shifts], axis=1)[on_it]
            found = np.unique(found, axis=0)
            return target.letter, found[:, :9].reshape(-1, 3, 3), found[:, 9:]
    raise AssertionError(f"space group {number}: position {letter} leads nowhere")


def _axes(crystal: SymmetricCrystal) -> tuple[Float[np.ndarray, "free"], tuple[Coset, ...]]:
    """The free parameters of the shortest cell, and all cosets that lead to it."""
    number, system = crystal.space_group, crystal.group.system
    if system not in RANGE:
        return crystal.parameters, cosets(number)
    lattice = vectors(crystal.lengths, crystal.angles)
    before = np.eye(3, dtype=np.int64)
    while True:
        matrices = _rewriting(number)
        inverse = np.round(np.linalg.inv(matrices @ before)).astype(np.int64)
        rows = inverse.transpose(0, 2, 1) @ lattice
        kept, cell = _shortest(system, rows)
        if (matrices[kept] == np.eye(3, dtype=np.int64)).all((1, 2)).any():
            break
        before = matrices[kept[0]] @ before
    chosen = tuple((matrices[i] @ before).tobytes() for i in kept)
    return cell[list(SYSTEMS[system][0])], cosets_among(number, tuple(sorted(chosen)))


def _shortest(system: str, rows: Float[np.ndarray, "n 3 3"]) -> tuple[Int[np.ndarray, "kept"], Float[np.ndarray, "6"]]:
    """Which of some cells are the shortest (several, where they have the same shape), and that shape."""
    lengths = np.linalg.norm(rows, axis=2)
    unit = rows / lengths[..., None]
    cosines = np.stack([(unit[:, i] * unit[:, j]).sum(1) for i, j in ((1, 2), (2, 0), (0, 1))], axis=1)
    a, b, c = lengths.T
    short = SAME_CELL * lengths.mean()
    kept = np.arange(len(rows))
    if system == "triclinic":  # a reduced cell has no acute angle, or no other
        acute = cosines > SAME_CELL
        kept = np.flatnonzero(~acute.any(1) | acute.all(1))
        ranked = [(a, short), (b, short), (c, short), *((column, SAME_CELL) for column in cosines.T)]
    elif system == "monoclinic":
        ranked = [(a + c, short), (a, short), (cosines[:, 1], SAME_CELL)]
    else:
        ranked = [(a, short), (b, short), (c, short)]
    for values, tolerance in ranked:
        kept = kept[values[kept] <= values[kept].min() + tolerance]
    angles = np.degrees(np.arccos(np.clip(cosines[kept[0]], -1, 1)))
    return kept, np.concatenate([lengths[kept[0]], angles])


@cache
def _rewriting(number: int) -> Int[np.ndarray, "n 3 3"]:
    """Matrices of small entries that map the group onto itself, with some shift."""
    here = group(number)
    entries = range(-RANGE[here.system], RANGE[here.system] + 1)
    shape = {
        "triclinic": np.ones((3, 3), bool),
        "monoclinic": np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool),
        "orthorhombic": np.ones((3, 3), bool),
    }[here.system]
    found = []
    for values in itertools.product(*(entries if free else (0,) for free in shape.reshape(-1))):
        matrix = np.array(values, np.int64).reshape(3, 3)
        if here.system == "orthorhombic" and not (np.abs(matrix).sum(0) == 1).all():
            continue
        determinant = round(np.linalg.det(matrix))
        if determinant == 1 or (determinant == -1 and not here.chiral):
            found.append(matrix)
    if here.system != "triclinic":  # there every unimodular matrix does
        found = [matrix for matrix in found if normalizing(number, matrix.tobytes())]
    return np.array(found)
