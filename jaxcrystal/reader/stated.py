"""What a CIF states of its contents beside the atoms: its formula, the number of its formula units, multiplicities.

None of it makes the crystal. It is compared with the crystal, so that a file from which atoms are missing, or whose
symmetry was misread, does not pass.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS
from jaxcrystal.reader.orbits import Sites

#: Values as they are written, by tag in small letters.
Values = Mapping[str, Sequence[str]]

_FORMULAS = ("_chemical_formula_sum", "_chemical_formula_structural", "_chemical_formula_moiety")
_MULTIPLICITIES = ("_atom_site_site_symmetry_multiplicity", "_atom_site_symmetry_multiplicity")
_PART = re.compile(r"([A-Z][a-z]?)(\d+(?:\.\d*)?|\.\d+)?")

#: Of shares of a formula: 0.333 is a third.
SAME_SHARE = 2e-3


def formula_problem(values: Values, atoms: Sites) -> str:
    """Why the atoms are not those of the stated formula; empty if they are, or if none is stated that can be read."""
    text = formula_text(values)
    stated = parse_formula(text) if text else None
    if stated is None:
        return ""
    counts = Counter(ELEMENTS[z] for z in atoms.species)
    found = " ".join(f"{symbol}{n}" for symbol, n in sorted(counts.items()))
    total, of_stated = len(atoms), sum(stated.values())
    shares = {symbol: (counts[symbol] / total, stated.get(symbol, 0) / of_stated) for symbol in {*counts, *stated}}
    if all(have and abs(have - want) <= SAME_SHARE * want for have, want in shares.values()):
        return ""
    return f"the CIF states {text}, its atoms are {found}"


def number_problem(values: Values, atoms: Sites) -> str:
    """Why there are more or fewer atoms than multiplicities, or formula and formula units, say; empty if there are not.

    The formula is that of one unit, or of the whole cell as pymatgen writes it.
    """
    column = next((values[tag] for tag in _MULTIPLICITIES if tag in values), ())
    if column and all(text.isdecimal() for text in column) and sum(map(int, column)) != len(atoms):
        return f"the sites' multiplicities make {sum(map(int, column))} atoms of {len(atoms)}"
    units = next((int(v) for v in values.get("_cell_formula_units_z", ()) if v.isdecimal()), None)
    text = formula_text(values)
    stated = parse_formula(text) if text else None
    if not units or stated is None:
        return ""
    unit = sum(stated.values())
    if any(abs(len(atoms) - expected) < 0.5 for expected in (unit, units * unit)):
        return ""
    return f"Z = {units} of {text} make {units * unit:g} atoms of {len(atoms)}"


def formula_text(values: Values) -> str | None:
    """The formula as it is written: the sum, or else another kind that says the same."""
    for tag in _FORMULAS:
        for value in values.get(tag, ()):
            text = value.strip("'\";\n\r ")
            if text not in ("", ".", "?") and (tag == _FORMULAS[0] or parse_formula(text)):
                return text
    return None


def parse_formula(text: str) -> dict[str, float] | None:
    """Atoms by element of `Fe2 O3`, `FE2 O3` or `C6H5Br`; None for what is no such list."""
    counts: Counter[str] = Counter()
    for word in re.split(r"[\s,]+", text.strip()):
        parts = _PART.findall(word) if re.fullmatch(f"(?:{_PART.pattern})+", word) else []
        if not parts or any(symbol not in ATOMIC_NUMBER and symbol != "D" for symbol, _ in parts):
            parts = [(letters.title(), n) for letters, n in re.findall(r"^([A-Z]{2})(\d+(?:\.\d*)?)?$", word)]
        if not parts or any(symbol not in ATOMIC_NUMBER and symbol != "D" for symbol, _ in parts):
            return None
        for symbol, n in parts:
            counts["H" if symbol == "D" else symbol] += float(n or 1)
    return {symbol: n for symbol, n in counts.items() if n} or None
