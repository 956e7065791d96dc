"""The embedded data set: known structure types, decorated with the elements that plausibly take them.

A structure type is a space group and its Wyckoff positions, with the lattice constants of a real example; a decoration
puts other ions or metals on the positions, and their radii rescale the example's cell. A line of the tables is

    structure type | example | space group | a, b/a, c/a of the example (Å) | sites | choices

in the settings of the International Tables (second origin, hexagonal axes). A site reads `role Wyckoff x y z`. In the
ionic types A, B, C are cations, followed by their coordination number, and X, Y anions; each takes any ion for which
Shannon (Acta Cryst. A 32, 751 (1976); `ions.csv`) gives a radius in that coordination, if all charges balance. In the
metallic types roles take what `choices` names; `elements.csv` has the metallic radii.

A decoration is kept if all its sizes, relative to the example's, ask for nearly the same cell: Goldschmidt's
tolerance factor, said of every structure type at once.
"""

from __future__ import annotations

import csv
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal

IONIC = """
rock salt          | NaCl     | 225 | 5.640           | A6 4a 0 0 0; X 4b 1/2 1/2 1/2
caesium chloride   | CsCl     | 221 | 4.123           | A8 1a 0 0 0; X 1b 1/2 1/2 1/2
zinc blende        | ZnS      | 216 | 5.409           | A4 4a 0 0 0; X 4c 1/4 1/4 1/4
wurtzite           | ZnO      | 186 | 3.250 1 1.602   | A4 2b 1/3 2/3 0; X 2b 1/3 2/3 .382
troilite (NiAs)    | FeS      | 194 | 3.445 1 1.673   | A6 2a 0 0 0; X 2c 1/3 2/3 1/4 \
| A=Ti V Cr Mn Fe Co Ni; X=S Se Te
fluorite           | CaF2     | 225 | 5.463           | A8 4a 0 0 0; X 8c 1/4 1/4 1/4
antifluorite       | Li2O     | 225 | 4.619           | X 4a 0 0 0; A4 8c 1/4 1/4 1/4
rutile             | TiO2     | 136 | 4.594 1 .644    | A6 2a 0 0 0; X 4f .305 .305 0 | X=O F
anatase            | TiO2     | 141 | 3.785 1 2.514   | A6 4a 0 3/4 1/8; X 8e 0 1/4 .0831 | X=O
cadmium iodide     | CdI2     | 164 | 4.240 1 1.613   | A6 1a 0 0 0; X 2d 1/3 2/3 .249 | X=Cl Br I S Se Te
cadmium chloride   | CdCl2    | 166 | 3.846 1 4.545   | A6 3a 0 0 0; X 6c 0 0 .252 | X=Cl Br I
molybdenite        | MoS2     | 194 | 3.160 1 3.890   | A6 2c 1/3 2/3 1/4; X 4f 1/3 2/3 .621 \
| A=Nb Ta Mo W Re; X=S Se Te
cuprite            | Cu2O     | 224 | 4.270           | A2 4b 0 0 0; X 2a 1/4 1/4 1/4
rhenium trioxide   | ReO3     | 221 | 3.750           | A6 1a 0 0 0; X 3d 1/2 0 0 | X=O F
bismuth triiodide  | BiI3     | 148 | 7.516 1 2.760   | A6 6c 0 0 .1667; X 18f .3415 .3395 .0805 | X=Cl Br I
lanthanum chloride | LaCl3    | 176 | 7.478 1 .585    | A8 2c 1/3 2/3 1/4; X 6h .3874 .3015 1/4 | X=Cl Br
corundum           | Al2O3    | 167 | 4.759 1 2.730   | A6 12c 0 0 .3522; X 18e .3063 0 1/4 | X=O
lanthanum oxide    | La2O3    | 164 | 3.937 1 1.557   | A6 2d 1/3 2/3 .2454; X 1a 0 0 0; X 2d 1/3 2/3 .6471 | X=O S Se
tetradymite        | Bi2Te3   | 166 | 4.386 1 6.950   | A6 6c 0 0 .400; X 3a 0 0 0; X 6c 0 0 .2115 | X=S Se Te
calcite            | CaCO3    | 167 | 4.991 1 3.419   | A6 6b 0 0 0; B3 6a 0 0 1/4; X 18e .2568 0 1/4 | X=O
perovskite         | SrTiO3   | 221 | 3.905           | A12 1b 1/2 1/2 1/2; B6 1a 0 0 0; X 3d 1/2 0 0
double perovskite  | Ba2MgWO6 | 225 | 8.112           \
| A12 8c 1/4 1/4 1/4; B6 4a 0 0 0; C6 4b 1/2 1/2 1/2; X 24e .257 0 0
potassium hexachloroplatinate | K2PtCl6 | 225 | 9.755 | A12 8c 1/4 1/4 1/4; B6 4a 0 0 0; X 24e .240 0 0
layered perovskite | K2NiF4   | 139 | 4.012 1 3.258   | A8 4e 0 0 .353; B6 2a 0 0 0; X 4c 0 1/2 0; X 4e 0 0 .155
ilmenite           | FeTiO3   | 148 | 5.088 1 2.770   | A6 6c 0 0 .3553; B6 6c 0 0 .1464; X 18f .3174 .0233 .2450 \
| X=O
lithium niobate    | LiNbO3   | 161 | 5.148 1 2.693   | A6 6a 0 0 .2787; B6 6a 0 0 0; X 18b .0492 .3446 .0647 | X=O
delafossite        | CuAlO2   | 166 | 2.857 1 5.929   | A2 3a 0 0 0; B6 3b 0 0 1/2; X 6c 0 0 .1101 | X=O
layered cobaltate  | LiCoO2   | 166 | 2.816 1 4.990   | A6 3b 0 0 1/2; B6 3a 0 0 0; X 6c 0 0 .2605 | X=O S Se
spinel             | MgAl2O4  | 227 | 8.083           | A4 8a 1/8 1/8 1/8; B6 16d 1/2 1/2 1/2; X 32e .2625 .2625 .2625
chalcopyrite       | CuGaS2   | 122 | 5.351 1 1.959   | A4 4a 0 0 0; B4 4b 0 0 1/2; X 8d .2539 1/4 1/8
scheelite          | CaWO4    | 88  | 5.243 1 2.170   | A8 4b 0 1/4 5/8; B4 4a 0 1/4 1/8; X 16f .1507 .0086 .2106 \
| X=O
zircon             | ZrSiO4   | 141 | 6.607 1 .905    | A8 4a 0 3/4 1/8; B4 4b 0 1/4 3/8; X 16h 0 .0661 .1953 | X=O
matlockite         | BiOCl    | 129 | 3.883 1 1.892   | A8 2c 1/4 1/4 .1716; X 2a 3/4 1/4 0; Y 2c 1/4 1/4 .6459 \
| X=O F; Y=Cl Br I
"""

EARLY = "Sc Y Ti Zr Hf V Nb Ta Cr Mo W"
LANTHANIDES = "La Ce Pr Nd Sm Gd Tb Dy Ho Er Tm Lu"
LATE = "Mn Fe Co Ni Cu Ru Rh Pd Ag Ir Pt Au"
MAIN = "Al Ga In Si Ge Sn Sb"

METALLIC = f"""
full Heusler       | Cu2MnAl  | 225 | 5.950           | A 8c 1/4 1/4 1/4; B 4a 0 0 0; C 4b 1/2 1/2 1/2 \
| A={LATE}; B=Sc Ti Zr Hf V Nb Cr Mn Fe; C={MAIN}
half Heusler       | ZrNiSn   | 216 | 6.110           | A 4a 0 0 0; B 4c 1/4 1/4 1/4; C 4b 1/2 1/2 1/2 \
| A=Sc Y Ti Zr Hf V Nb Ta; B=Fe Co Ni Cu Ru Rh Pd Ir Pt Au; C={MAIN} Bi
nickel aluminide   | AlNi     | 221 | 2.887           | A 1a 0 0 0; B 1b 1/2 1/2 1/2 \
| A=Mg Al Zn Ga Be {EARLY}; B={LATE}
copper gold        | CuAu     | 123 | 2.800 1 1.311   | A 1a 0 0 0; B 1d 1/2 1/2 1/2 \
| A=Ti Mn Fe Co Ni Cu Zn; B=Al Rh Pd Ir Pt Au
copper three gold  | AuCu3    | 221 | 3.748           | A 1a 0 0 0; B 3c 0 1/2 1/2 \
| A={EARLY} {LANTHANIDES} {MAIN} Au Pt; B={LATE}
iron aluminide     | AlFe3    | 225 | 5.793           | A 4a 0 0 0; B 4b 1/2 1/2 1/2; B 8c 1/4 1/4 1/4 \
| A={MAIN}; B=Mn Fe Co Ni Cu
A15                | SiCr3    | 223 | 4.556           | A 2a 0 0 0; B 6c 1/4 0 1/2 \
| A={MAIN} Ir Pt Au Os; B=Ti Zr V Nb Ta Cr Mo
Laves, cubic       | MgCu2    | 227 | 7.034           | A 8a 1/8 1/8 1/8; B 16d 1/2 1/2 1/2 \
| A=Mg Ca {EARLY} {LANTHANIDES}; B=Al {LATE}
Laves, hexagonal   | MgZn2    | 194 | 5.221 1 1.641   | A 4f 1/3 2/3 .062; B 2a 0 0 0; B 6h .8305 .661 1/4 \
| A=Mg Ti Zr Hf Nb Ta; B=Zn Cr Mn Fe Co Ni
molybdenum disilicide | MoSi2 | 139 | 3.205 1 2.448   | A 2a 0 0 0; B 4e 0 0 .333 | A={EARLY} Re; B=Si Ge Al
titanium diboride  | TiB2     | 191 | 3.028 1 1.066   | A 1a 0 0 0; B 2d 1/3 2/3 1/2 \
| A={EARLY} {LANTHANIDES} Mg Al Mn; B=B
lanthanum nickel   | LaNi5    | 191 | 5.017 1 .794    | A 1a 0 0 0; B 2c 1/3 2/3 0; B 3g 1/2 0 1/2 \
| A=Ca Y Th {LANTHANIDES}; B=Fe Co Ni Cu Rh Pt Zn
nickel tin         | SnNi3    | 194 | 5.305 1 .802    | A 2c 1/3 2/3 1/4; B 6h .833 .666 1/4 \
| A={MAIN} {EARLY}; B=Mn Fe Co Ni Rh Ir
titanium aluminide | TiAl3    | 139 | 3.854 1 2.227   | A 2a 0 0 0; B 2b 0 0 1/2; B 4d 0 1/2 1/4 \
| A={EARLY}; B=Al Ga Ni Pd Pt
copper aluminide   | CuAl2    | 140 | 6.067 1 .803    | A 4a 0 0 1/4; B 8h .1581 .6581 0 \
| A={LATE}; B=Al Ga In Sn Zr Hf Ti
nickel indium      | InNi2    | 194 | 4.179 1 1.228   | A 2c 1/3 2/3 1/4; B 2a 0 0 0; B 2d 1/3 2/3 3/4 \
| A={MAIN}; B=Mn Fe Co Ni Cu Pd
cerium copper silicide | CeCu2Si2 | 139 | 4.105 1 2.420  | A 2a 0 0 0; B 4d 0 1/2 1/4; C 4e 0 0 .379 \
| A=Ca Sr Y {LANTHANIDES}; B=Mn Fe Co Ni Cu Ru Rh Pd; C=Si Ge
iron carbide perovskite | AlFe3C | 221 | 3.770        | A 1a 0 0 0; B 3c 0 1/2 1/2; C 1b 1/2 1/2 1/2 \
| A={MAIN} Zn; B=Ti Mn Fe Co Ni; C=C N
"""

ELEMENTAL = """
face-centred cubic | Cu       | 225 | 3.615           | A 4a 0 0 0 | A=Cu Ag Au Ni Pd Pt Rh Ir Al Pb Ca Sr Ce Yb Th
body-centred cubic | Fe       | 229 | 2.866           | A 2a 0 0 0 | A=Li Na K Rb Cs Ba V Nb Ta Cr Mo W Fe Eu Mn
hexagonal close-packed | Mg | 194 | 3.209 1 1.624 | A 2c 1/3 2/3 1/4 \
| A=Mg Be Zn Cd Hg Ti Zr Hf Sc Y Co Ru Os Re Tc Tl La Pr Nd Sm Gd Tb Dy Ho Er Tm Lu
indium             | In       | 139 | 3.253 1 1.521   | A 2a 0 0 0
gallium            | Ga       | 64  | 4.519 1.695 1.001 | A 8f 0 .1549 .0810
uranium            | U        | 63  | 2.854 2.057 1.736 | A 4c 0 .1024 1/4
diamond            | Si       | 227 | 5.431           | A 8a 1/8 1/8 1/8
diamond (carbon)   | C        | 227 | 3.567           | A 8a 1/8 1/8 1/8
diamond (germanium) | Ge | 227 | 5.658        | A 8a 1/8 1/8 1/8
diamond (tin)      | Sn       | 227 | 6.489           | A 8a 1/8 1/8 1/8
boron              | B        | 166 | 4.908 1 2.561   | A 18h .1177 -.1177 .8927; A 18h .1961 -.1961 .0245
black phosphorus   | P        | 64  | 3.314 3.162 1.321 | A 8f 0 .1017 .0806
arsenic            | As       | 166 | 3.760 1 2.804   | A 6c 0 0 .2271
antimony           | Sb       | 166 | 4.307 1 2.616   | A 6c 0 0 .2335
bismuth            | Bi       | 166 | 4.546 1 2.608   | A 6c 0 0 .2339
sulphur            | S        | 148 | 10.818 1 .3956  | A 18f .1454 .1882 .1055
selenium           | Se       | 152 | 4.366 1 1.134   | A 3a .2254 0 1/3
tellurium          | Te       | 152 | 4.457 1 1.330   | A 3a .2636 0 1/3
iodine             | I        | 64  | 7.180 .656 1.366 | A 8f 0 .1543 .1174
bromine            | Br       | 64  | 6.670 .672 1.307 | A 8f 0 .1350 .1100
chlorine           | Cl       | 64  | 6.145 .715 1.327 | A 8f 0 .1173 .1016
fluorine           | F        | 205 | 5.500           | A 8c .0745 .0745 .0745
oxygen             | O        | 205 | 5.400           | A 8c .0647 .0647 .0647
nitrogen           | N        | 205 | 5.660           | A 8c .0561 .0561 .0561
"""

#: How far the cells that the ions or metals of one decoration ask for may differ, largest over smallest.
TOLERANCE = {"ionic": 1.08, "metallic": 1.20}


@dataclass(frozen=True)
class EmbeddedCrystal:
    """One crystal of the embedded set, in its primitive cell."""

    crystal: Crystal
    prototype: str  #: the structure type
    formula: str  #: reduced, as pymatgen writes it
    spacegroup: int


@dataclass(frozen=True)
class Site:
    """One orbit of a structure type."""

    role: str  #: letter
    coordination: int  #: number of anions around a cation; 0 where it does not matter
    wyckoff: str  #: multiplicity in the conventional cell and letter
    coords: tuple[float, float, float]


@dataclass(frozen=True)
class StructureType:
    """A line of the tables."""

    name: str
    example: str  #: formula
    spacegroup: int
    a: float  #: Å, of the example
    ratios: tuple[float, float]  #: b/a and c/a
    sites: tuple[Site, ...]
    choices: dict[str, tuple[str, ...]]  #: elements by role, where they are restricted
    kind: str  #: ionic or metallic (elements are metallic)

    @property
    def roles(self) -> list[str]:
        """Letters of the roles, each once, in the order of the sites."""
        return list(dict.fromkeys(site.role for site in self.sites))


@dataclass(frozen=True)
class Ion:
    """An element in a state of charge, with Shannon's radius in one coordination."""

    element: str
    charge: int
    radius: float  #: Å
    partners: tuple[str, ...]  #: anions with which the state occurs; empty for all


Occupation = dict[str, Ion]  #: by role


@cache
def embedded() -> tuple[EmbeddedCrystal, ...]:
    """Every decoration of every structure type, in the order of the tables; the same on every machine."""
    return tuple(crystal for structure_type in structure_types() for crystal in decorations(structure_type))


def decorations(structure_type: StructureType) -> Iterator[EmbeddedCrystal]:
    """The plausible decorations of one structure type, each formula once."""
    from pymatgen.core import Composition

    cell = _primitive(structure_type)
    example = _example(structure_type, cell)
    seen = set()
    for occupation in _occupations(structure_type, cell):
        strains = _strains(structure_type, occupation, example)
        if max(strains) > TOLERANCE[structure_type.kind] * min(strains):
            continue
        symbols = [occupation[role].element for role in cell.roles]
        formula = Composition(dict(Counter(symbols))).reduced_formula
        if formula not in seen:
            seen.add(formula)
            lengths = cell.lengths * _scale(structure_type, cell, occupation, example)
            crystal = Crystal(lengths, cell.angles, [ATOMIC_NUMBER[s] for s in symbols], cell.frac_coords)
            yield EmbeddedCrystal(crystal, structure_type.name, formula, structure_type.spacegroup)


def structure_types() -> list[StructureType]:
    """The tables, read."""
    tables = [(IONIC, "ionic"), (METALLIC, "metallic"), (ELEMENTAL, "metallic")]
    return [_read_line(line, kind) for table, kind in tables for line in table.strip().splitlines()]


def _read_line(line: str, kind: str) -> StructureType:
    name, example, spacegroup, lattice, sites, choices, *_ = [*(part.strip() for part in line.split("|")), ""]
    a, *ratios = map(float, lattice.split())
    parsed = []
    for site in sites.split(";"):
        role, wyckoff, *coords = site.split()
        x, y, z = (float(Fraction(c)) for c in coords)
        parsed.append(Site(role[0], int(role[1:] or 0), wyckoff, (x, y, z)))
    chosen = dict(choice.strip().split("=") for choice in choices.split(";") if choice.strip())
    if kind == "metallic" and not chosen:
        chosen = {"A": example}
    elements = {role: tuple(names.split()) for role, names in chosen.items()}
    b, c = ratios or (1.0, 1.0)
    return StructureType(name, example, int(spacegroup), a, (b, c), tuple(parsed), elements, kind)


@dataclass(frozen=True)
class _Cell:
    """The primitive cell of a structure type at the example's size."""

    lengths: Float[np.ndarray, "3"]
    angles: Float[np.ndarray, "3"]
    roles: list[str]  #: atom by atom
    frac_coords: Float[np.ndarray, "atoms 3"]


def _primitive(structure_type: StructureType) -> _Cell:
    import spglib
    from pymatgen.core import Lattice, Structure

    number, a = structure_type.spacegroup, structure_type.a
    b, c = (ratio * a for ratio in structure_type.ratios)
    lattice = Lattice.from_parameters(a, b, c, 90, 90, 120 if 143 <= number <= 194 else 90)
    settings = [hall for hall in range(1, 531) if spglib.get_spacegroup_type(hall).number == number]
    second_origin = [hall for hall in settings if spglib.get_spacegroup_type(hall).choice == "2"]
    symmetry = spglib.get_symmetry_from_database((second_origin or settings)[0])
    roles, coords = [], []
    for site in structure_type.sites:
        images = (symmetry["rotations"] @ np.array(site.coords) + symmetry["translations"]) % 1
        away = (images[:, None] - images[None] + 0.5) % 1 - 0.5
        orbit = images[[i for i in range(len(images)) if not (np.abs(away[i, :i]).max(-1) < 1e-4).any()]]
        if len(orbit) != int(site.wyckoff[:-1]):
            raise ValueError(f"{structure_type.name}: {site.coords} has {len(orbit)} images, not {site.wyckoff}")
        roles += [site.role] * len(orbit)
        coords += list(orbit)
    # Any elements will do, if each role has its own.
    stand_ins = dict(zip(structure_type.roles, ("Na", "K", "Rb", "Cs"), strict=False))
    primitive = Structure(lattice, [stand_ins[role] for role in roles], coords).get_primitive_structure()
    back = {element: role for role, element in stand_ins.items()}
    atoms = sorted(primitive, key=lambda site: structure_type.roles.index(back[site.specie.symbol]))
    return _Cell(
        np.array(primitive.lattice.abc),
        np.array(primitive.lattice.angles),
        [back[site.specie.symbol] for site in atoms],
        np.array([site.frac_coords for site in atoms]),
    )


def _occupations(structure_type: StructureType, cell: _Cell) -> Iterator[Occupation]:
    """Different elements on the roles, with balanced charges; cations in like surroundings by rising charge."""
    counts = Counter(cell.roles)
    *roles, last = counts
    by_charge: dict[int, list[Ion]] = defaultdict(list)
    for ion in _candidates(structure_type, last):
        by_charge[ion.charge].append(ion)
    coordination = {site.role: site.coordination for site in structure_type.sites}
    alike = [(p, q) for p, q in itertools.combinations(counts, 2) if coordination[p] == coordination[q] != 0]
    for ions in itertools.product(*(_candidates(structure_type, role) for role in roles)):
        charge = -sum(ion.charge * counts[role] for role, ion in zip(roles, ions, strict=True)) / counts[last]
        for ion in by_charge[charge]:
            occupation = dict(zip(counts, (*ions, ion), strict=True))
            elements = {ion.element for ion in occupation.values()}
            anions = {ion.element for ion in occupation.values() if ion.charge < 0}
            if (
                len(elements) == len(occupation)
                and all(not ion.partners or anions <= set(ion.partners) for ion in occupation.values())
                and all(occupation[p].charge < occupation[q].charge for p, q in alike)
            ):
                yield occupation


def _candidates(structure_type: StructureType, role: str) -> list[Ion]:
    allowed = structure_type.choices.get(role)
    if structure_type.kind == "metallic":
        # An element without a metallic radius stands in no table but as its own example, whose cell it keeps.
        return [Ion(element, 0, _metallic_radii().get(element, 1.0), ()) for element in allowed]
    (coordination,) = {site.coordination for site in structure_type.sites if site.role == role}
    return [ion for ion in _ions(coordination) if allowed is None or ion.element in allowed]


def _example(structure_type: StructureType, cell: _Cell) -> Occupation:
    """The example's own occupation; that it is among the decorations checks the line of the table."""
    from pymatgen.core import Composition

    wanted = Composition(structure_type.example)
    for occupation in _occupations(structure_type, cell):
        if Composition(dict(Counter(occupation[role].element for role in cell.roles))).almost_equals(
            wanted * (len(cell.roles) / wanted.num_atoms)
        ):
            return occupation
    raise ValueError(f"{structure_type.name}: {structure_type.example} is none of its decorations")


def _strains(structure_type: StructureType, occupation: Occupation, example: Occupation) -> list[float]:
    """How much larger a cell than the example's each bond (ionic) or atom (metallic) asks for."""
    if structure_type.kind == "metallic":
        return [occupation[role].radius / example[role].radius for role in occupation]

    def bonds(ions: Occupation) -> list[float]:
        anions = [ion for ion in ions.values() if ion.charge < 0]
        return [cation.radius + anion.radius for cation in ions.values() if cation.charge > 0 for anion in anions]

    return [bond / reference for bond, reference in zip(bonds(occupation), bonds(example), strict=True)]


def _scale(structure_type: StructureType, cell: _Cell, occupation: Occupation, example: Occupation) -> float:
    """The cell's edges over the example's: of ions, the mean of what bonds ask for; of metals, volumes add up (Zen)."""
    if structure_type.kind == "ionic":
        return float(np.exp(np.mean(np.log(_strains(structure_type, occupation, example)))))
    volume, reference = (sum(ions[role].radius ** 3 for role in cell.roles) for ions in (occupation, example))
    return float((volume / reference) ** (1 / 3))


def _table(name: str) -> list[dict[str, str]]:
    with resources.files(__package__).joinpath(name).open() as file:
        return list(csv.DictReader(file))


@cache
def _metallic_radii() -> dict[str, float]:
    return {row["element"]: float(row["metallic"]) for row in _table("elements.csv") if row["metallic"]}


@cache
def _ions(coordination: int) -> list[Ion]:
    """Ions with a radius in this coordination; anions, whose radius hardly depends on it, for 0."""
    ions = []
    for row in _table("ions.csv"):
        anion = int(row["charge"]) < 0
        radius = row["any"] if anion else row.get(f"cn{coordination}")
        if radius and anion == (coordination == 0):
            ions.append(Ion(row["element"], int(row["charge"]), float(radius), tuple((row["partners"] or "").split())))
    return ions
