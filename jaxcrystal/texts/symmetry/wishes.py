"""What a crystal must be, as arrays; and what no crystal can be, in words, before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from flax import struct
from jaxtyping import Bool, Int, Int32

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.wyckoff import GROUPS, SYSTEMS, system
from jaxcrystal.errors import UserError
from jaxcrystal.texts.constraints import LONGEST, Constraints
from jaxcrystal.texts.intervals import WHOLE, interval
from jaxcrystal.texts.kept import CELL, Kept
from jaxcrystal.texts.pieces import EMPTY
from jaxcrystal.texts.symmetry.kept import KeptOrbits, kept_cell, kept_orbits
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS, MOST_ELEMENTS, Kind, KindTables, kind_of, kinds, most_orbits
from jaxcrystal.texts.symmetry.reach import EXTRA, NEXT, Wish
from jaxcrystal.texts.symmetry.words import ORDER, WordTables

LOOKED_AT = 512  #: atoms of the largest cell that an error speaks of
NAMED = 12  #: space groups that an error names


class Tables(WordTables, Protocol):
    """The tokens that texts are made of."""

    digits: Int[np.ndarray, "numbers"]  #: of all numbers of one digit, then, as far as the vocabulary groups them, more
    point: int
    newline: int
    eos: int
    group: int  #: digits of the widest


@struct.dataclass
class Limits:
    """One set of constraints as arrays, or those of many slots with a leading axis: what `Grammar.limits` gives."""

    low: Int32[np.ndarray, "*slots 6"]  #: least value of a, b, c, α, β, γ, in units of its last decimal
    high: Int32[np.ndarray, "*slots 6"]
    wish: Wish


def most_atoms(tables: Tables, text: TextFormat, limit: int) -> int:
    """Atoms of a primitive cell whose text is sure to fit: each may be an orbit, each of the first ten an element.

    Raises UserError if there is none.
    """
    symbol, spaced, letter = (
        int((rows != EMPTY).sum(1).max()) for rows in (tables.elements, tables.spaced_elements, tables.letters)
    )
    digits = lambda number: -(-number // tables.group)  # noqa: E731
    orbit = symbol + letter + 3 * (1 + digits(text.coord_decimals)) + 1
    element = max(symbol, spaced) + 1 + digits(len(str(MOST_ATOMS)))
    parameters = sum(3 * (digits(WHOLE) + (n > 0) + digits(n) + 1) for n in (text.length_decimals, text.angle_decimals))
    left = limit - (1 + digits(len(str(len(GROUPS)))) + 1) - parameters
    most = max((n for n in range(MOST_ATOMS + 1) if n * orbit + min(n, MOST_ELEMENTS) * element <= left), default=0)
    if most < 1:
        raise UserError(
            f"a crystal of one atom can take {limit - left + orbit + element} tokens, but max_new_tokens is {limit}"
        )
    return most


def limits(constraints: Constraints, text: TextFormat, most: int, limit: int) -> Limits:
    """The constraints as arrays, for crystals of up to `most` atoms, which are sure to fit into `limit` tokens.

    Raises UserError if no crystal meets them.
    """
    a = interval("lengths", constraints.lengths, text.length_decimals, below=LONGEST)
    b = interval("angles", constraints.angles, text.angle_decimals, below=180)
    low, high = np.array([a] * 3 + [b] * 3, np.int32).T
    numbers = _groups(constraints, b, text.angle_decimals)
    if constraints.kept is not None and constraints.kept.cell is not None:
        low = high = _kept_cell(constraints.kept, numbers, text, low, high)
    kept = kept_orbits(constraints, text, most, limit)
    atoms = _num_atoms(constraints, most, limit)
    places = {ELEMENTS[number]: place for place, number in enumerate(ORDER) if place}
    unit = np.array([constraints.unit[ELEMENTS[number]] for number in ORDER], np.int32)
    permitted = _flags(len(ORDER), (places[symbol] for symbol in constraints.permitted))
    required = _flags(len(ORDER), (places[symbol] for symbol in constraints.required)) | (unit > 0) | (kept.atoms > 0)
    if required.sum() > MOST_ELEMENTS:
        raise UserError(f"{required.sum()} elements are required, but a text names {MOST_ELEMENTS} at most")
    of = KindTables.build().of
    found = [kinds()[i] for i in sorted({int(of[number]) for number in numbers})]
    counts = unit[unit > 0].tolist()
    multiples = _multiples(counts, found, atoms, kept=kept.atoms[unit > 0].tolist(), state=int(kept.state))
    first = NEXT if counts and multiples else 0 if counts else _first(permitted, required, found, atoms, kept)
    if not first and kept.atoms.any():
        what = constraints.formula or f"a crystal of {required.sum()} elements"
        raise UserError(
            f"{what} with {_within(atoms)} in the primitive cell does not fit around the {kept.atoms.sum()} that are "
            f"kept in space group {numbers[0]}; keep fewer sites, or allow other numbers of atoms"
        )
    if not first:
        fits = f" (max_new_tokens is {limit}, which holds {most})" if atoms[1] == most < MOST_ATOMS else ""
        raise UserError(_refusal(constraints, numbers, int(required.sum()), atoms, fits))
    return Limits(
        low=low,
        high=high,
        wish=Wish(
            permitted=permitted,
            required=required,
            unit=unit,
            multiples=_flags(MOST_ATOMS + 1, multiples),
            num_atoms=np.array(atoms, np.int32),
            groups=_flags(len(GROUPS) + 1, numbers),
            states=_flags(len(kinds()), of[numbers]).astype(np.uint32) << kept.state.astype(np.uint32),
            kept=kept,
            search=np.array(not counts and not any(kind.often == (1,) for kind in found)),
            first=np.array(first, np.int32),
        ),
    )


def _kept_cell(
    kept: Kept, numbers: Sequence[int], text: TextFormat, low: Int32[np.ndarray, "6"], high: Int32[np.ndarray, "6"]
) -> Int32[np.ndarray, "6"]:
    """A kept cell as it is written. Raises UserError where that is none, or not within the intervals."""
    values = kept_cell(kept, numbers, text)
    for field in SYSTEMS[system(numbers[0])][0]:
        if not low[field] <= values[field] <= high[field]:
            unit = 10 ** (text.length_decimals if field < 3 else text.angle_decimals)
            raise UserError(
                f"the cell cannot be kept: its {CELL[field]} is {kept.cell[field]:g}, not within {low[field] / unit:g} "
                f"and {high[field] / unit:g}"
            )
    return values


def _flags(size: int, places: Iterable[int]) -> Bool[np.ndarray, "size"]:
    return np.isin(np.arange(size), list(places))


def _groups(constraints: Constraints, angles: tuple[int, int], decimals: int) -> list[int]:
    """Numbers of the groups whose cells have such angles."""
    low, high = angles
    unit = 10**decimals
    wanted = sorted(set(GROUPS if constraints.space_groups is None else constraints.space_groups))
    fitting = {
        name
        for name, (_, _, fixed) in SYSTEMS.items()
        if all(low <= angle * unit <= high for angle in fixed if angle is not None)
        and (any(angle is not None for angle in fixed) or 3 * low < 360 * unit)
    }
    found = [number for number in wanted if system(number) in fitting]
    if not found:
        stated = f"angles from {constraints.angles[0]} to {constraints.angles[1]}"
        what = "no space group" if constraints.space_groups is None else f"none of the space groups {_named(wanted)}"
        raise UserError(f"{what} has a conventional cell with {stated}, as the model writes them")
    return found


def _num_atoms(constraints: Constraints, most: int, limit: int) -> tuple[int, int]:
    low, high = constraints.num_atoms
    low = max(low, len(set(constraints.required)))
    if low > most:
        why = (
            f"a text by symmetry describes {MOST_ATOMS} at most"
            if most == MOST_ATOMS
            else f"max_new_tokens is {limit}, which holds {most} for sure"
        )
        raise UserError(f"a crystal of {low} atoms in the primitive cell is asked for, but {why}")
    return low, min(high or most, most)


def _multiples(
    counts: Sequence[int],
    found: Sequence[Kind],
    atoms: tuple[int, int],
    most: int = MOST_ATOMS,
    kept: Sequence[int] = (),
    state: int = 0,
) -> list[int]:
    """How many times a formula can be in a crystal of some kind, within a number of atoms, of which some of each
    element lie there already and lead to a state."""
    if not counts:
        return []
    low, high = atoms
    kept = kept or [0] * len(counts)
    times = range(-(-low // sum(counts)), high // sum(counts) + 1)
    left = {k: [k * count - there for count, there in zip(counts, kept, strict=True)] for k in times}
    return [k for k in times if any(kind.holds(left[k], most, state) for kind in found)]


def _first(
    permitted: Bool[np.ndarray, "119"],
    required: Bool[np.ndarray, "119"],
    found: Sequence[Kind],
    atoms: tuple[int, int],
    kept: KeptOrbits,
) -> int:
    """What may come first in a composition without a formula: the required element, others; 0: nothing."""
    missing = int(required.sum())
    due = int(np.argmax(required)) if missing else len(required)
    there, total = int((kept.atoms > 0).sum()), int(kept.atoms.sum())  # elements that need no orbit more; atoms
    low, high = atoms
    sites = _sites(found, (max(0, low - total), high - total), int(kept.state)) if high >= total else -1
    extra = permitted[:due].any() and missing < MOST_ELEMENTS and sites > missing - there
    return NEXT * (missing > 0 and sites >= missing - there) + EXTRA * bool(extra)


def _sites(found: Sequence[Kind], atoms: tuple[int, int], state: int = 0) -> int:
    """The most orbits of a crystal of some kind, within a number of atoms, from a state on."""
    low, high = atoms
    return max((int(most_orbits(kind, LOOKED_AT, state)[low : high + 1].max(initial=-1)) for kind in found), default=-1)


def _refusal(constraints: Constraints, numbers: Sequence[int], required: int, atoms: tuple[int, int], fits: str) -> str:
    """Why no crystal is possible, and what would be."""
    low, _ = atoms
    counts = sorted(constraints.unit.values())

    def possible(number: int, atoms: tuple[int, int]) -> bool:
        kind = kind_of(number)
        if counts:
            return bool(_multiples(counts, [kind], atoms, LOOKED_AT))
        return _sites([kind], atoms) >= max(required, 1)

    larger = (n for n in range(low, LOOKED_AT + 1) if any(possible(number, (n, n)) for number in numbers))
    least = next(larger, None)
    what = constraints.formula or (f"a crystal of {required} elements" if required > 1 else "a crystal")
    where = "any space group" if len(numbers) == len(GROUPS) else f"space group {_named(numbers)}"
    which = "smallest" if low == 1 else "next larger"
    smallest = f"the {which} one there has {least}" if least else f"none there of up to {LOOKED_AT} is"
    others = [number for number in GROUPS if possible(number, atoms)]
    instead = f"; possible in {_named(others)}" if others else ""
    return f"{what} with {_within(atoms)} in the primitive cell is not possible in {where}, {smallest}{fits}{instead}"


def _within(atoms: tuple[int, int]) -> str:
    low, high = atoms
    return f"{low} atoms" if low == high else f"{low} to {high} atoms"


def _named(numbers: Sequence[int]) -> str:
    """Some of them."""
    shown = ", ".join(map(str, numbers[:NAMED]))
    return shown if len(numbers) <= NAMED else f"{shown} and {len(numbers) - NAMED} more"
