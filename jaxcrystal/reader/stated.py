"""What a CIF states of its contents beside the atoms: its formula, the number of its formula units, multiplicities.

None of it makes the crystal. It is compared with the crystal, so that a file from which atoms are missing, or whose
symmetry was misread, does not pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.reader.orbits import Sites
from jaxcrystal.reader.rows import Refused
from jaxcrystal.reader.symbols import element

#: Values as they are written, by tag in small letters.
Values = Mapping[str, Sequence[str]]

_FORMULAS = ("_chemical_formula_sum", "_chemical_formula_structural", "_chemical_formula_moiety")
_OTHER_FORMULAS = ("_chemical_formula_iupac", "_chemical_formula_analytical")
_MULTIPLICITIES = ("_atom_site_site_symmetry_multiplicity", "_atom_site_symmetry_multiplicity")
_PART = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d*)?|\.\d+)?")

#: Of shares of a formula: 0.333 is a third.
SAME_SHARE = 2e-3


def formula_problem(values: Values, atoms: Sites) -> str:
    """Why the atoms are not those of the stated formula; empty if they are, or if none is stated that can be read."""
    text = formula_text(values)
    stated = formulas(text) if text else []
    counts = Counter(ELEMENTS[z] for z in atoms.species)
    found = " ".join(f"{symbol}{n}" for symbol, n in sorted(counts.items()))
    if stated and not any(_same_shares(counts, formula) for formula in stated):
        return f"the CIF states {text}, its atoms are {found}"
    for tag in (*_FORMULAS, *_OTHER_FORMULAS):  # with brackets and charges they tell the elements at least
        for text in values.get(tag, ()):
            readings = formulas(_unquoted(text)) or [_elements(text)]
            if not any(set(reading) <= counts.keys() for reading in readings):
                return f"the CIF states {_unquoted(text)}, its atoms are {found}"
    kinds = zip(values.get("_atom_type_symbol", ()), values.get("_atom_type_number_in_cell", ()), strict=False)
    for kind, number in kinds:
        with suppress(Refused):  # what is no element is refused at the sites, if they name it
            if number.isdecimal() and int(number) and element(_unquoted(kind))[0] not in counts:
                return f"the CIF states {number} {kind} in the cell, its atoms are {found}"
    return ""


def _elements(text: str) -> set[str]:
    """The elements that a formula with brackets, charges and multipliers names; empty if other words are in it."""
    letters = re.sub(r"[^A-Za-z]+", " ", _unquoted(text)).split()
    found = []
    for word in letters:
        parts = re.findall(r"[A-Z][a-z]?", word)
        if "".join(parts) != word or any(part not in ATOMIC_NUMBER and part != "D" for part in parts):
            return set()
        found += ["H" if part == "D" else part for part in parts]
    return set(found)


def _unquoted(text: str) -> str:
    return text.strip("'\";\n\r ")


def contents_are_stated(values: Values) -> bool:
    """Whether a CIF says how many atoms its cell has."""
    text = formula_text(values)
    return any(tag in values for tag in _MULTIPLICITIES) or bool("_cell_formula_units_z" in values and text)


def _same_shares(counts: Mapping[str, int], formula: Mapping[str, float]) -> bool:
    total, of_formula = sum(counts.values()), sum(formula.values())
    return counts.keys() == formula.keys() and all(
        abs(counts[symbol] / total - n / of_formula) <= SAME_SHARE * n / of_formula for symbol, n in formula.items()
    )


def number_problem(values: Values, atoms: Sites) -> str:
    """Why there are more or fewer atoms than multiplicities, or formula and formula units, say; empty if there are not.

    The formula is that of one unit; or of the whole cell, as pymatgen writes it, whose counts the units then divide.
    """
    column = next((values[tag] for tag in _MULTIPLICITIES if tag in values), ())
    if column and all(text.isdecimal() for text in column) and sum(map(int, column)) != len(atoms):
        return f"the sites' multiplicities make {sum(map(int, column))} atoms of {len(atoms)}"
    units = next((int(v) for v in values.get("_cell_formula_units_z", ()) if v.isdecimal()), None)
    text = formula_text(values)
    for formula in formulas(text) if text and units else ():
        unit = sum(formula.values())
        expected = {units * unit} | ({unit} if all(n % units == 0 for n in formula.values()) else set())
        if any(abs(len(atoms) - n) < 0.5 for n in expected):
            return ""
    return f"Z = {units} of {text} make other than {len(atoms)} atoms" if units and text and formulas(text) else ""


def formula_text(values: Values) -> str | None:
    """The formula as it is written: the sum, or else another kind that says the same."""
    for tag in _FORMULAS:
        for value in values.get(tag, ()):
            text = _unquoted(value)
            if text not in ("", ".", "?") and (tag == _FORMULAS[0] or formulas(text)):
                return text
    return None


def formulas(text: str) -> list[dict[str, float]]:
    """Atoms by element that a formula may mean: `CO2` of one word is carbon and oxygen, `CO2 H` may begin with cobalt.

    Empty for what is no list of elements, brackets included.
    """
    words = re.split(r"[\s,]+", text.strip())
    whole = [re.fullmatch(r"([A-Za-z]{1,2})(\d+\.?\d*|\.\d+)?", word) for word in words]
    read = [[(m[1].title(), m[2]) for m in whole]] if all(whole) and len(words) > 1 else []
    if all(re.fullmatch(f"(?:{_PART.pattern})+", word) for word in words):
        read.append([part for word in words for part in _PART.findall(word)])
    found = []
    for parts in read:
        counts: Counter[str] = Counter()
        for symbol, n in parts:
            counts["H" if symbol in ("D", "T") else symbol] += float(n or 1)
        counts = Counter({symbol: n for symbol, n in counts.items() if n})
        if counts and counts.keys() <= ATOMIC_NUMBER.keys() and counts not in found:
            found.append(counts)
    return found
