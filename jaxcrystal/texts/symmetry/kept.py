"""Orbits of a crystal that is there, which a text by symmetry repeats: first of those of their element.

composition    Sr 1 Ti 1 O 3      an element has at least the atoms of its kept orbits; what is left of it is shared
                                  out among the positions that they leave (`reach`, from the state they lead to)
orbits         Ti b               kept: nothing else may come
               O c                …
               Sr a               free: anywhere but where a kept orbit lies, be it written before or after
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import struct
from jaxtyping import Int8, Int16, Int32, UInt32

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal, closes
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal, cell_of
from jaxcrystal.crystals.wyckoff import GROUPS, LETTERS, SYSTEMS, group, system
from jaxcrystal.errors import UserError
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.kept import Keeping, Kept, Site
from jaxcrystal.texts.parsing import ParseError, ParseErrorKind
from jaxcrystal.texts.symmetry.kinds import KindTables
from jaxcrystal.texts.symmetry.text import parse, write
from jaxcrystal.texts.symmetry.words import ORDER

PLACES = {number: place for place, number in enumerate(ORDER)}  #: of atomic numbers in the order of formulas


@struct.dataclass
class KeptOrbits:
    """Of one text, or of many slots with a leading axis; arrays are as long as a text has orbits at most."""

    elements: Int8[np.ndarray, "*slots orbits"]  #: places in the order of formulas, which rise; 0 behind the last
    letters: Int8[np.ndarray, "*slots orbits"]  #: places in the alphabet of positions
    points: Int16[np.ndarray, "*slots orbits 3"]  #: free coordinates in units of the last decimal; 0 where none is free
    atoms: Int32[np.ndarray, "*slots 119"]  #: of each element, in a primitive cell
    state: Int32[np.ndarray, "*slots"]  #: of the group's kind, that all of them lead to
    once: UInt32[np.ndarray, "*slots"]  #: letters without free coordinates that they take, a bit each


def keeping(crystal: Crystal, sites: Sequence[int], cell: bool, space_group: bool, symprec: float) -> Keeping:
    """How texts repeat some sites of a crystal, its cell, its space group, which is looked for within `symprec` Å.

    Sites imply the group, and each its orbit. A cell without either keeps the groups whose lattices have it: those of
    its crystal system and centring. Raises UserError for a crystal that has no space group.
    """
    from jaxcrystal.crystals.symmetry import orbits_of_atoms

    found = orbits_of_atoms(crystal, symprec)
    if found is None:
        raise UserError(f"{crystal.formula} has no space group at any tolerance: its atoms lie on each other")
    whole, orbit_of = found
    here = whole.group
    chosen = sorted({int(orbit_of[i]) for i in sites})
    orbits = [whole.orbits[i] for i in chosen]
    kept = tuple(Site(orbit.symbol, tuple(map(float, orbit.frac_coords)), orbit.letter) for orbit in orbits)
    groups = None
    if sites or space_group:
        groups = (whole.space_group,)
    elif cell:
        alike = (group(number) for number in GROUPS)
        groups = tuple(g.number for g in alike if (g.system, g.symbol[0]) == (here.system, here.symbol[0]))
    notes = []
    with_them = np.flatnonzero(np.isin(orbit_of, chosen))
    if more := sorted(set(with_them.tolist()) - set(sites)):
        named = ", ".join(f"{site.symbol} {site.letter}" for site in kept)
        notes.append(f"sites are kept with their orbits of space group {here.number} ({named}): {_listed(more)} too")
    edges = (*whole.lengths.tolist(), *whole.angles.tolist()) if cell else None
    atoms, every = sum(whole.composition.values()), len(chosen) == len(whole.orbits)
    return Keeping(Kept(kept, edges), atoms, every, groups, tuple(notes))


def _listed(sites: Sequence[int]) -> str:
    return f"site{'s' * (len(sites) > 1)} {', '.join(map(str, sites))}"


def kept_orbits(constraints: Constraints, fmt: TextFormat, most: int, limit: int) -> KeptOrbits:
    """Those of some constraints, in texts of up to `most` orbits, which are sure to fit into `limit` tokens.

    Raises UserError where sites are kept without their group, or cannot be written with these decimals.
    """
    found = KeptOrbits(
        elements=np.zeros(most, np.int8),
        letters=np.zeros(most, np.int8),
        points=np.zeros((most, 3), np.int16),
        atoms=np.zeros(len(ORDER), np.int32),
        state=np.array(0, np.int32),
        once=np.array(0, np.uint32),
    )
    sites = constraints.kept.sites if constraints.kept else ()
    if not sites:
        return found
    if len(constraints.space_groups or ()) != 1:
        raise UserError("kept sites imply their space group: state that one, and no other, in space_groups")
    (number,) = constraints.space_groups
    tables = KindTables.build()
    state = once = 0
    for i, (orbit, values) in enumerate(zip(*_written(sites, number, fmt), strict=True)):
        letter = LETTERS.index(orbit.letter)
        place = PLACES[orbit.species]
        found.atoms[place] += tables.atoms[number, letter]
        if found.atoms.sum() > most:
            raise UserError(
                f"{found.atoms.sum()} atoms and more are kept in the primitive cell, but max_new_tokens is {limit}, "
                f"which holds {most} for sure"
            )
        found.elements[i], found.letters[i], found.points[i] = place, letter, values
        state += int(tables.stride[number, letter])
        once |= (tables.free[number, letter] == 0) << letter
    return found.replace(state=np.array(state, np.int32), once=np.array(once, np.uint32))


def _written(
    sites: Sequence[Site], number: int, fmt: TextFormat
) -> tuple[tuple[Orbit, ...], list[Int16[np.ndarray, "3"]]]:
    """The orbits, and the values of their free coordinates as they are written, in the order of elements."""
    cell = cell_of(system(number), np.array([5.0 if place < 3 else 80.0 for place in SYSTEMS[system(number)][0]]))
    orbits = tuple(Orbit(ATOMIC_NUMBER[site.symbol], site.letter, site.frac_coords) for site in sites)
    orbits = tuple(sorted(orbits, key=lambda orbit: PLACES[orbit.species]))
    text = write(SymmetricCrystal(number, cell[:3], cell[3:], orbits), fmt)
    try:
        parse(text)
    except ParseError as error:
        raise UserError(f"with {fmt.coord_decimals} decimals the kept sites are no crystal any more: {error}") from None
    values = []
    for orbit, line in zip(orbits, text.split("\n")[2:-1], strict=True):
        value = np.zeros(3, np.int16)
        value[group(number).position(orbit.letter).free] = [int(word) for word in line.split(" ")[2:]]
        values.append(value)
    return orbits, values


def kept_cell(kept: Kept, numbers: Sequence[int], fmt: TextFormat) -> Int32[np.ndarray, "6"]:
    """a, b, c, α, β, γ of a kept cell as they are written. Raises UserError unless it is one in all these groups."""
    shapes = {system(number) for number in numbers}
    if len(shapes) > 1:
        raise UserError(
            f"a cell is kept with its crystal system, but the space groups left are {', '.join(sorted(shapes))}"
        )
    decimals = [fmt.length_decimals] * 3 + [fmt.angle_decimals] * 3
    written = [f"{x:.{d}f}" for x, d in zip(kept.cell, decimals, strict=True)]
    cell = np.array(list(map(float, written)))
    if not closes(cell[:3], cell[3:]):
        raise UserError(f"the cell cannot be kept: written as {' '.join(written)} it does not close")
    return np.array([int(number.replace(".", "")) for number in written], np.int32)


def restored(crystal: SymmetricCrystal, kept: Kept) -> SymmetricCrystal:
    """A crystal that was read, with what is kept as it was. Raises ParseError where that meets what is beside it."""
    left = sorted(kept.sites, key=lambda site: PLACES[ATOMIC_NUMBER[site.symbol]])
    orbits = []
    for orbit in crystal.orbits:
        if left and left[0].symbol == orbit.symbol:
            orbit = Orbit(orbit.species, orbit.letter, left.pop(0).frac_coords)
        orbits.append(orbit)
    cell = np.array(kept.cell or (*crystal.lengths, *crystal.angles))
    try:
        return SymmetricCrystal(crystal.space_group, cell[:3], cell[3:], tuple(orbits))
    except UserError as error:
        raise ParseError(ParseErrorKind.ORBIT, 3, "orbits apart from those that are kept", str(error)) from None
