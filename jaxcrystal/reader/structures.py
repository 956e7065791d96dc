"""Crystals from what is no CIF: dictionaries of other projects, POSCAR, extxyz, objects of pymatgen and ASE.

    {"lattice": {"matrix": …}, "sites": [{"species": …, "abc": …}, …]}                     pymatgen
    {"numbers": …, "positions": …, "cell": …, "pbc": …}                                    ASE
    {"lattice_vectors": …, "cartesian_site_positions": …, "species_at_sites": …}           OPTIMADE, LeMaterial
    {"lattice_mat": …, "coords": …, "elements": …, "cartesian": …}                         JARVIS
    {"lengths": …, "angles": …, "species": …, "frac_coords": …}                            what `prepare` writes

No class of pymatgen is made of a dictionary, so that atoms may coincide. Everything that cannot be read raises
`Refused`, with the outcome and the reason.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, ELEMENTS, Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.cif import WRAPPED, Found, check_cell, outside, read_cif
from jaxcrystal.reader.rows import Outcome, Refused
from jaxcrystal.reader.symbols import element

if TYPE_CHECKING:
    from ase import Atoms
    from pymatgen.core import Structure

PREPARED = ("lengths", "angles", "species", "frac_coords")
_SAME_CELL = 1e-6  #: Å, degrees; what rounding may put between a cell's vectors and its lengths and angles


def is_structure(item: Any) -> bool:
    """Whether a dictionary is one of those above."""
    return isinstance(item, Mapping) and any(names <= item.keys() for names in _READERS)


def read_dictionary(item: Any) -> Found:
    """The crystal of a dictionary, or of text that holds one as JSON or Python write it, or a CIF."""
    if isinstance(item, str):
        return _of_text(item)
    if isinstance(item, Mapping):
        for names, reader in _READERS.items():
            if names <= item.keys():
                try:
                    return reader(_with_arrays({name: _unwritten(value) for name, value in item.items()}))
                except (Refused, UserError):
                    raise
                except KeyError as error:
                    raise Refused(Outcome.JSON_ERROR, f"the structure has no {error.args[0]}") from None
                except Exception as error:  # a stranger's file can break the reading in any way; each costs its row
                    raise Refused(Outcome.JSON_ERROR, one_line(error)) from None
    raise Refused(Outcome.JSON_ERROR, f"{str(item)[:40]!r} is no structure; expected lattice and sites")


def _of_text(text: str) -> Found:
    if re.search(r"^\s*data_", text, re.IGNORECASE | re.MULTILINE):
        return read_cif(text)
    for parse in (json.loads, ast.literal_eval):
        try:
            return read_dictionary(inside) if isinstance(inside := parse(text), Mapping) else read_dictionary(None)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    raise Refused(Outcome.JSON_ERROR, f"{text[:40]!r} is neither JSON nor CIF")


def _unwritten(value: Any) -> Any:
    """A list or dictionary that a table holds as text."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return parse(value)
    return value


def _with_arrays(item: Any) -> Any:
    """A dictionary with ASE's and pymatgen's forms of arrays as lists."""
    if isinstance(item, Mapping):
        if "__ndarray__" in item:
            shape, _, flat = item["__ndarray__"]
            return np.reshape(flat, shape).tolist()
        if item.get("__ase_objtype__") == "cell":
            return _with_arrays(item["array"])
        return {name: _with_arrays(value) for name, value in item.items()}
    return [_with_arrays(value) for value in item] if isinstance(item, list | tuple) else item


def _pymatgen(item: Mapping[str, Any]) -> Found:
    sites = item["sites"]
    _require_periodic(item["lattice"].get("pbc", True))
    notes: dict[str, None] = {}
    species = []
    for site in sites:
        parts = [(str(one["element"]), float(one["occu"])) for one in site["species"]]
        if not parts:
            raise Refused(Outcome.JSON_ERROR, "a site has no species")
        if len(parts) != 1 or abs(parts[0][1] - 1) > 1e-8:
            raise Refused(Outcome.DISORDERED, f"a site is partially occupied: {parts}")
        species.append(parts[0][0])
        if any(one.get("oxidation_state") for one in site["species"]):
            notes["oxidation states are not kept"] = None
        for name, value in (site.get("properties") or {}).items():
            if value is not None:
                notes[f"the sites' {name} is not kept"] = None
    if item.get("charge"):
        notes["the cell's charge is not kept"] = None
    vectors = _vectors(item["lattice"]["matrix"])
    if all(site.get("abc") is not None for site in sites):
        coords = [site["abc"] for site in sites]
    else:
        coords = _fractions(vectors, [site["xyz"] for site in sites])
    found = _crystal(vectors, species, coords, notes)
    return replace(found, crystal=_with_stated_cell(found.crystal, item["lattice"]))


def _with_stated_cell(crystal: Crystal, lattice: Mapping[str, Any]) -> Crystal:
    """With the lengths and angles that stand beside the vectors, where they are those of the vectors: to the last digit
    as they were written, while those of vectors are computed."""
    stated = [lattice.get(name) for name in ("a", "b", "c", "alpha", "beta", "gamma")]
    if not all(isinstance(value, int | float) for value in stated):
        return crystal
    lengths, angles = np.array(stated[:3], float), np.array(stated[3:], float)
    if not np.allclose(lengths, crystal.lengths, rtol=0, atol=_SAME_CELL):
        return crystal
    if not np.allclose(angles, crystal.angles, rtol=0, atol=_SAME_CELL):
        return crystal
    return Crystal(lengths, angles, crystal.species, crystal.frac_coords)


def _ase(item: Mapping[str, Any]) -> Found:
    _require_periodic(item["pbc"])
    numbers = [int(z) for z in item["numbers"]]
    for z in numbers:
        if not 0 < z < len(ELEMENTS):
            raise Refused(Outcome.UNKNOWN_ELEMENT, f"{z} is no atomic number; they run from 1 to {len(ELEMENTS) - 1}")
    vectors = _vectors(item["cell"])
    return _crystal(vectors, [ELEMENTS[z] for z in numbers], _fractions(vectors, item["positions"]), {})


def _require_periodic(stated: Any) -> None:
    """Raises Refused unless `stated`, of which files have many spellings, says three times that it is."""
    words = re.findall(r"[a-z]+|\d+", stated.lower()) if isinstance(stated, str) else stated
    words = [words] * 3 if isinstance(words, bool) else list(words)
    if len(words) == 1 and isinstance(words[0], str):
        words = list(words[0]) if re.fullmatch("[tf01]{3}", words[0]) else words * 3
    if len(words) != 3 or any(w not in (True, "t", "true", "1", "p", "periodic") for w in words):
        raise Refused(Outcome.NOT_PERIODIC, f"the crystal is not periodic in three directions: pbc is {stated}")


def _optimade(item: Mapping[str, Any]) -> Found:
    if any(not flag for flag in item.get("dimension_types") or ()):
        raise Refused(Outcome.NOT_PERIODIC, f"not periodic in three directions: {item['dimension_types']}")
    if item.get("nperiodic_dimensions") not in (None, 3):
        raise Refused(Outcome.NOT_PERIODIC, f"periodic in {item['nperiodic_dimensions']} directions only")
    features = set(item.get("structure_features") or ())
    if "implicit_atoms" in features:
        raise Refused(Outcome.MISSING_ATOMS, "the structure has implicit atoms, which have no positions")
    if features & {"assemblies", "disorder"}:
        raise Refused(Outcome.DISORDERED, f"the structure is of alternatives: {', '.join(sorted(features))}")
    kinds = {}
    for kind in item.get("species") or ():
        if any(kind.get("nattached") or ()):
            raise Refused(Outcome.MISSING_ATOMS, f"atoms attached to {kind['name']} have no positions of their own")
        shares = kind.get("concentration") or [1.0]
        if len(kind["chemical_symbols"]) != 1 or abs(float(shares[0]) - 1) > 1e-8:
            raise Refused(Outcome.DISORDERED, f"partially occupied: {kind['chemical_symbols']} {shares}")
        kinds[kind["name"]] = kind["chemical_symbols"][0]
    names = [str(name) for name in item["species_at_sites"]]
    if item.get("nsites") not in (None, len(names)):
        raise Refused(Outcome.MISSING_ATOMS, f"{item['nsites']} sites are stated, {len(names)} are listed")
    vectors = _vectors(item["lattice_vectors"])
    coords = _fractions(vectors, item["cartesian_site_positions"])
    return _crystal(vectors, [kinds.get(name, name) for name in names], coords, {})


def _jarvis(item: Mapping[str, Any]) -> Found:
    vectors = _vectors(item["lattice_mat"])
    cartesian = str(item.get("cartesian")).lower() in ("true", "1")
    coords = _fractions(vectors, item["coords"]) if cartesian else item["coords"]
    return _crystal(vectors, [str(symbol) for symbol in item["elements"]], coords, {})


def _prepared(item: Mapping[str, Any]) -> Found:
    species, coords = np.asarray(item["species"]), np.asarray(item["frac_coords"], float)
    if coords.size != 3 * species.size:
        raise Refused(Outcome.JSON_ERROR, f"{species.size} atoms but {coords.size} coordinates; expected three an atom")
    lengths, angles = np.asarray(item["lengths"], float), np.asarray(item["angles"], float)
    check_cell(lengths, angles)
    return Found(_checked(Crystal, lengths, angles, species, coords.reshape(-1, 3)), ())


#: By the names that a dictionary must have.
_READERS = {
    frozenset(("lattice", "sites")): _pymatgen,
    frozenset(("numbers", "positions", "cell", "pbc")): _ase,
    frozenset(("lattice_vectors", "cartesian_site_positions", "species_at_sites")): _optimade,
    frozenset(("lattice_mat", "coords", "elements")): _jarvis,
    frozenset(PREPARED): _prepared,
}


def read_poscar(text: str) -> Found:
    """VASP's POSCAR or CONTCAR, of version 5 or later, which names the elements."""
    from pymatgen.io.vasp import Poscar

    def broken(reason: str) -> Refused:
        return Refused(Outcome.POSCAR_ERROR, reason)

    lines = text.lstrip("\ufeff").splitlines()
    if len(lines) < 8:
        raise broken(f"the file ends after {len(lines)} lines")
    words = re.split(r"[!#]", lines[5])[0].split()
    if not words or not words[0][0].isalpha():
        raise broken("line 6 names no elements (VASP 4 writes so), which the file then does not tell; write them there")
    notes: dict[str, None] = {}
    names = []
    for word in words:  # with what VASP writes behind it: Na_pv, Na_pv/9ea1f3
        kind, _, digest = word.partition("/")
        if digest.title() in ATOMIC_NUMBER:
            raise Refused(Outcome.UNKNOWN_ELEMENT, f"{word!r} is no chemical element")
        symbol, changed = element(kind.split("_")[0])
        names.append(symbol)
        notes |= dict.fromkeys(changed)
    counts = re.split(r"[!#]", lines[6])[0].split()
    if len(counts) != len(names) or not all(n.isdecimal() for n in counts):
        raise broken(
            f"line 6 names {len(names)} elements, line 7 does not count the atoms of each: {lines[6].strip()!r}"
        )
    start = 8 + lines[7].strip().lower().startswith("s")
    atoms, listed = sum(map(int, counts)), 0
    while start + listed < len(lines) and re.match(r"\s*[-+.\dEeDd]+\s+[-+.\d]", lines[start + listed]):
        listed += 1
    if listed != atoms:
        raise broken(f"line 7 counts {atoms} atoms, {listed} lines of coordinates follow")
    lines[5], lines[6] = " ".join(names), " ".join(counts)
    try:
        poscar = Poscar.from_str("\n".join(lines) + "\n", read_velocities=False)
        structure = poscar.structure
    except Exception as error:  # pymatgen's parser raises anything at a broken file
        raise broken(one_line(error)) from None
    if poscar.selective_dynamics is not None:
        notes["selective dynamics are not kept"] = None
    return _crystal(structure.lattice.matrix, [s.specie.symbol for s in structure], structure.frac_coords, notes)


def read_extxyz(frame: str) -> tuple[Found, dict[str, Any]]:
    """A frame of an extxyz file, by ASE, and what its comment line states beside the cell."""
    import ase.io

    notes: dict[str, None] = {}
    count, comment, *lines = frame.rstrip("\n").split("\n")
    if int(count) == 0:
        raise Refused(Outcome.NO_ATOMS, "the frame has no atoms")
    stated = _comment(comment)
    if "lattice" not in stated:
        raise Refused(Outcome.NOT_PERIODIC, "the frame states no Lattice of three vectors")
    for name in ("pbc", "periodic", "boundary"):
        if name in stated:
            _require_periodic(stated[name])
    if len(lines) != int(count):
        raise Refused(Outcome.EXTXYZ_ERROR, f"the frame has {len(lines)} lines of atoms, its first line says {count}")
    columns = _columns(stated.get("properties", "species:S:1:pos:R:3"))
    column = columns.get("species", columns.get("z"))
    for i, line in enumerate(lines):
        fields = line.split()
        if len(fields) <= max(columns.values()):
            raise Refused(Outcome.EXTXYZ_ERROR, f"an atom's line has {len(fields)} fields: {line[:40]!r}")
        if "species" in columns:
            number = int(fields[column]) if fields[column].isdecimal() else 0
            symbol, changed = (ELEMENTS[number], ()) if 0 < number < len(ELEMENTS) else element(fields[column])
            notes |= dict.fromkeys(changed)
            fields[column] = symbol
        if "occupancy" in columns and abs(float(fields[columns["occupancy"]]) - 1) > 1e-3:
            raise Refused(Outcome.DISORDERED, f"a site is partially occupied: {fields[columns['occupancy']]}")
        lines[i] = " ".join(fields)
    # ASE knows these keys as they are spelled here, and three letters for the directions.
    for name in ("Lattice", "Properties"):
        comment = re.sub(rf"\b{name}(?=\s*=)", name, comment, flags=re.IGNORECASE)
    directions = r"\b(?:pbc|periodic|boundary)\s*=\s*(?:\"[^\"]*\"|'[^']*'|\[[^\]]*\]|\S+)"
    comment = re.sub(directions, 'pbc="T T T"', comment, flags=re.IGNORECASE)
    try:
        atoms = ase.io.read(io.StringIO("\n".join([count, comment, *lines]) + "\n"), format="extxyz")
    except Exception as error:  # ASE's parser raises anything at a broken file
        raise Refused(Outcome.EXTXYZ_ERROR, one_line(error)) from None
    found = _of_atoms(atoms)
    return Found(found.crystal, (*notes, *found.notes)), dict(atoms.info)


def _comment(line: str) -> dict[str, str]:
    """What a frame's comment states, by name in small letters. Raises Refused for what decides and is stated twice."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"([A-Za-z_]\w*)\s*=\s*(\"[^\"]*\"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|\S+)", line):
        name = name.lower()
        if name in found and name in ("lattice", "properties", "pbc"):
            raise Refused(Outcome.EXTXYZ_ERROR, f"the frame states {name} twice")
        found[name] = value.strip("\"'")
    return found


def _columns(properties: str) -> dict[str, int]:
    """The first field of each property of an atom's line. Raises Refused unless there are positions and one species."""
    parts, column, found = properties.split(":"), 0, {}
    for name, _, width in zip(parts[::3], parts[1::3], parts[2::3], strict=False):
        found[name.lower()] = column
        column += int(width) if width.isdecimal() else 1
    if "pos" not in found:
        raise Refused(Outcome.MISSING_ATOMS, f"the atoms have no positions: no `pos` in Properties={properties}")
    if ("species" in found) == ("z" in found):
        raise Refused(Outcome.EXTXYZ_ERROR, f"the atoms need one column `species` or `Z`: Properties={properties}")
    return found


def read_object(item: Any) -> Found:
    """A Crystal, a pymatgen Structure (or what has one, such as an entry), ASE's Atoms, or a dictionary of these."""
    if isinstance(item, Crystal):
        return Found(item, ())
    if isinstance(item, str | Mapping):
        return read_dictionary(item)
    if hasattr(item, "get_scaled_positions"):
        return _of_atoms(item)
    item = getattr(item, "structure", item)
    if hasattr(item, "lattice") and hasattr(item, "sites"):
        return _of_pymatgen(item)
    if item is None:
        raise Refused(Outcome.MISSING, "there is no structure")
    reason = f"a {type(item).__name__} is no structure; expected Structure, Atoms, Crystal, CIF text or a dictionary"
    raise Refused(Outcome.JSON_ERROR, reason)


def _of_pymatgen(structure: Structure) -> Found:
    return read_dictionary(structure.as_dict())


def _of_atoms(atoms: Atoms) -> Found:
    if atoms.cell.rank < 3:
        raise Refused(Outcome.NOT_PERIODIC, "the crystal has no cell of three vectors")
    for site, shared in atoms.info.get("occupancy", {}).items():  # ASE keeps shared sites beside the atoms
        if len(shared) != 1 or abs(next(iter(shared.values())) - 1) > 1e-6:
            raise Refused(Outcome.DISORDERED, f"site {site} is partly occupied or shared: {shared}")
    arrays = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array, "pbc": atoms.pbc}
    found = read_dictionary({name: values.tolist() for name, values in arrays.items()})
    beside = {*atoms.arrays} & {"initial_magmoms", "initial_charges"}
    notes = [f"the atoms' {name.removeprefix('initial_')} are not kept" for name in sorted(beside)]
    notes += ["constraints are not kept"] if atoms.constraints else []
    return Found(found.crystal, (*found.notes, *notes))


def _vectors(matrix: Any) -> Float[np.ndarray, "3 3"]:
    vectors = np.array(matrix, float)
    if vectors.shape == (9,):
        vectors = vectors.reshape(3, 3)
    if vectors.shape != (3, 3):
        raise Refused(Outcome.CELL_ERROR, f"a cell has three vectors of three numbers, found {matrix}")
    if not np.isfinite(vectors).all():
        raise Refused(Outcome.NOT_FINITE, "a cell vector is not a finite number")
    if not np.linalg.norm(vectors, axis=1).all():
        raise Refused(Outcome.CELL_ERROR, "a cell vector has length 0")
    return vectors


def _fractions(vectors: Float[np.ndarray, "3 3"], positions: Any) -> Float[np.ndarray, "atoms 3"]:
    """Cartesian positions (Å) as fractions of the cell's vectors."""
    try:
        return np.linalg.solve(vectors.T, np.array(positions, float).reshape(-1, 3).T).T
    except np.linalg.LinAlgError:
        raise Refused(Outcome.CELL_ERROR, f"the cell's vectors lie in a plane: {vectors.tolist()}") from None


def _crystal(vectors: Any, symbols: Sequence[str], coords: Any, notes: dict[str, None]) -> Found:
    species = []
    for text in symbols:
        symbol, changed = element(text)
        species.append(ATOMIC_NUMBER[symbol])
        notes |= dict.fromkeys(changed)
    if not species:
        raise Refused(Outcome.NO_ATOMS, "the structure has no atoms")
    coords = np.array(coords, float)
    if coords.shape != (len(species), 3):
        raise Refused(Outcome.JSON_ERROR, f"{len(species)} atoms need three coordinates each, found {coords.shape}")
    if not np.isfinite(coords).all():
        raise Refused(Outcome.NOT_FINITE, "a coordinate is not a finite number")
    if outside(coords):
        notes[WRAPPED] = None
    return Found(_checked(Crystal.from_vectors, vectors, species, coords), tuple(notes))


def _checked(make: Any, *arguments: Any) -> Crystal:
    try:
        return make(*arguments)
    except UserError as error:
        raise Refused(Outcome.CELL_ERROR, str(error)) from None


def one_line(error: Exception) -> str:
    """An exception of somebody else's code, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
