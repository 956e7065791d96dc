"""Whether crystals have the space group that their texts state: as sampled, and as relaxed.

    jaxcrystal sample --model runs/tiny_symmetry_cpu --num 300 --out samples.parquet
    jaxcrystal evaluate samples.parquet --out report --potential chgnet
    python benchmarks/stated_groups.py samples.parquet report

A row for each tolerance: of the attempts whose text is a crystal, the share whose found group is the stated one, the
share that is more symmetric, and the rest; with 95 % intervals (Wilson). Groups come as often as the samples have them;
`evenly` is the mean over groups. With `--train`, what the model was trained on, also apart by how many crystals that
has of the stated group: for samples that were asked for every group alike.

    jaxcrystal sample --model mini --conditions groups.csv --num 5 --out evenly.parquet    # spacegroup.number: 1 to 230
    python benchmarks/stated_groups.py evenly.parquet --train data/mp20/train.parquet
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd

from jaxcrystal.crystals import dataset
from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.evaluation.intervals import wilson
from jaxcrystal.reader.reading import crystal_from_cif

TOLERANCES = (0.01, 0.1)  #: Å
SEEN = ((0, 0), (1, 9), (10, 99), (100, None))  #: crystals of a group in training, from and to


def compared(crystals: Sequence[Crystal], stated: Sequence[int], symprec: float) -> dict[str, Any]:
    """Of crystals whose texts state these groups, by the groups that are found within `symprec`."""
    found = [symmetrize(crystal, symprec) for crystal in crystals]
    all_of = list(zip(found, stated, crystals, strict=True))
    equal = np.array([one is not None and one.crystal.space_group == number for one, number, _ in all_of])
    higher = np.array([one is not None and one.exceeds(number, len(given)) for one, number, given in all_of])
    by_group = pd.Series(equal).groupby(pd.Series(list(stated))).mean()
    return {
        "symprec": symprec,
        "crystals": len(crystals),
        "equal": float(equal.mean()),
        "interval": list(wilson(int(equal.sum()), len(equal))),
        "more_symmetric": float(higher.mean()),
        "evenly": float(by_group.mean()),
        "groups": len(by_group),
    }


def rows(ledger: pd.DataFrame, report: pd.DataFrame | None, seen: Counter[int] | None) -> Iterator[dict[str, Any]]:
    ok = ledger[ledger["status"] == "ok"]
    crystals, groups = [crystal_from_cif(cif) for cif in ok["cif"]], ok["written_group"].astype(int).tolist()
    for symprec in TOLERANCES:
        yield {"crystals_are": "as sampled"} | compared(crystals, groups, symprec)
    for low, high in () if seen is None else SEEN:
        here = [i for i, number in enumerate(groups) if low <= seen[number] and (high is None or seen[number] <= high)]
        told = f"{low} or more" if high is None else f"{low} to {high}" if high else "none"
        for symprec in TOLERANCES if here else ():
            found = compared([crystals[i] for i in here], [groups[i] for i in here], symprec)
            yield {"crystals_are": f"as sampled, {told} in training"} | found
    if report is not None:
        both = ok.assign(id=ok["index"].astype(str)).merge(report[["id", "relaxed_cif"]].dropna(), on="id")
        crystals = [crystal_from_cif(cif) for cif in both["relaxed_cif"]]
        for symprec in TOLERANCES:
            yield {"crystals_are": "relaxed"} | compared(crystals, both["written_group"].astype(int).tolist(), symprec)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ledger", type=Path, help="a ledger of a model that writes symmetry texts")
    parser.add_argument(
        "report", type=Path, nargs="?", help="a folder of `jaxcrystal evaluate` on it, with a potential"
    )
    parser.add_argument("--train", type=Path, help="a data set that `jaxcrystal prepare` wrote")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    report = None if options.report is None else pd.read_parquet(options.report / "structures.parquet")
    seen = None
    if options.train is not None:
        seen = Counter(dataset.load(options.train).symmetric().space_group.tolist())
    found = list(rows(pd.read_parquet(options.ledger), report, seen))
    result = {"benchmark": "stated_groups", "ledger": options.ledger.name, "rows": found}
    result["measured"] = machine.facts(uses_accelerator=False)
    print(f"written to {machine.write('stated_groups', result, options.out)}")
    for row in found:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
