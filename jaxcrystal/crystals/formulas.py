"""Formulas of crystals: read, and written in the one spelling that training texts have."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import gcd, inf

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER
from jaxcrystal.errors import UserError

_PAULING = """
H 2.2 Li 0.98 Be 1.57 B 2.04 C 2.55 N 3.04 O 3.44 F 3.98 Na 0.93 Mg 1.31 Al 1.61 Si 1.9 P 2.19 S 2.58 Cl 3.16
K 0.82 Ca 1 Sc 1.36 Ti 1.54 V 1.63 Cr 1.66 Mn 1.55 Fe 1.83 Co 1.88 Ni 1.91 Cu 1.9 Zn 1.65 Ga 1.81 Ge 2.01 As
2.18 Se 2.55 Br 2.96 Kr 3 Rb 0.82 Sr 0.95 Y 1.22 Zr 1.33 Nb 1.6 Mo 2.16 Tc 1.9 Ru 2.2 Rh 2.28 Pd 2.2 Ag 1.93
Cd 1.69 In 1.78 Sn 1.96 Sb 2.05 Te 2.1 I 2.66 Xe 2.6 Cs 0.79 Ba 0.89 La 1.1 Ce 1.12 Pr 1.13 Nd 1.14 Pm 1.13 Sm
1.17 Eu 1.2 Gd 1.2 Tb 1.1 Dy 1.22 Ho 1.23 Er 1.24 Tm 1.25 Yb 1.1 Lu 1.27 Hf 1.3 Ta 1.5 W 2.36 Re 1.9 Os 2.2 Ir
2.2 Pt 2.28 Au 2.54 Hg 2 Tl 1.62 Pb 2.33 Bi 2.02 Po 2 At 2.2 Rn 2.2 Fr 0.7 Ra 0.9 Ac 1.1 Th 1.3 Pa 1.5 U 1.38
Np 1.36 Pu 1.28 Am 1.3 Cm 1.3 Bk 1.3 Cf 1.3 Es 1.3 Fm 1.3 Md 1.3 No 1.3 Lr 1.3
""".split()
#: Pauling electronegativities as pymatgen's table has them; elements that it has none of come last.
ELECTRONEGATIVITY = dict(zip(_PAULING[::2], map(float, _PAULING[1::2]), strict=True))
#: Formulas that pymatgen does not reduce to the end: peroxides, and elements whose molecule has two atoms.
DOUBLED = {"LiO", "NaO", "KO", "HO", "CsO", "RbO", "O", "N", "F", "Cl", "H"}
#: Two last elements that are nearer than this are an anion of its own: Ca(ClO3)2.
POLYANION = 1.65


def read_formula(formula: str) -> Counter[str]:
    """How many atoms of each element a formula has: "Ca3(PO4)2" has 3 Ca, 2 P, 8 O. Raises UserError if it is none."""
    groups = [Counter[str]()]
    rest = formula
    while rest:
        token = re.match(r"([A-Z][a-z]?|\(|\))([1-9][0-9]*)?", rest)
        if token is None or (token[1] == "(" and token[2]) or (token[1] == ")" and len(groups) == 1):
            raise UserError(
                f"the formula {formula!r} cannot be read from {rest!r} on; write it as LiFePO4 or Ca3(PO4)2"
            )
        name, times = token[1], int(token[2] or 1)
        if name == "(":
            groups.append(Counter())
        else:
            part = groups.pop() if name == ")" else Counter([name])
            if name != ")" and name not in ATOMIC_NUMBER:
                raise UserError(f"{name!r} of the formula {formula!r} is no chemical element")
            groups[-1].update({symbol: count * times for symbol, count in part.items()})
        rest = rest[token.end() :]
    if len(groups) > 1 or not groups[0]:
        raise UserError(f"the formula {formula!r} {'is empty' if not groups[0] else 'lacks a )'}")
    return groups[0]


def reduced(counts: Mapping[str, int]) -> dict[str, int]:
    """The smallest whole numbers of atoms in the same proportion."""
    factor = gcd(*counts.values())
    return {symbol: count // factor for symbol, count in counts.items()}


def spelled(formula: str) -> str:
    """The formula as data sets spell it (`pretty_formula`): NaCl for ClNa and Na2Cl2, CaCO3 for CO3Ca, O2 for O.

    Equal to pymatgen's `Composition(formula).reduced_formula`: the least electronegative element first, numbers without
    a common factor, and the last two of several elements in parentheses where they are an anion that comes several
    times. Raises UserError as `read_formula`.
    """
    found = unit(formula)
    return re.sub(r"([A-Z][a-z]?)", r"\g<1>2", found) if found in DOUBLED else found


def unit(formula: str) -> str:
    """As `spelled`, but of the smallest whole numbers for peroxides and molecules too: LiO, O. Raises as it."""
    return _spelled(reduced(read_formula(formula)))


def ordered(symbols: Iterable[str]) -> list[str]:
    """Elements as a formula names them: the least electronegative first, those that no table has last."""
    return sorted(symbols, key=lambda symbol: (ELECTRONEGATIVITY.get(symbol, inf), symbol))


def _spelled(counts: Mapping[str, int]) -> str:
    symbols = ordered(counts)
    anion = ""
    if len(symbols) >= 3:
        pair = symbols[-2:]
        times = gcd(*(counts[symbol] for symbol in pair))
        if _electronegativity(pair[1]) - _electronegativity(pair[0]) < POLYANION and times > 1:
            anion, symbols = f"({_spelled({s: counts[s] // times for s in pair})}){times}", symbols[:-2]
    return "".join(f"{symbol}{counts[symbol] if counts[symbol] > 1 else ''}" for symbol in symbols) + anion


def _electronegativity(symbol: str) -> float:
    return ELECTRONEGATIVITY.get(symbol, inf)
