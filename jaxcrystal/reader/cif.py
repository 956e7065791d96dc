"""The crystal that a block of a CIF describes, with every atom of its cell.

gemmi reads the syntax (CIF 1.1, Hall et al., Acta Cryst. A47, 655 (1991)): it refuses a tag that occurs twice, a loop
that lacks a value, an unclosed quote. What the values mean is decided here:

- Symmetry is what the listed operations say; without them, what Hall symbol, Hermann-Mauguin name and number say
  (`settings.py`). A file that states none of these lists every atom, and a note says that this was assumed. Statements
  that contradict each other, the cell or the stated contents refuse the row: it never becomes P1 in silence.
- With the identity alone, atoms are read as they stand, coincident ones too: they are what validity has to see.
- What is missing (`.` or `?`) is missing. Only an occupancy has a default, 1.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal, closes
from jaxcrystal.reader.orbits import Sites, expand, metric_of, same_atoms
from jaxcrystal.reader.rows import Outcome, Refused
from jaxcrystal.reader.settings import Operations, Setting, Stated, ambiguous, candidates, of_gemmi, tabulated
from jaxcrystal.reader.settings import settings as all_settings
from jaxcrystal.reader.stated import (
    Values,
    contents_are_stated,
    formula_problem,
    formula_text,
    formulas,
    number_problem,
)
from jaxcrystal.reader.symbols import element, element_of_label

#: Deviation of an occupancy from 1 that is rounding.
FULL = 1.1e-3

WRAPPED = "coordinates moved into the cell by whole edges"

_OPERATIONS = ("_space_group_symop_operation_xyz", "_symmetry_equiv_pos_as_xyz")
#: By field of `Stated`.
_SYMMETRY = {
    "hall": ("_space_group_name_hall", "_symmetry_space_group_name_hall"),
    "names": (
        "_space_group_name_h-m_alt",
        "_space_group_name_h-m_full",
        "_space_group_name_h-m",
        "_symmetry_space_group_name_h-m",
        "_symmetry_space_group_name_h-m_full",
        "_symmetry_group_name_h-m",
    ),
    "numbers": (
        "_space_group_it_number",
        "_symmetry_int_tables_number",
        "_space_group_number",
        "_symmetry_space_group_number",
    ),
    "groups": ("_space_group_name_h-m_ref",),
    "codes": ("_space_group_it_coordinate_system_code",),
}
#: Tags of what is no crystal of one fixed cell.
_BEYOND = {
    re.compile(r"_cell_modulation|_cell_wave_vector|_.*_ssg_"): "modulated",
    re.compile(r"_space_group_magn|_space_group_symop_magn|_parent_space_group|_magnetic_space_group"): "magnetic",
}
#: Tags that are about symmetry and say nothing of it.
_IDLE = re.compile(r"_.*_(id|refid|site_id|description)$")

_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?:\(\d*\)(?:[eE][+-]?\d+)?)?")


@dataclass(frozen=True)
class Found:
    """A crystal and what was changed or left unused to have it."""

    crystal: Crystal
    notes: tuple[str, ...]


def blocks(text: str) -> list[str | None]:
    """Names of the structures that the text of a file holds; [None] if it is one, or none, or cannot be parsed."""
    if len(re.findall(r"^[ \t]*data_", text, re.IGNORECASE | re.MULTILINE)) < 2:
        return [None]
    try:
        found = [block.name for block in _parse(text) if _is_structure(_values(block))]
    except Refused:
        return [None]
    return found if len(found) > 1 else [None]


def read_cif(text: str, block: str | None = None) -> Found:
    """The crystal of the one structure in a CIF, or of the block of that name. Raises Refused."""
    every = {b.name: _values(b) for b in _parse(text)}
    found = {name: values for name, values in every.items() if _is_structure(values) and block in (None, name)}
    if len(found) > 1:
        reason = f"the CIF holds {len(found)} structures ({', '.join(found)}), expected one"
        raise Refused(Outcome.CIF_ERROR, reason)
    if not found:
        tags = {tag for values in every.values() for tag in values}
        raise Refused(Outcome.CIF_ERROR, _lacks(tags))
    ((name, values),) = found.items()
    if not _states_symmetry(values):
        for other, statements in every.items():
            if other != name and not _is_structure(statements) and _states_symmetry(statements):
                reason = f"the symmetry is stated in another block ({other!r}) than the atoms; bring them together"
                raise Refused(Outcome.SYMMETRY_ERROR, reason)
    return _crystal(values)


def _states_symmetry(values: Values) -> list[str]:
    """Tags that say something of symmetry, whether or not it is understood."""
    return [
        tag
        for tag, column in values.items()
        if tag.startswith(("_symmetry_", "_space_group_")) and not _IDLE.match(tag)
        if any((_plain(value) or "triclinic").lower() != "triclinic" for value in column)
    ]


def _lacks(tags: set[str]) -> str:
    if "_cell_length_a" not in tags:
        return "the CIF has no _cell_length_a"
    if not any(tag.startswith("_atom_site_") for tag in tags):
        return "the CIF has no _atom_site_fract_x"
    return "no block has both a cell (_cell_length_a) and atoms (_atom_site_fract_x)"


def _parse(text: str) -> Any:
    import gemmi

    # CIF is ASCII. Beyond it are names of authors, and what an editor made of blanks and minus signs.
    plain = text.strip("\ufeff\x00\x0c\x1a").replace("\u00a0", " ").replace("−", "-")
    plain = re.sub(r"(\d)[\u0304\u0305]", r"-\1", plain).encode("ascii", "replace")
    try:
        document = gemmi.cif.read_string(plain, check_level=0)  # what occurs twice is looked at in `_values`
    except (ValueError, RuntimeError) as error:
        reason = str(error).removeprefix("data:").removeprefix("string:")
        where = re.match(r"(\d+)(?::(\d+)\(\d+\))?:? (?:in (\S+): )?", reason)
        said = reason[where.end() :] if where else reason.strip()
        raise Refused(Outcome.CIF_ERROR, f"line {where[1]}: {said}" if where else said) from None
    twice = [name for name, n in Counter(block.name.lower() for block in document).items() if n > 1]
    if twice:
        raise Refused(Outcome.CIF_ERROR, f"two blocks of the CIF have the name {twice[0]!r}")
    return document


def _values(block: Any) -> Values:
    """Values by tag, in small letters and with the older names' underscore for the newer names' dot.

    That of a tag which stands alone is a tuple of one, those of a loop are a list.
    """
    found: dict[str, Sequence[str]] = {}
    for item in block:
        if item.pair is not None:
            columns = [(item.pair[0], (item.pair[1],))]
        elif item.loop is not None:
            tags, values = item.loop.tags, list(item.loop.values)
            columns = [(tag, values[i :: len(tags)]) for i, tag in enumerate(tags)]
        else:
            continue
        for tag, column in columns:
            name = tag.lower().replace(".", "_")
            if "" in column:
                raise Refused(Outcome.CIF_ERROR, f"{tag} has no value")
            if list(found.setdefault(name, column)) != list(column):
                raise Refused(Outcome.CIF_ERROR, f"{tag} occurs twice, with different values")
    return found


def _is_structure(values: Values) -> bool:
    listed = ("_atom_site_fract_x", "_atom_site_cartn_x", "_atom_site_label", "_atom_site_type_symbol")
    return "_cell_length_a" in values and any(tag in values for tag in listed)


def _plain(value: str) -> str | None:
    """Without its quotes; None for `.` and `?`, which some write with quotes."""
    if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1:
        value = value[1:-1].strip()
    elif value[0] == ";":
        value = value.strip("; \t\r\n")
    return None if value in ("", ".", "?") else value


def _stated(values: Values, tags: Sequence[str]) -> tuple[str, ...]:
    """The different values of tags that mean the same."""
    found = [plain for tag in tags for value in values.get(tag, ()) if (plain := _plain(value)) is not None]
    return tuple({re.sub(r"\s", "", text): text for text in found}.values())


def _number(text: str, what: str) -> float:
    plain = _plain(text)
    if plain is None:
        missing = Outcome.MISSING_ATOMS if what == "a coordinate" else Outcome.CIF_ERROR
        raise Refused(missing, f"{what} is missing ({text})")
    match = _NUMBER.fullmatch(plain)
    if match and math.isfinite(number := float(match[1])):
        return number
    if match or plain.strip("+-").lower() in ("nan", "inf", "infinity"):
        raise Refused(Outcome.NOT_FINITE, f"{what} is not a finite number: {plain}")
    raise Refused(Outcome.CIF_ERROR, f"{what} is no number: {plain[:40]!r}")


def _crystal(values: Values) -> Found:
    for pattern, word in _BEYOND.items():
        for tag in filter(pattern.match, values):
            if any(_plain(value) not in (None, "0") for value in values[tag]):
                raise Refused(Outcome.SYMMETRY_ERROR, f"the structure is {word} ({tag}), which is not read")
    lengths, angles = _cell(values)
    notes: dict[str, None] = {}  # in the order in which they came up
    species = _species(values, notes)
    coords = _coordinates(values, len(species))
    _check_occupancies(values, notes)
    _check_hydrogens(values)
    if outside(coords):
        notes[WRAPPED] = None
    metric = metric_of(lengths, angles)
    atoms = _whole_cell(values, Sites(np.array(species), coords), metric)
    crystal = Crystal(lengths, angles, atoms.species, atoms.frac_coords)
    _compare(values, crystal, notes)
    return Found(crystal, (*notes, *atoms.notes))


def outside(coords: Float[np.ndarray, "atoms 3"]) -> bool:
    """Whether a fractional coordinate lies beyond the cell, by more than rounding."""
    return bool(((coords < -1e-6) | (coords >= 1)).any())


def _cell(values: Values) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    def one(tag: str, what: str) -> float:
        if not isinstance(values.get(tag), tuple):
            raise Refused(Outcome.CIF_ERROR, f"{tag} stands in a loop" if tag in values else f"the CIF has no {tag}")
        return _number(values[tag][0], what)

    lengths = np.array([one(f"_cell_length_{axis}", "a cell length") for axis in "abc"])
    angles = np.array([one(f"_cell_angle_{name}", "a cell angle") for name in ("alpha", "beta", "gamma")])
    check_cell(lengths, angles)
    return lengths, angles


def check_cell(lengths: Float[np.ndarray, "3"], angles: Float[np.ndarray, "3"]) -> None:
    """Raises Refused (cell_error) for lengths (Å) and angles (degrees) that `Crystal` does not take."""
    if not np.isfinite(lengths).all() or not np.isfinite(angles).all():
        what = "angle" if np.isfinite(lengths).all() else "length"
        raise Refused(Outcome.NOT_FINITE, f"a cell {what} is not a finite number")
    if not ((lengths > 0) & (lengths < 256)).all():
        raise Refused(Outcome.CELL_ERROR, f"lengths must lie between 0 and 256 Å, found {lengths.tolist()}")
    if not ((angles > 0) & (angles < 180)).all():
        raise Refused(Outcome.CELL_ERROR, f"angles must lie between 0 and 180 degrees, found {angles.tolist()}")
    if not closes(lengths, angles):
        raise Refused(
            Outcome.CELL_ERROR, f"no cell closes with the lengths {lengths.tolist()} and the angles {angles.tolist()}"
        )


def _species(values: Values, notes: dict[str, None]) -> list[int]:
    """Atomic numbers of the sites."""
    texts = values.get("_atom_site_type_symbol", values.get("_atom_site_label"))
    if texts is None:
        raise Refused(Outcome.CIF_ERROR, "the CIF has neither _atom_site_type_symbol nor _atom_site_label")
    if not texts:
        raise Refused(Outcome.NO_ATOMS, "the CIF lists no atoms")
    read = element if "_atom_site_type_symbol" in values else element_of_label
    species = []
    for text in texts:
        plain = _plain(text)
        if plain is None:
            raise Refused(Outcome.UNKNOWN_ELEMENT, f"a site's element is missing ({text})")
        symbol, changed = read(plain)
        species.append(ATOMIC_NUMBER[symbol])
        notes |= dict.fromkeys(changed)
    return species


def _coordinates(values: Values, count: int) -> Float[np.ndarray, "atoms 3"]:
    columns = []
    for axis in "xyz":
        column = values.get(f"_atom_site_fract_{axis}")
        if column is None and f"_atom_site_cartn_{axis}" in values:
            reason = "the CIF gives Cartesian coordinates only; expected _atom_site_fract_x, _y, _z"
            raise Refused(Outcome.CIF_ERROR, reason)
        if column is None or len(column) != count:
            raise Refused(Outcome.CIF_ERROR, f"the CIF has no _atom_site_fract_{axis} for each of {count} sites")
        columns.append([_number(text, "a coordinate") for text in column])
    return np.array(columns).T


def _check_occupancies(values: Values, notes: dict[str, None]) -> None:
    """Raises Refused (disordered) unless every site is a whole atom."""
    for text in values.get("_atom_site_occupancy", ()):
        if _plain(text) is None:
            notes["an occupancy that is not stated (. or ?) read as 1"] = None
        elif abs((occupancy := _number(text, "an occupancy")) - 1) > FULL:
            raise Refused(Outcome.DISORDERED, f"a site is partially occupied: {occupancy:g}")
    if any((_plain(text) or "").lower() == "dum" for text in values.get("_atom_site_calc_flag", ())):
        raise Refused(Outcome.DISORDERED, "a site is a dummy (_atom_site_calc_flag dum), no atom")
    for text in values.get("_atom_site_disorder_group", ()):
        if _plain(text) not in (None, "0"):
            raise Refused(
                Outcome.DISORDERED, f"a site is one of several alternatives (_atom_site_disorder_group {text})"
            )
    if any(tag.startswith("_atom_site_moment") for tag in values):
        notes["magnetic moments are not kept"] = None


def _check_hydrogens(values: Values) -> None:
    """Raises Refused (missing_atoms) where hydrogen is stated without positions."""
    for text in values.get("_atom_site_attached_hydrogens", ()):
        if _plain(text) is not None and _number(text, "a count of attached hydrogens"):
            raise Refused(Outcome.MISSING_ATOMS, f"a site has {text} attached hydrogen atoms that have no positions")


def _compare(values: Values, crystal: Crystal, notes: dict[str, None]) -> None:
    """Notes what a CIF states of the whole that the crystal does not have, where that refuses no row."""
    text = formula_text(values)
    if text and not formulas(text):
        notes["the stated formula cannot be read, and was not compared"] = None
    volume = _NUMBER.fullmatch(next(iter(values.get("_cell_volume", ())), ""))
    if volume and not math.isclose(float(volume[1]), crystal.volume, rel_tol=0.01):
        notes["the stated volume is not the cell's, and was not used"] = None


def _whole_cell(values: Values, sites: Sites, metric: Float[np.ndarray, "3 3"]) -> Sites:
    """Every atom of the cell. Raises Refused (symmetry_error, formula_mismatch)."""
    stated = Stated(**{name: _stated(values, tags) for name, tags in _SYMMETRY.items()})
    triplets = (re.sub(r"^\d+\s+|\s", "", text).lower() for text in _stated(values, _OPERATIONS))
    triplets = tuple(dict.fromkeys(triplets))
    if triplets:
        atoms = _by_operations(values, _operations(triplets), stated, sites, metric)
    elif stated:
        atoms = _by_name(values, stated, sites, metric)
    elif said := _states_symmetry(values):
        reason = (
            f"symmetry is stated by {said[0]} alone, which is not read; name the space group or list the operations"
        )
        raise Refused(Outcome.SYMMETRY_ERROR, reason)
    else:
        atoms = replace(sites, notes=(*sites.notes, "no symmetry is stated: the atoms were read as they stand (P1)"))
    if problem := formula_problem(values, atoms):
        raise Refused(Outcome.FORMULA_MISMATCH, problem)
    if problem := number_problem(values, atoms):
        raise Refused(Outcome.SYMMETRY_ERROR, f"{'' if triplets or stated else 'no symmetry is stated, but '}{problem}")
    return atoms


@lru_cache(64)
def _operations(triplets: tuple[str, ...]) -> Operations:
    import gemmi

    try:
        operations = of_gemmi([gemmi.Op(triplet) for triplet in triplets])
    except (RuntimeError, ValueError) as error:
        raise Refused(Outcome.SYMMETRY_ERROR, f"an operation cannot be read: {error}") from None
    if tabulated(operations) is None and not operations.are_a_group():
        raise Refused(Outcome.SYMMETRY_ERROR, f"the {len(operations)} listed operations are no group; some are missing")
    return operations


def _by_operations(
    values: Values, operations: Operations, stated: Stated, sites: Sites, metric: Float[np.ndarray, "3 3"]
) -> Sites:
    """The operations are believed; a name or number may be that of another setting, but not of another group."""
    if not operations.fit(metric):
        raise Refused(Outcome.SYMMETRY_ERROR, "the cell contradicts the listed operations")
    named, unknown = stated.settings(metric)
    named = {words: meant for words, meant in named.items() if not words.startswith("the setting")}
    if unknown and not named and len(operations) == 1:
        raise Refused(Outcome.SYMMETRY_ERROR, f"only the identity is listed, and {unknown[0].reason}")
    notes = ["a stated space group is not known, the listed operations were used"] if unknown else []
    setting = tabulated(operations)
    number = operations.number() if setting is None else setting.number
    for words, meant in named.items():
        if number not in {setting.number for setting in meant}:
            if len(operations) > 1:
                reason = f"the listed operations are of space group {number}, which {words} contradicts"
                raise Refused(Outcome.SYMMETRY_ERROR, reason)
            if not _complete(values, meant, sites, metric):
                reason = f"only the identity is listed, of space group 1, beside {words}, whose other atoms are missing"
                raise Refused(Outcome.SYMMETRY_ERROR, reason)
            notes.append("only the identity is listed of the stated space group, but every atom: read as they stand")
        elif not words.startswith("the number") and operations.key not in {s.operations.key for s in meant}:
            notes.append("the stated name is of another setting than the listed operations, which were used")
    return expand(replace(sites, notes=(*sites.notes, *dict.fromkeys(notes))), operations, metric)


def _by_name(values: Values, stated: Stated, sites: Sites, metric: Float[np.ndarray, "3 3"]) -> Sites:
    """The setting that the name and the cell mean; where several remain, the one whose atoms are those stated, or for
    which the list is complete."""
    settings = list({setting.operations.key: setting for setting in candidates(stated, metric)}.values())
    if len(settings) == 1:
        return expand(sites, settings[0].operations, metric)
    read = []
    for setting in settings:
        with suppress(Refused):  # as images that overlap say
            read.append(expand(sites, setting.operations, metric))
    read = [atoms for atoms in read if not formula_problem(values, atoms) and not number_problem(values, atoms)]
    complete = [atoms for atoms in read if len(atoms) == len(sites)]
    chosen = read if len(read) == len(settings) or contents_are_stated(values) else complete
    if not chosen or any(not same_atoms(chosen[0], other, metric) for other in chosen[1:]):
        raise ambiguous(settings)
    return chosen[0]


def _complete(values: Values, meant: set[Setting], sites: Sites, metric: Float[np.ndarray, "3 3"]) -> bool:
    """Whether the listed atoms are all that a group makes of them, in whatever cell they stand."""
    import spglib

    numbers = {setting.number for setting in meant}
    fitting = [s for s in all_settings() if s.number in numbers and s.operations.fit(metric)]
    if any(_is_closed(sites, setting.operations, metric) for setting in fitting):
        return True
    if fitting and not (contents_are_stated(values) and not number_problem(values, sites)):
        return False  # a part of an orbit can have its group too: one atom of two has that of an inversion
    cell = np.linalg.cholesky(metric), sites.frac_coords, sites.species
    found = [spglib.get_symmetry_dataset(cell, symprec=symprec) for symprec in (0.1, 0.01, 0.001)]
    return any(one is not None and one.number in numbers for one in found)


def _is_closed(sites: Sites, operations: Operations, metric: Float[np.ndarray, "3 3"]) -> bool:
    """Whether the operations make no atom that is not listed."""
    try:
        return len(expand(sites, operations, metric)) == len(sites)
    except Refused:
        return False
