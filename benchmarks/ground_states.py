"""Is the known ground state of a compound among a few attempts at its formula?

    python benchmarks/ground_states.py runs/mini_mp20

Compounds of MP-20 on the hull, by a seed: as many of the training set as of the test set with formulas that the
training set has not. Of each formula so many attempts, at the cells that training had for formulas of its size; an
attempt is the ground state if pymatgen's StructureMatcher says so at the tolerances with which structure prediction is
counted (CDVAE's: 0.3, 0.5, 10°), whatever the attempt's own validity.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import machine
import numpy as np
from pymatgen.analysis.structure_matcher import StructureMatcher

import jaxcrystal
from jaxcrystal.crystals import dataset
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import wilson
from jaxcrystal.evaluation.prediction import ANGLE_TOLERANCE, LENGTH_TOLERANCE, SITE_TOLERANCE
from jaxcrystal.interface.sampler import Sampler

MATCHER = StructureMatcher(LENGTH_TOLERANCE, SITE_TOLERANCE, ANGLE_TOLERANCE)


def ground_states(name: str, but: set[str], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Compounds of a part of MP-20 that lie on the hull, each the lowest of its formula, of no formula of `but`."""
    crystals = dataset.load(name)
    energies = np.array(crystals.labels["formation_energy_per_atom"].to_pylist(), float)
    above = np.array(crystals.labels["e_above_hull"].to_pylist(), float)
    lowest: dict[str, int] = {}
    for i in np.argsort(energies, kind="stable"):
        lowest.setdefault(crystals.labels["pretty_formula"][int(i)].as_py(), int(i))
    on_hull = sorted(
        i
        for formula, i in lowest.items()
        if above[i] == 0 and formula not in but and len(set(crystals.crystal(i).species)) > 1
    )
    for i in np.random.default_rng(seed).choice(on_hull, count, replace=False):
        crystal, known = crystals.crystal(int(i)), crystals.attributes(int(i))
        yield {
            "material_id": crystals.ids[i],
            "formula": known["pretty_formula"],
            "space_group": known["spacegroup.number"],
            "num_atoms": len(crystal),
            "structure": crystal.to_structure(),
        }


def attempted(sampler: Sampler, compound: dict[str, Any], num: int, seed: int) -> dict[str, Any]:
    """How many attempts at its formula are the compound, and which is the first of them, from 1."""
    structure = compound.pop("structure")
    drawn = sampler.sample(num, formula=compound["formula"], seed=seed)
    same = [one is not None and MATCHER.fit(structure, one) for one in drawn.structures()]
    first = next((i for i, it_is in enumerate(same, start=1) if it_is), None)
    return compound | {"attempts": num, "ground_state": int(sum(same)), "first": first}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a name of the package's")
    parser.add_argument("--count", type=int, default=10, help="compounds of each kind (10)")
    parser.add_argument("--num", type=int, default=20, help="attempts at each (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.9, help="as of `sample` (0.9)")
    parser.add_argument("--top-p", type=float, default=0.9, help="as of `sample` (0.9)")
    parser.add_argument("--out", type=machine.Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    trained = set(dataset.load("mp20").labels["pretty_formula"].to_pylist())
    rows = []
    with jaxcrystal.load(options.model, temperature=options.temperature, top_p=options.top_p) as sampler:
        for kind, name, but in (("of train", "mp20", set()), ("formula not of train", "mp20-test", trained)):
            for compound in ground_states(name, but, options.count, options.seed):
                rows.append({"kind": kind} | attempted(sampler, compound, options.num, options.seed))
                print(rows[-1], flush=True)
    found = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        there = [row["first"] is not None for row in rows if row["kind"] == kind]
        found[kind] = {"compounds": len(there), "found": sum(there), "interval": list(wilson(sum(there), len(there)))}
    result = {"benchmark": "ground_states", "model": str(options.model), "temperature": options.temperature}
    result |= {"top_p": options.top_p, "seed": options.seed, "found": found, "rows": rows}
    result["measured"] = machine.facts(uses_accelerator=True)
    print(f"written to {machine.write('ground_states', result, options.out)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"ground_states.py: {error}")
