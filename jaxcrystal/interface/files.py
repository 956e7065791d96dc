"""Crystals as files that other programs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.dataset import written_whole
from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from pymatgen.core import Structure

ENDINGS = {"cif": ".cif", "poscar": ".vasp"}
TABLES = (".csv", ".parquet")


def write(named: Iterable[tuple[str, Structure | None]], folder: Path, form: str) -> list[Path]:
    """FORMULA_ID in `folder` for each that is a crystal; of ids that read alike, the later ones are numbered.

    Raises UserError for an unknown form, a folder that holds something, or what the disk refuses.
    """
    if form not in ENDINGS:
        raise UserError(f"crystals are written as {' or '.join(ENDINGS)}, not as {form!r}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another")
    paths: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, structure in named:
            if structure is None:
                continue
            crystal = Crystal.from_structure(structure)
            path = free(folder, spelled(crystal.formula), name, ENDINGS[form])
            path.write_text(crystal.to_cif() if form == "cif" else _poscar(structure), encoding="utf-8")
            paths.append(path)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
    return paths


def structures_table(rows: Iterable[tuple[str, str, Crystal | None]]) -> pd.DataFrame:
    """`material_id`, `outcome`, and `structure`: pymatgen's dictionary of a Structure as JSON, None without a crystal.

    LeMat-GenBench reads it, and whoever has pymatgen; so does our reader, to the last digit.
    """
    import pandas as pd

    found = [(name, outcome, None if crystal is None else structure_json(crystal)) for name, outcome, crystal in rows]
    return pd.DataFrame(found, columns=["material_id", "outcome", "structure"], dtype="string")


def structure_json(crystal: Crystal) -> str:
    """pymatgen's dictionary of a Structure, with lengths (Å) and angles (degrees) as the crystal has them."""
    found = crystal.to_structure().as_dict()
    cell = zip(("a", "b", "c", "alpha", "beta", "gamma"), (*crystal.lengths, *crystal.angles), strict=True)
    found["lattice"] |= {name: float(value) for name, value in cell}
    return json.dumps(found)


def free(folder: Path, formula: str, name: str, ending: str = "") -> Path:
    """FORMULA_ID in `folder`, numbered where that is taken."""
    stem = f"{formula}_{re.sub(r'[^A-Za-z0-9.-]+', '-', name)[:80]}"
    path, number = folder / f"{stem}{ending}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{ending}"
    return path


def checked_table(out: Path) -> Path:
    """The same. Raises UserError unless `write_table` can write a file of that name."""
    if out.suffix not in TABLES:
        raise UserError(f"cannot write {out}: give a name that ends in .parquet or .csv")
    return out


def kept_beside(table: Path, *sources: Any) -> Path:
    """Where answers are kept until the table is whole: x.jsonl beside it. Raises UserError where one of the two is what
    is read."""
    kept = table.with_suffix(".jsonl")
    for source in sources:
        if isinstance(source, str | Path) and Path(source).resolve() in (table.resolve(), kept.resolve()):
            raise UserError(
                f"{source} is read, and {table.name} or {kept.name} would be written over it: give another out"
            )
    return kept


def write_table(table: pd.DataFrame, out: Path) -> None:
    """As the name of `out` has it, whole or not at all. Raises UserError if the place cannot be written."""
    with written_whole(out) as unfinished:
        if out.suffix == ".csv":
            table.to_csv(unfinished, index=False)
        else:
            table.to_parquet(unfinished, index=False)


def _poscar(structure: Structure) -> str:
    from pymatgen.io.vasp import Poscar

    return Poscar(structure, sort_structure=True).get_str(significant_figures=12)
