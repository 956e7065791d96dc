"""Does likelihood foretell stability? Rank correlations, and what the likeliest share of a model's crystals is worth.

    python benchmarks/likelihood.py mini --work likelihood --others mp20-test diffcsp_mp20.parquet \\
        --potential M3GNet-MP-2021.2.8-PES --hull mp_formation_energies.parquet \\
        --references mp_elemental_reference_entries.json.gz

`--num` attempts of the model by the defaults of `sample`, and as many crystals, drawn at random with a fixed seed, of
each of --others, which the model scores; all judged alike, each in a folder of --work, where the same command goes on.

- `correlation`: Spearman's, of -log p (of a crystal, or a token or an atom of it) with the energy above the hull of
  those that were relaxed and placed, with a bootstrap interval: above 0, what is less likely lies higher.
- `kept`: of the attempts that are ok the likeliest by each of these, as `sample --keep` has them, and the rates that
  `evaluate` tells of these alone: uniqueness is counted among them anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd
from prediction import some
from scipy.stats import spearmanr

import jaxcrystal
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.metrics import metrics_from_table
from jaxcrystal.evaluation.table import read_table
from jaxcrystal.sampling.attempt import OK
from jaxcrystal.sampling.keeping import PER, left_out
from jaxcrystal.sampling.sampling import sample

SHARES = (1.0, 0.75, 0.5, 0.25)
RATES = (
    "validity.structural",
    "validity.compositional",
    "novelty.by_matching",
    "stability.metastable_rate",
    "sun.metastable_rate",
)
BOOTSTRAP_DRAWS = 1000
QUICK = {"num": 4, "draws": 2}


def drawn(model: str, num: int, path: Path) -> list[dict[str, Any]]:
    """The rows of a ledger, which is made, or gone on with."""
    sample(model, num, path, seed=0)
    return pd.read_parquet(path).to_dict("records")


def judged(samples: Any, out: Path, options: argparse.Namespace, scores: pd.DataFrame | None = None) -> pd.DataFrame:
    """The table of an evaluation."""
    return jaxcrystal.evaluate(
        samples,
        out,
        train=options.train,
        potential=options.potential,
        hull=options.hull,
        references=options.references,
        scores=scores,
        workers=options.workers,
    ).table


def correlations(table: pd.DataFrame) -> dict[str, Any]:
    """Of the rows that have both a probability and a place; None of fewer than three."""
    table = table[table["log_probability"].notna() & table["e_above_hull"].notna()]
    if len(table) < 3:
        return {"placed": len(table), "correlation": None}
    total = -table["log_probability"].to_numpy(float)
    by = {"total": total, "token": -table["log_probability_per_token"].to_numpy(float)}
    by["atom"] = total / table["num_atoms"].to_numpy(float)
    height, generator = table["e_above_hull"].to_numpy(float), np.random.default_rng(0)
    resampled = [generator.integers(len(table), size=len(table)) for _ in range(BOOTSTRAP_DRAWS)]
    found = {}
    for name, nats in by.items():
        several = [spearmanr(nats[rows], height[rows]).statistic for rows in resampled]
        found[name] = [float(spearmanr(nats, height).statistic), *map(float, np.nanpercentile(several, [2.5, 97.5]))]
    return {"placed": len(table), "correlation": found}


def kept(out: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What each share is worth, by each likelihood; `rows` are those of the ledger that `out` evaluates."""
    table, provenance = read_table(out / "structures.parquet")
    for share in SHARES:
        for by in PER if share < 1 else ["total"]:
            without = left_out(rows, len(rows), share, by)
            part = table.iloc[[i for i, row in enumerate(rows) if row["status"] == OK and i not in without]]
            for suffix in ("", "_relaxed"):
                group = part[f"group{suffix}"]
                part = part.assign(**{f"unique{suffix}": ~(group.isna() | group.duplicated())})
            found = metrics_from_table(part, provenance)
            rates = {}
            for name in RATES:
                section, key = name.split(".")
                rates[name] = [found[section][key], *found["confidence_95"][name]]
            atoms = float(part["num_atoms"].mean())
            yield {"share": share, "by": by, "crystals": len(part), "mean_num_atoms": atoms, "rates": rates}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, or a name of the package's")
    parser.add_argument("--work", type=Path, required=True, help="where ledgers and evaluations are kept")
    parser.add_argument("--others", nargs="+", default=["mp20-test"], help="sets of crystals (mp20-test)")
    parser.add_argument("--num", type=int, default=1000, help="attempts, and crystals of each other set (1000)")
    parser.add_argument("--draws", type=int, default=20, help="texts of each crystal, for a P1 model (20)")
    parser.add_argument("--train", default="mp20", help="crystals that count as known (mp20)")
    parser.add_argument("--potential", default="chgnet")
    parser.add_argument("--hull", default="mp")
    parser.add_argument("--references")
    parser.add_argument("--workers", type=int, default=machine.cores())
    parser.add_argument("--quick", action="store_true", help="a minimal size")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    options.work.mkdir(parents=True, exist_ok=True)
    name = Path(options.model).name
    measured = machine.facts(uses_accelerator=True)
    ledger, out = options.work / f"{name}.parquet", options.work / name
    rows = drawn(options.model, options.num, ledger)
    sets = {name: correlations(judged(ledger, out, options))}
    shares = list(kept(out, rows))
    for other in options.others:
        title = Path(other).stem
        crystals = some(other, options.num)
        with jaxcrystal.load(options.model) as sampler:
            scored = sampler.score(crystals, draws=options.draws, store=options.work / f"{title}.jsonl")
        sets[title] = correlations(judged(crystals, options.work / title, options, scored.to_pandas()))
        print(title, json.dumps(sets[title]), flush=True)
    result = {"benchmark": "likelihood", "quick": options.quick, "model": name, "attempts": options.num}
    result |= {"potential": Path(options.potential).name, "hull": Path(options.hull).name}
    result |= {"sets": sets, "kept": shares, "measured": measured}
    print(f"written to {machine.write('likelihood', result, options.out)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"likelihood.py: {error}")
