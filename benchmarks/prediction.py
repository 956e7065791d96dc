"""How often is the true crystal among the predictions of its formula, by 1 and by 20, told the number of atoms or not?

    python benchmarks/prediction.py mini --work predictions

The true crystals are --num of --truth, drawn at random with a fixed seed, which the model never saw. `predict` is asked
for their formulas, once with the number of atoms, as published figures are (CrystaLLM, DiffCSP), and once without;
`evaluate --truth` counts. `match_rate` is of one attempt as it was drawn, which is what figures of one shot are, and
`match_rate_at_N` of the first N by likelihood. Ledgers and evaluations lie in --work, where the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd

import jaxcrystal
from jaxcrystal.errors import UserError
from jaxcrystal.interface.predicting import predict
from jaxcrystal.interface.tables import Crystals

QUICK = {"num": 3, "attempts": 5}


def some(name: str, num: int) -> Crystals:
    """So many crystals of a set, in its order."""
    found = jaxcrystal.read(name)
    sound = [i for i, row in enumerate(found) if row.crystal is not None]
    kept = np.sort(np.random.default_rng(0).choice(sound, min(num, len(sound)), replace=False))
    return Crystals(replace(found.source, rows=tuple(found.rows[i] for i in kept)))


def predicted(model: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each way of asking."""
    truth = some(options.truth, options.num)
    ask = pd.DataFrame(
        {
            "material_id": truth.ids,
            "formula": [row.crystal.formula for row in truth],
            "num_atoms": [len(row.crystal) for row in truth],
        }
    )
    for given in (True, False):
        place = options.work / f"{Path(model).name}_{'with' if given else 'without'}_atoms"
        predict(ask, model, place.with_suffix(".parquet"), attempts=options.attempts, given_atoms=given)
        found = jaxcrystal.evaluate(
            jaxcrystal.read(place.with_suffix(".parquet")),
            place,
            truth=truth,
            train=options.train,
            workers=options.workers,
        )
        intervals = found.metrics["confidence_95"]
        yield {
            "model": Path(model).name,
            "num_atoms_given": given,
            "attempts": options.attempts,
            "truth": found.metrics["counts"]["truth"],
            "outcomes": found.metrics["counts"]["outcomes"],
            "prediction": found.metrics["prediction"],
            "intervals": {name: ends for name, ends in intervals.items() if name.startswith("prediction.")},
        }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories, or names of the package's")
    parser.add_argument("--truth", default="mp20-test", help="true crystals (mp20-test)")
    parser.add_argument("--num", type=int, default=500, help="of them (500)")
    parser.add_argument("--attempts", type=int, default=20, help="at each (20)")
    parser.add_argument("--train", default="mp20", help="crystals whose formulas are known (mp20)")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="where ledgers and evaluations are kept")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--quick", action="store_true", help="three crystals, five attempts: a check that it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in options.models:
        for row in predicted(model, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"benchmark": "prediction", "quick": options.quick, "true": options.truth, "rows": rows}
    result |= {"measured": machine.facts(uses_accelerator=True)}
    print(f"written to {machine.write('prediction', result, options.out)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"prediction.py: {error}")
