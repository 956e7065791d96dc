"""Inputs of DFT calculations for crystals of an evaluation, which check what a potential promised of them.

VASP: pymatgen's MPRelaxSet, so that energies, once corrected, stand on the scale of the Materials Project's hull.
Instead of the licensed POTCAR there is POTCAR.spec, its names, of which `pmg potcar` makes the file.

Quantum ESPRESSO: a relaxation of atoms and cell with pseudopotentials of the user's. No Hubbard U, other
pseudopotentials: its energies do not compare with that hull, which each input has as its title.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from tqdm import tqdm

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.interface import files
from jaxcrystal.reader.reading import crystal_from_cif

if TYPE_CHECKING:
    from pymatgen.core import Structure

Code = Literal["vasp", "quantum-espresso"]

NOT_COMPARABLE = "its energies do not compare with the hull of the Materials Project"
SSSP = "https://www.materialscloud.org/discover/sssp"
#: What each element of the table of pseudopotentials must say; the cut-offs, of wave functions and density, in Ry.
_ENTRY = {"filename": str, "cutoff_wfc": (int, float), "cutoff_rho": (int, float)}


@dataclass(frozen=True)
class _Chosen:
    """A crystal to be calculated."""

    id: str
    row: int
    crystal: Crystal
    relaxed: bool  #: by the potential of the evaluation; otherwise as sampled
    relaxation: str | None  #: its outcome
    e_above_hull: float | None  #: eV/atom

    @property
    def elements(self) -> list[str]:
        return sorted(set(self.crystal.symbols))


def write(
    table: pd.DataFrame,
    rows: Sequence[int],
    out: Path,
    code: Code = "vasp",
    pseudopotentials: str | PathLike[str] | None = None,
) -> pd.DataFrame:
    """Writes a folder FORMULA_ID for each of the rows of an evaluation's table, and `index.csv`, which it returns.

    - `rows`: as the column `row` has them.
    - `pseudopotentials`: for Quantum ESPRESSO, a JSON file as SSSP publishes it: for each element `filename`,
      `cutoff_wfc` and `cutoff_rho` in Ry.

    `out` is written whole or not at all. Raises UserError for rows that there are not or that have no crystal, elements
    without pseudopotential, an `out` that holds something, or what the disk refuses.
    """
    if code not in ("vasp", "quantum-espresso"):
        raise UserError(f"inputs are written for vasp or quantum-espresso, not for {code!r}")
    if (code == "vasp") != (pseudopotentials is None):
        raise UserError(
            "VASP's pseudopotentials are those of MPRelaxSet; give a table of them with quantum-espresso only"
            if code == "vasp"
            else f"Quantum ESPRESSO needs a table of pseudopotentials, such as {SSSP} has it as JSON"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another")
    chosen = list(_chosen(table, rows))
    known = _materials_project() if pseudopotentials is None else _pseudopotentials(Path(pseudopotentials))
    _check(chosen, known, "MPRelaxSet" if pseudopotentials is None else str(pseudopotentials))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
            folder = Path(unfinished) / "inputs"
            folder.mkdir()
            index = [_write_one(folder, one, code, known) for one in tqdm(chosen, "inputs", disable=None)]
            found = pd.DataFrame(index)
            found.to_csv(folder / "index.csv", index=False)
            folder.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; choose another place") from None
    return found


def _chosen(table: pd.DataFrame, rows: Iterable[int]) -> Iterable[_Chosen]:
    """Raises UserError for a row that there is not, or that is no crystal, or is named twice."""
    by_row = {int(found["row"]): found for found in table.to_dict("records")}
    named: set[int] = set()
    for row in rows:
        if row not in by_row:
            raise UserError(f"there is no row {row}; rows of this evaluation run from {min(by_row)} to {max(by_row)}")
        if row in named:
            raise UserError(f"row {row} is named twice")
        named.add(row)
        found = by_row[row]
        relaxed = isinstance(found.get("relaxed_cif"), str)
        crystal = crystal_from_cif(found["relaxed_cif" if relaxed else "cif"])
        if crystal is None:
            raise UserError(f"row {row} ({found['id']}) has no crystal: {found['reason'] or found['outcome']}")
        distance = found.get("e_above_hull")
        distance = None if pd.isna(distance) else float(distance)
        yield _Chosen(str(found["id"]), row, crystal, relaxed, found.get("relaxation"), distance)


def _materials_project() -> Mapping[str, Any]:
    from pymatgen.io.vasp.sets import MPRelaxSet

    return MPRelaxSet.CONFIG["POTCAR"]


def _pseudopotentials(path: Path) -> Mapping[str, Any]:
    """Raises UserError if the file is not as SSSP's."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); expected a table of pseudopotentials as of {SSSP}") from None
    for symbol, entry in table.items() if isinstance(table, dict) else [("the file", table)]:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in _ENTRY.items()):
            raise UserError(f"{path}: {symbol} has not {', '.join(_ENTRY)}, the last two in Ry, as in {SSSP}")
    return table


def _check(chosen: Sequence[_Chosen], known: Mapping[str, Any], where: str) -> None:
    """Raises UserError if an element has no pseudopotential, with the rows that could be calculated."""
    for one in chosen:
        lacking = [symbol for symbol in one.elements if symbol not in known]
        if lacking:
            others = [str(other.row) for other in chosen if known.keys() >= set(other.elements)]
            remedy = f"rows that can be calculated: {','.join(others)}" if others else "nor can another row be written"
            raise UserError(f"row {one.row} ({one.id}): {where} has no pseudopotential of {lacking[0]}; {remedy}")


def _write_one(folder: Path, one: _Chosen, code: Code, known: Mapping[str, Any]) -> dict[str, Any]:
    """The files of one crystal; its row of index.csv."""
    place = files.free(folder, one.crystal.formula, one.id)  # without the brackets of a spelled formula
    place.mkdir()
    structure = one.crystal.to_structure()
    notes = _vasp(structure, place) if code == "vasp" else _espresso(structure, place, known)
    return {
        "folder": place.name,
        "id": one.id,
        "row": one.row,
        "formula": structure.composition.reduced_formula,
        "num_atoms": len(structure),
        "structure": "relaxed" if one.relaxed else "as sampled",
        "relaxation": one.relaxation,
        "e_above_hull": one.e_above_hull,
        "notes": notes,
    }


def _vasp(structure: Structure, place: Path) -> str:
    """POSCAR, INCAR, KPOINTS and POTCAR.spec; what pymatgen warns of."""
    from pymatgen.io.vasp.sets import MPRelaxSet

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MPRelaxSet(structure).write_input(str(place), potcar_spec=True)
    warned = (str(each.message).split("\n")[0] for each in caught if "InputSet" in each.category.__name__)
    return "; ".join(dict.fromkeys(warned))


def _espresso(structure: Structure, place: Path, known: Mapping[str, Any]) -> str:
    """pw.in: atoms and cell relaxed, spin-polarised, on a grid as dense as MPRelaxSet's."""
    from pymatgen.io.pwscf import PWInput
    from pymatgen.io.vasp import Kpoints
    from pymatgen.io.vasp.sets import MPRelaxSet

    symbols = sorted({site.specie.symbol for site in structure})
    density = MPRelaxSet.CONFIG["KPOINTS"]["reciprocal_density"]
    moments = MPRelaxSet.CONFIG["INCAR"]["MAGMOM"]
    calculation = PWInput(
        structure,
        pseudo={symbol: known[symbol]["filename"] for symbol in symbols},
        control={
            "calculation": "vc-relax",
            "title": NOT_COMPARABLE,
            "pseudo_dir": "../pseudo",
            "etot_conv_thr": 1e-5,
            "forc_conv_thr": 1e-4,
        },
        system={
            "ecutwfc": max(float(known[symbol]["cutoff_wfc"]) for symbol in symbols),
            "ecutrho": max(float(known[symbol]["cutoff_rho"]) for symbol in symbols),
            "occupations": "smearing",
            "smearing": "cold",
            "degauss": 0.01,
            "nspin": 2,
            # A share of the valence electrons: much where MPRelaxSet starts with a moment, little elsewhere.
            "starting_magnetization": [0.5 if symbol in moments else 0.1 for symbol in symbols],
        },
        electrons={"conv_thr": 1e-9},
        kpoints_grid=Kpoints.automatic_density_by_vol(structure, density).kpts[0],
        format_options={"coord_decimals": 12},
    )
    calculation.write_file(place / "pw.in")
    return NOT_COMPARABLE
