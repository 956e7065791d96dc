"""How many decimals a symmetry text needs: what a crystal loses when it is written and read again.

    jaxcrystal prepare val.parquet --out data/mp20
    python benchmarks/decimals.py --data data/mp20/val.parquet             300 crystals, some minutes
    python benchmarks/decimals.py --data prototypes:validation --quick     a check that it runs

Each crystal is made symmetric (`symmetrize`, 0.1 Å) and written with so many decimals of coordinates, lengths and
angles. Beside tokens: how far its atoms move in Å (the one that moves most of each crystal), its volume in percent, and
how far its energy by M3GNet is from that of the symmetric crystal, eV/atom, both as they stand. `made symmetric` is the
same for the step before, from the crystal of the data to the symmetric one. And P1 texts, as the paper writes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
from pymatgen.core import Structure

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.relaxation.potentials import load_potential
from jaxcrystal.texts.p1 import text as p1
from jaxcrystal.texts.symmetry import text as symmetry
from jaxcrystal.texts.tokenizer import load_tokenizer

POTENTIAL = Path(__file__).parents[1].parent / "shared/potentials/M3GNet-MP-2021.2.8-PES"
#: Decimals of coordinates, lengths and angles.
DECIMALS = ((2, 1, 0), (2, 2, 1), (3, 2, 1), (3, 3, 2), (4, 3, 2))
PAPER = (2, 1, 0)


def moved(before: Crystal, after: Crystal) -> float:
    """Å by which the atom that moved most did, the cells laid on each other; atoms in the same order."""
    away = after.frac_coords - before.frac_coords
    away -= np.round(away)
    lattice = before.to_structure().lattice.matrix
    return float(np.linalg.norm(away @ lattice, axis=1).max())


def figures(values: Sequence[float]) -> dict[str, float]:
    found = np.abs(np.array(values))
    return {"median": float(np.median(found)), "p95": float(np.quantile(found, 0.95)), "most": float(found.max())}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set of `jaxcrystal prepare`")
    parser.add_argument("--crystals", type=int, default=300, help="drawn from it by a seed (300)")
    parser.add_argument("--potential", default=str(POTENTIAL))
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    data = dataset.load(options.data)
    batch = data.symmetric()
    count = min(6 if options.quick else options.crystals, len(data))
    drawn = np.sort(np.random.default_rng(0).choice(len(data), count, replace=False))
    potential = load_potential(options.potential)

    def energies(structures: list[Structure]) -> np.ndarray:
        return np.array(potential.energies(structures)) / [len(one) for one in structures]

    stated = [data.crystal(int(i)) for i in drawn]
    exact = [batch.crystal(int(i)) for i in drawn]
    atoms = [one.to_crystal() for one in exact]
    level = energies([one.to_structure() for one in atoms])
    given = energies([one.to_structure() for one in stated])
    rows: list[dict[str, Any]] = [{"text": "made symmetric", "energy": figures(level - given)}]
    for tokenizer in ("compact-symmetry", "compact"):
        encode = load_tokenizer(tokenizer).encode
        for coordinates, lengths, angles in DECIMALS if tokenizer == "compact-symmetry" else (PAPER,):
            fmt = TextFormat(coord_decimals=coordinates, length_decimals=lengths, angle_decimals=angles)
            if tokenizer == "compact":
                texts = [p1.write(one, fmt) for one in stated]
                read, before, reference = [p1.parse(text) for text in texts], stated, given
            else:
                texts = [symmetry.write(one, fmt) for one in exact]
                read, before, reference = [symmetry.parse(text).to_crystal() for text in texts], atoms, level
            changed = energies([one.to_structure() for one in read]) - reference
            rows.append(
                {
                    "text": "P1" if tokenizer == "compact" else "symmetry",
                    "decimals": [coordinates, lengths, angles],
                    "tokens": float(np.mean([len(encode(text)) for text in texts])),
                    "moved": figures([moved(a, b) for a, b in zip(before, read, strict=True)]),
                    "volume": figures([100 * (b.volume / a.volume - 1) for a, b in zip(before, read, strict=True)]),
                    "energy": figures(changed),
                }
            )
            print(rows[-1], flush=True)
    result = {"benchmark": "decimals", "quick": options.quick, "data": str(options.data), "crystals": count}
    result |= {"potential": potential.name, "rows": rows, "measured": machine.facts(uses_accelerator=False)}
    print(f"written to {machine.write('decimals', result, options.out)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"decimals.py: {error}")
