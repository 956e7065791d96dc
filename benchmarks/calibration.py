"""How far formation energies and hull distances by a potential are from the stated ones, and which hull is nearer.

    python benchmarks/calibration.py             500 crystals of MP-20 test, drawn by a seed; an hour of one core
    python benchmarks/calibration.py --quick     a minute, a check that it runs; its figures mean nothing

Crystals that lie less than 0.08 eV/atom above the stated hull go the way of `jaxcrystal evaluate`: relaxed by M3GNet,
corrected as the Materials Project corrects, placed against a hull:

- `provided`: the table of the Materials Project's formation energies, with its elements' reference entries;
- `self-consistent`: crystals of MP-20 in the chemical systems of the drawn ones, labelled by the same potential: by
  relaxing them as the drawn ones are, and by single points where they stand. They are train and val, which the drawn
  crystals are not among; and all of MP-20, which they are.

To tell apart what makes an error, the stated formation energies are placed too: against the provided hull (what the
hull itself is wrong by), and against the hull of the stated formation energies of the same crystals (what is wrong
because phases are missing). `same_phases` compares with the latter, so that missing phases do not count.

The Materials Project's distance is that of a crystal which is among the phases itself, hence never below 0. A found
distance is told as it is; `with_itself` puts what lies below 0 to 0, which is to add the crystal to the phases. The
provided table has the drawn crystals' own rows, with their stated energies.

Relaxations are kept in `--cache`: a run that is stopped goes on, and one that is repeated is done at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd
from pymatgen.core import Composition

from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.metrics import METASTABLE, STABLE
from jaxcrystal.hull.formation import ElementReferences, Uncovered
from jaxcrystal.hull.hull import Hull
from jaxcrystal.hull.phases import Phase
from jaxcrystal.hull.sources import LABELS, label_settings
from jaxcrystal.reader.reading import read
from jaxcrystal.relaxation.batch import Relaxation, RelaxationSettings
from jaxcrystal.relaxation.potentials import load_potential
from jaxcrystal.relaxation.relaxations import relax_all
from jaxcrystal.relaxation.selfcheck import EnergyReference

SHARED = Path(__file__).parents[1].parent / "shared"
DATA = SHARED / "data"
TARGET_MAE, TARGET_BIAS = 0.025, 0.010  #: eV/atom, of formation energies
STATED_BELOW = 0.08  #: eV/atom above the stated hull
ON_HULL = STABLE + 1e-6  #: eV/atom; the data have seven digits
PART, WHOLE = "train and val", "all of MP-20"  #: what a hull of MP-20's crystals holds
QUICK_ROWS = 4000  #: of each part of MP-20
ANIONS = ("O", "F", "Cl", "N", "Br", "S", "I", "Se", "Te", "H")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=500, help="drawn from MP-20 test (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--potential", default=str(SHARED / "potentials/M3GNet-MP-2021.2.8-PES"))
    parser.add_argument(
        "--labels", nargs="+", choices=LABELS, default=LABELS, help="of the self-consistent hull (both)"
    )
    parser.add_argument("--cache", type=Path, help="keeps relaxations (default: jaxcrystal/calibration in ~/.cache)")
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if not DATA.exists():
        raise UserError(f"{DATA} does not exist: the calibration needs MP-20 and a hull beside the checkout")
    if options.quick:
        options.crystals, options.labels = 20, LABELS[1:]
        options.cache = options.cache or Path(tempfile.mkdtemp())
    if options.cache is None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        options.cache = home / "jaxcrystal/calibration"
    measured = machine.facts(uses_accelerator=False)
    potential = load_potential(options.potential)
    references = ElementReferences.from_file(DATA / "hull/mp_elemental_reference_entries.json.gz")

    parts = {name: crystals(name, options.quick) for name in ("train", "val", "test")}
    known = {PART: pd.concat([parts["train"], parts["val"]])}
    test = parts["test"]
    if options.quick:  # so few that a hull of their own seldom covers a crystal
        elements = {c.elements[0] for c in known[PART]["composition"] if len(c) == 1}
        test = test[[elements.issuperset(c.elements) for c in test["composition"]]]
    else:
        known[WHOLE] = pd.concat(list(parts.values()))
    drawn = draw(test, options.crystals, options.seed)
    systems = {frozenset(s) for row in drawn["composition"] for s in subsystems(row)}
    known = {name: t[[frozenset(c.as_dict()) in systems for c in t["composition"]]] for name, t in known.items()}

    ends = relax_all(list(drawn["structure"]), potential, RelaxationSettings(), cache_dir=options.cache)
    outcomes = Counter(end.status.value for end in ends)
    drawn["found"] = [formation(end, references, potential.reference) for end in ends]
    drawn["uncorrected"] = [formation(end, references, EnergyReference.OWN) for end in ends]

    stated = drawn["formation_energy_per_atom"]
    cases = []  # hull, whose formation energies are placed against it, those, and the stated hull of the same phases
    provided = Hull.from_table(DATA / "hull/mp_formation_energies.parquet", references)
    cases += [("provided", provided, "stated", stated, None), ("provided", provided, "found", drawn["found"], None)]
    for phases, rows in known.items():
        same = stated_hull(phases, rows)
        cases += [(same.name, same, "stated", stated, same), (same.name, same, "found", drawn["found"], same)]
        for labels in options.labels:
            if phases == WHOLE and labels != "relaxed":
                continue
            settings = label_settings(labels)
            hull = Hull.from_crystals(list(rows["structure"]), potential, settings=settings, cache_dir=options.cache)
            own = pd.Series([formation(end, hull.references, potential.reference) for end in ends])
            cases.append((f"{phases}, self-consistent, {labels}", hull, "own", own, same))
    hulls = compared(cases, drawn)

    energies = errors(drawn["found"], drawn["formation_energy_per_atom"])
    result = {
        "benchmark": "calibration",
        "claim": "errors in eV/atom of formation energies and hull distances by a potential, against the stated ones",
        "potential": {"name": potential.name, "sha256": potential.sha256, "note": potential.note},
        "crystals": len(drawn),
        "seed": options.seed,
        "stated_below": STATED_BELOW,
        "relaxations": dict(outcomes),
        "mean_steps": float(np.mean([end.steps for end in ends])),
        "formation_energy": energies,
        "targets": {"mae": TARGET_MAE, "bias": TARGET_BIAS},
        "met": energies["mae"] <= TARGET_MAE and abs(energies["bias"]) <= TARGET_BIAS,
        "formation_energy_uncorrected": errors(drawn["uncorrected"], drawn["formation_energy_per_atom"]),
        "formation_energy_by_anion": by_anion(drawn),
        "hulls": hulls,
        "quick": options.quick,
        "measured": measured,
    }
    path = machine.write("calibration", result, options.out)
    print(f"{measured['machine']}\n{len(drawn)} crystals, {potential.name}: {dict(outcomes)}")
    print(f"  formation energy, eV/atom: MAE {energies['mae']:.4f}, bias {energies['bias']:+.4f}")
    for row in hulls:
        print(
            f"  {row['hull']:44} {row['energies']:6} {row['placed']:4} placed, MAE {row['mae']:.4f}, bias "
            f"{row['bias']:+.4f}, metastable {row['metastable']:.1%}, stable {row['stable']:.1%}"
        )
    print(f"written to {path}")
    return result


def crystals(name: str, quick: bool) -> pd.DataFrame:
    """The rows of a part of MP-20 that are crystals, with `structure` and `composition`; `quick`: some, small."""
    path = DATA / f"mp20/{name}.parquet"
    table = pd.read_parquet(path)[["material_id", "pretty_formula", "formation_energy_per_atom", "e_above_hull"]]
    found = [sample.crystal for sample in read(path, limit=QUICK_ROWS if quick else None).rows]
    kept = [row for row, crystal in enumerate(found) if crystal is not None and (len(crystal) < 5 or not quick)]
    structures = [found[row].to_structure() for row in kept]
    return table.iloc[kept].assign(structure=structures, composition=[s.composition for s in structures])


def draw(table: pd.DataFrame, count: int, seed: int) -> pd.DataFrame:
    """Rows whose stated distance is below `STATED_BELOW`, in their order."""
    table = table[table["e_above_hull"] < STATED_BELOW].reset_index(drop=True)
    return table.loc[sorted(np.random.default_rng(seed).choice(len(table), count, replace=False))].reset_index(
        drop=True
    )


def subsystems(composition: Composition) -> list[tuple[str, ...]]:
    symbols = sorted(composition.as_dict())
    return [part for n in range(1, len(symbols) + 1) for part in itertools.combinations(symbols, n)]


def formation(end: Relaxation, references: ElementReferences, reference: EnergyReference) -> float:
    """Formation energy in eV/atom; NaN where there is no energy, or an element has no reference."""
    if end.structure is None or end.energy is None:
        return float("nan")
    try:
        return references.formation_energy_per_atom(end.structure, end.energy, reference)
    except Uncovered:
        return float("nan")


def stated_hull(name: str, known: pd.DataFrame) -> Hull:
    """Of the stated formation energies."""
    rows = known[known["formation_energy_per_atom"].notna()]
    phases = [
        Phase(c.reduced_formula, {s: c.get_atomic_fraction(s) for s in c.as_dict()}, float(energy))
        for c, energy in zip(rows["composition"], rows["formation_energy_per_atom"], strict=True)
    ]
    left_out = {"no stated formation energy": len(known) - len(rows)}
    return Hull.from_phases(f"{name}, stated", phases, ElementReferences({}), left_out=left_out)


def compared(cases: Sequence[tuple[str, Hull, str, pd.Series, Hull | None]], drawn: pd.DataFrame) -> list[dict]:
    """A row a case: distances of the drawn crystals beside the stated ones, and beside those to the same phases."""
    composition, stated = drawn["composition"], drawn["e_above_hull"]
    found = [distances(hull, composition, energies) for _, hull, _, energies, _ in cases]
    everywhere = pd.concat(found, axis=1).notna().all(axis=1)
    rows = []
    for (name, hull, whose, _, same), distance in zip(cases, found, strict=True):
        covered = distance.notna()
        if not covered.any():
            raise UserError(f"no drawn crystal has its elements in the hull {name}: draw more")
        row = {
            "hull": name,
            "energies": whose,
            "phases": sum(map(len, hull.phases.values())),
            "left_out": dict(hull.left_out or {}),
            "placed": int(covered.sum()),
            "not_placed": int((~covered).sum()),
            **errors(distance, stated),
            "with_itself": errors(distance.clip(lower=0), stated),
            "placed_everywhere": errors(distance[everywhere], stated[everywhere]),
            "metastable": float((distance < METASTABLE)[covered].mean()),
            "stable": float((distance <= ON_HULL)[covered].mean()),
            "stated_metastable": float((stated < METASTABLE)[covered].mean()),
            "stated_stable": float((stated <= ON_HULL)[covered].mean()),
        }
        if same is not None:
            to_same = distances(same, composition, drawn["formation_energy_per_atom"])
            row["same_phases"] = errors(distance, to_same)
            row["same_phases_placed_everywhere"] = errors(distance[everywhere], to_same[everywhere])
        rows.append(row)
    return rows


def distances(hull: Hull, compositions: pd.Series, energies: pd.Series) -> pd.Series:
    """In eV/atom; NaN where the hull does not cover a crystal, or it has no energy."""

    def distance(composition: Composition, energy: float) -> float:
        try:
            return hull.e_above_hull(composition, energy)
        except Uncovered:
            return float("nan")

    pairs = zip(compositions, energies, strict=True)
    return pd.Series([energy if np.isnan(energy) else distance(c, energy) for c, energy in pairs])


def errors(found: pd.Series, stated: pd.Series) -> dict[str, Any]:
    """Of those that have both, in eV/atom."""
    difference = (found - stated).dropna()
    return {
        "count": len(difference),
        "mae": float(difference.abs().mean()),
        "bias": float(difference.mean()),
        "median_absolute": float(difference.abs().median()),
        "within_0.05": float((difference.abs() < 0.05).mean()),
    }


def by_anion(drawn: pd.DataFrame) -> dict[str, Any]:
    """Errors of the formation energy by the most electronegative element: a wrong correction shows in one of them."""
    last = [max(c.elements, key=lambda element: element.X).symbol for c in drawn["composition"]]
    kinds = pd.Series([symbol if symbol in ANIONS else "none" for symbol in last])
    return {
        kind: errors(drawn["found"][kinds == kind], drawn["formation_energy_per_atom"][kinds == kind])
        for kind in sorted(set(kinds[drawn["found"].notna()]))
    }


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
