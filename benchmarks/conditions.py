"""Is what is asked for obeyed? By the prompt alone, with the grammar, and by crystals for which nothing was asked.

    python benchmarks/conditions.py mini --potential chgnet --hull mp

The wishes are what real crystals have that the model never saw: of the first --num crystals of --wishes one attribute
that its prompts may state, or two (--pairs of them, in the order of the table). An attempt each, at the sampler's
defaults, judged by `jaxcrystal evaluate`; base rates are of --unconditional crystals that the same model draws unasked.
Without a potential energies are asked for, and not judged. Ledgers and evaluations lie in --work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import machine

import jaxcrystal
from jaxcrystal.crystals import dataset
from jaxcrystal.errors import UserError
from jaxcrystal.sampling.conditions import Trained
from jaxcrystal.sampling.sampling import sample
from jaxcrystal.texts.conditions import known
from jaxcrystal.weights.saved import model_directory


def wishes(name: str, attributes: tuple[str, ...], num: int) -> list[dict[str, Any]]:
    """Distinct ones, of the first crystals that have all of these attributes."""
    crystals = dataset.load(name)
    found: dict[str, dict[str, Any]] = {}
    for i in range(len(crystals)):
        has = crystals.attributes(i)
        if all(attribute in has for attribute in attributes):
            wish = {attribute: has[attribute] for attribute in attributes}
            found.setdefault(json.dumps(wish), wish)
        if len(found) == num:
            break
    return list(found.values())


def asked(model: Path, name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each attribute, and pair of them, and each way."""
    trained = Trained.read(model_directory(model))
    there = [one for one in known(trained.text.properties) if trained.attributes is None or one in trained.attributes]
    judged = {"potential": options.potential, "hull": options.hull or (), "references": options.references}
    judged |= {"workers": options.workers}
    base = options.work / f"{name}_unconditional"
    sample(model, options.unconditional, base.with_suffix(".parquet"))
    jaxcrystal.evaluate(jaxcrystal.read(base.with_suffix(".parquet")), base, **judged)  # judged as asked, not as mini's
    for attributes in [*((one,) for one in there), *islice(combinations(there, 2), options.pairs)]:
        rows = wishes(options.wishes, attributes, options.num)
        if not rows:  # no crystal has such a label
            continue
        for grammar in (False, True):
            words = "+".join(known(trained.text.properties)[one].name for one in attributes)
            place = options.work / f"{name}_{words}_{grammar}"
            sample(model, 1, place.with_suffix(".parquet"), conditions=rows, grammar=grammar)
            drawn = jaxcrystal.read(place.with_suffix(".parquet"))
            found = jaxcrystal.evaluate(drawn, place, unconditional=base, **judged)
            told, intervals = found.metrics.get("conditions", {}).get(words, {}), found.metrics["confidence_95"]
            yield {
                "model": name,
                "asked": words,
                "grammar": grammar,
                "attempts": len(rows),
                "told": told,
                "intervals": {key: value for key, value in intervals.items() if key.startswith("conditions.")},
            }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="model directories, or names of the package's")
    parser.add_argument("--wishes", default="mp20-test", help="crystals whose labels are asked for (mp20-test)")
    parser.add_argument("--num", type=int, default=200, help="wishes of each kind (200)")
    parser.add_argument("--unconditional", type=int, default=1000, help="crystals for which nothing is asked (1000)")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of attributes (6)")
    parser.add_argument("--potential", help="as of `evaluate`; without it energies are not judged")
    parser.add_argument("--hull")
    parser.add_argument("--references")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="where ledgers and evaluations are kept")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in options.models:
        for row in asked(Path(model), Path(model).name, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    result = {"benchmark": "conditions", "wishes": options.wishes, "unconditional": options.unconditional, "rows": rows}
    result |= {"potential": options.potential, "measured": machine.facts(uses_accelerator=True)}
    print(f"written to {machine.write('conditions', result, options.out)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"conditions.py: {error}")
