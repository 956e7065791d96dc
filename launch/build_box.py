"""Makes what ships in `jaxcrystal/box`.

    python launch/build_box.py data SHARED                       crystals and hull, some minutes on two cores
    python launch/build_box.py model mini RUN --worth RESULT     the model of a run that `jaxcrystal train` wrote

SHARED holds `data/mp20/{train,val,test}.parquet` and `data/hull/`. Every crystal is made symmetric within 0.01 Å,
packed, unpacked, and compared with the one it was: by pymatgen's StructureMatcher, and by how far the atom that moved
most is from where it was. One that has no symmetry, or is not the same, is left out and told; `box.json` keeps the
counts. The hull keeps the lowest energy of each composition.

RESULT is what `benchmarks/worth.py` wrote of RUN; the model's card says its figures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher
from tqdm import tqdm

import jaxcrystal
from jaxcrystal import box
from jaxcrystal.config import Recipe, load
from jaxcrystal.crystals import packed
from jaxcrystal.crystals.symmetric import SymmetricCrystal
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull, source
from jaxcrystal.hull.phases import Phase, table_phases
from jaxcrystal.reader.checks import Checks, Finding, check
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.rows import Row
from jaxcrystal.texts.conditions import BY_ATTRIBUTE
from jaxcrystal.weights.export import export

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


CARD = """# {name}

A language model of {weights:.2f} million weights that writes crystals by their space group and free parameters
(docs/symmetry.md), from random weights on `mp20`: MP-20's training set, of which the copy that it saw has 27,108 of
27,136 rows. {epochs:.1f} epochs ({steps:,} steps) on two CPU cores. `recipe.yaml` is all of it;
`formulas.txt`, `num_atoms.json` and `labels.parquet` say what it has seen.

Of {samples:,} attempts at the defaults of `jaxcrystal sample` (seed 0), judged by {potential} and {hull}, with 95 %
intervals: {shares}.

Limits: at most 20 atoms in a primitive cell and the chemistry of MP-20; prompts can state {stated}{infills}; no more is
known of what it draws than an evaluation says, and that rests on a potential, not on experiments.

It opens with `jaxcrystal sample --model {name}`, `jaxcrystal.load("{name}")`, and transformers' `AutoModelForCausalLM`.
The weights are Apache-2.0; what they learned from is CC-BY-4.0 (`../README.md`, with whom to cite). The method: N.
Gruver et al., "Fine-Tuned Language Models Generate Stable Inorganic Materials as Text", ICLR 2024, arXiv 2402.04379.
"""
WORDS = {
    "validity.structural": "structurally valid",
    "validity.compositional": "compositionally valid",
    "stability.metastable_rate": "metastable",
    "sun.metastable_rate": "metastable, unique and new",
}


def model(name: str, run: Path, worth: Path) -> dict[str, Any]:
    """Writes a model as bfloat16, with its card; what `box.json` says of it."""
    folder = box.FOLDER / box.MODELS[name]
    shutil.rmtree(folder, ignore_errors=True)
    report = export(run, folder, "hf", dtype="bfloat16")
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    description["model"]["dtype"] = "float32"  # what draws: on two CPU cores twice as fast
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    recipe = load(Recipe, run / "recipe.yaml")
    (row,) = (row for row in json.loads(worth.read_text())["rows"] if row["model"] == run.name and not row["settings"])
    shares = [
        f"{100 * x:.1f} % {WORDS[key]} ({100 * a:.1f} to {100 * b:.1f})" for key, (x, a, b) in row["shares"].items()
    ]
    numbers = {"epochs": row["crystals_seen"] / 27108}
    judge = {key: row[key] for key in ("steps", "samples", "potential", "hull")}
    stated = ", ".join(BY_ATTRIBUTE[name].name for name in recipe.augment.attributes)
    infills = ", and it was trained to infill an element" if recipe.augment.infill else ""
    card = CARD.format(
        name=name,
        weights=report.bytes / 2e6,
        shares=", ".join(shares),
        stated=stated,
        infills=infills,
        **numbers,
        **judge,
    )
    paragraphs = (textwrap.fill(part, 120, break_long_words=False) for part in card.split("\n\n"))
    (folder / "README.md").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)
    with jaxcrystal.load(folder) as sampler:
        fingerprint = sampler.fingerprint
    return {
        "what": f"a model of {report.bytes / 2e6:.2f} million weights that writes crystals of MP-20 by their symmetry",
        "license": "Apache-2.0; trained on data under CC-BY-4.0",
        "citation": f"{MATERIALS_PROJECT['citation']}; N. Gruver et al., ICLR 2024 (the method)",
        "made_from": f"{name}'s recipe.yaml, seed {recipe.seed}, on {recipe.data.train}",
        "fingerprint": fingerprint,
        "yardstick": {"train": "mp20", "reference": "mp20-test", "hull": "mp", "potential": "chgnet"},
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("data").add_argument("shared", type=Path)
    of_model = kinds.add_parser("model")
    of_model.add_argument("name", choices=list(box.MODELS))
    of_model.add_argument("run", type=Path)
    of_model.add_argument("--worth", type=Path, required=True)
    options = parser.parse_args(arguments)
    told = {}
    if options.kind == "model":
        told[box.MODELS[options.name]] = model(options.name, options.run, options.worth)
    else:
        for name, file in box.HULLS.items():
            told[file] = hull(name, options.shared / "data/hull")
        for name, part in box.PARTS.items():
            told[box.CRYSTALS[name]] = crystals(name, options.shared / f"data/mp20/{part}.parquet")
    for file, facts in told.items():
        path = box.FOLDER / file
        files = [path] if path.is_file() else list(path.iterdir())
        facts |= {"bytes": sum(each.stat().st_size for each in files), "sha256": box.sha256(path)}
    all_of = json.dumps(box.contents() | told, indent=1, ensure_ascii=False)
    (box.FOLDER / "box.json").write_text(all_of + "\n", encoding="utf-8")
    print(json.dumps(told, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
