"""Makes what ships in `jaxcrystal/box`: `python launch/build_box.py SHARED`, some minutes on two cores.

SHARED holds `data/mp20/{train,val,test}.parquet` and `data/hull/`. Every crystal is made symmetric within 0.01 Å,
packed, unpacked, and compared with the one it was: by pymatgen's StructureMatcher, and by how far the atom that moved
most is from where it was. One that has no symmetry, or is not the same, is left out and told; `box.json` keeps the
counts. The hull keeps the lowest energy of each composition.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from tqdm import tqdm

from jaxcrystal import box
from jaxcrystal.crystals import packed
from jaxcrystal.crystals.symmetric import SymmetricCrystal
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull, source
from jaxcrystal.hull.phases import Phase, table_phases
from jaxcrystal.reader.checks import Checks, Finding, check
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.rows import Row

SYMPREC = 0.01  #: Å
#: Cells as they are; and where these differ, primitive ones, which pymatgen may choose otherwise for the same crystal.
SAME = [
    StructureMatcher(ltol=0.01, stol=0.05, angle_tol=0.5, primitive_cell=primitive, scale=False)
    for primitive in (False, True)
]
MATERIALS_PROJECT = {
    "license": "CC-BY-4.0",
    "source": "Materials Project (README.md says more)",
    "citation": "A. Jain et al., APL Materials 1, 011002 (2013); MP-20: T. Xie et al., ICLR 2022 (CDVAE); MPTS-52: "
    "S. G. Baird et al., JOSS 2024",
}


def pack(row: Row) -> dict[str, Any] | str:
    """The packed row with what it cost under `moved`; or why there is none."""
    checked = check(row, Checks(niggli=False, max_atoms=None, symprec=SYMPREC))
    if isinstance(checked, Finding):
        return checked.kind
    if checked.symmetry is None:
        return "no space group"
    exact = checked.symmetry.crystal
    columns = packed.packed(exact)
    back = packed.unpacked(columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not any(same.fit(checked.crystal.to_structure(), back.to_crystal().to_structure()) for same in SAME):
            return "not the same crystal"
    assert checked.labels.pop("elements") == packed.elements(columns)
    labels = {name: checked.labels.get(name) for name in packed.LABELS}
    moved = checked.symmetry.moved + _rounding(exact, back)
    return {"material_id": row.id, **columns, **labels, "moved": moved, "symprec": checked.symmetry.symprec}


def _rounding(before: SymmetricCrystal, after: SymmetricCrystal) -> float:
    """Å by which packing moved the atom that it moved most."""
    a, b = before.to_crystal(), after.to_crystal()
    away = a.frac_coords - b.frac_coords
    return float(np.linalg.norm((away - np.round(away)) @ a.to_structure().lattice.matrix, axis=1).max())


def crystals(name: str, file: Path) -> dict[str, Any]:
    """Writes a part; what `box.json` says of it."""
    rows = read(file).rows
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = list(tqdm(pool.imap(pack, rows, chunksize=16), name, len(rows), unit="crystal"))
    kept = [one for one in found if isinstance(one, dict)]
    left_out = {row.id: one for row, one in zip(rows, found, strict=True) if isinstance(one, str)}
    moved, smaller = np.array([one.pop("moved") for one in kept]), [one.pop("symprec") < SYMPREC for one in kept]
    packed.write(kept, box.FOLDER / box.CRYSTALS[name])
    return {
        "what": f"MP-20, {box.PARTS[name]}",
        **MATERIALS_PROJECT,
        "made_from": source(file),
        "rows": len(kept),
        "left_out": left_out,
        "symprec": SYMPREC,
        "found_at_a_smaller_tolerance": sum(smaller),
        "of_another_group_than_stated": sum(one["space_group"] != one["spacegroup.number"] for one in kept),
        "moved": {"median": float(np.median(moved)), "most": float(moved.max())},
    }


def hull(name: str, folder: Path) -> dict[str, Any]:
    """Writes a hull; what `box.json` says of it."""
    table, references = folder / "mp_formation_energies.parquet", folder / "mp_elemental_reference_entries.json.gz"
    lowest: dict[tuple[tuple[str, float], ...], Phase] = {}
    phases = table_phases(table)
    for phase in phases:
        key = tuple(sorted((symbol, round(fraction, 9)) for symbol, fraction in phase.fractions.items()))
        if key not in lowest or phase.energy < lowest[key].energy:
            lowest[key] = replace(phase, energy=round(phase.energy, 6))
    whole = Hull.from_phases(
        f"box:{name}",
        sorted(lowest.values(), key=lambda phase: phase.formula),
        ElementReferences.from_file(references),
        sources=[source(table), source(references)],
    )
    whole.write(box.FOLDER / box.HULLS[name])
    what = "the lowest formation energy of each composition, eV/atom, on the scale of PBE(+U) with MP2020 corrections"
    made_from = f"{source(table)}; {source(references)}"
    counts = Counter(len(phase.fractions) for phase in lowest.values())
    return {"what": what, **MATERIALS_PROJECT, "made_from": made_from, "rows": sum(map(len, whole.phases.values()))} | {
        "by_number_of_elements": dict(sorted(counts.items()))
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    data = parser.parse_args(arguments).shared / "data"
    told = {}
    for name, file in box.HULLS.items():
        told[file] = hull(name, data / "hull")
    for name, part in box.PARTS.items():
        told[box.CRYSTALS[name]] = crystals(name, data / f"mp20/{part}.parquet")
    for file, facts in told.items():
        content = (box.FOLDER / file).read_bytes()
        facts |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (box.FOLDER / "box.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
