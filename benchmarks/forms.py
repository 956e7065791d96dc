"""What models that write crystals in either text format are worth: the same samples, the same judge, a row each.

    jaxcrystal train tiny_symmetry_cpu && jaxcrystal train tiny_cpu
    python benchmarks/forms.py runs/tiny_symmetry_cpu runs/tiny_cpu --work runs/forms --train data/mp20/train.parquet \\
        --potential M3GNet-MP-2021.2.8-PES --hull mp_formation_energies.parquet --references mp_references.json.gz

Of each model: the crystals it has seen and the seconds of its steps, by its own log; tokens of a sampled text, its end
included; crystals per second of `sample`, programs compiled before; and shares of all attempts with 95 % intervals
(Wilson, bootstrap), as `jaxcrystal evaluate` tells them. What is measured stands in the result at once, and a model
that is in it, with as many samples and the same judge, is not measured again. Ledgers and evaluations lie in --work:
another folder for a model that was trained again under the same name.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import machine

import jaxcrystal
from jaxcrystal.config import Recipe, load
from jaxcrystal.errors import UserError

SHARES = ("validity.structural", "validity.compositional", "stability.metastable_rate", "sun.metastable_rate")


def trained(model: Path) -> dict[str, Any]:
    """What its run says of its training."""
    recipe = load(Recipe, model / "recipe.yaml")
    log = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    blocks = {entry["step"]: entry for entry in log if entry["event"] == "train"}.values()
    seconds = [len(entry["losses"]) * entry["step_seconds"] for entry in blocks]
    crystals = sum(entry["crystals_per_second"] * each for entry, each in zip(blocks, seconds, strict=True))
    return {
        "form": recipe.text.form,
        "decimals": [recipe.text.coord_decimals, recipe.text.length_decimals, recipe.text.angle_decimals],
        "descriptions": recipe.augment.descriptions,
        "adapters": recipe.lora is not None,
        "seed": recipe.seed,
        "steps": max(entry["step"] for entry in blocks),
        "crystals_seen": round(crystals),
        "step_seconds": sum(seconds),
    }


def sampled(model: Path, ledger: Path, num: int) -> dict[str, Any]:
    """Draws the ledger, and as many crystals once more to take the time."""
    with jaxcrystal.load(model) as sampler:
        drawn = sampler.sample(num, seed=0).to_pandas()
        begin = time.perf_counter()
        sampler.sample(num, seed=1)
        seconds = time.perf_counter() - begin
    drawn.to_parquet(ledger)
    return {"samples": num, "tokens": float(drawn["tokens"].mean()), "crystals_per_second": num / seconds}


def judged(ledger: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    found = jaxcrystal.evaluate(
        ledger,
        out,
        train=options.train,
        potential=options.potential,
        hull=options.hull,
        references=options.references,
        workers=machine.cores(),
    ).metrics
    shares = {}
    for name in SHARES:
        part, key = name.split(".")
        shares[name] = [found[part][key], *found["confidence_95"][name]]
    return {"ok": found["counts"]["outcomes"].get("ok", 0), "shares": shares}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="model directories of `jaxcrystal train`")
    parser.add_argument("--work", type=Path, required=True, help="where ledgers and evaluations are kept")
    parser.add_argument("--train", type=Path, required=True, help="the training crystals, for novelty")
    parser.add_argument("--potential", default="chgnet")
    parser.add_argument("--hull", type=Path, required=True)
    parser.add_argument("--references", type=Path)
    parser.add_argument("--num", type=int, default=300, help="attempts of each model (300)")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    measured = machine.facts(uses_accelerator=True)
    path = machine.place("forms", measured, options.out)
    result = json.loads(path.read_text()) if path.exists() else {"benchmark": "forms", "rows": []}
    options.work.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        asked = {"model": model.name, "samples": options.num, "potential": Path(options.potential).name}
        asked |= {"hull": options.hull.name, "train": options.train.name}
        if any(asked.items() <= row.items() for row in result["rows"]):
            continue
        ledger = options.work / f"{model.name}_{options.num}.parquet"
        row = asked | trained(model) | sampled(model, ledger, options.num)
        row |= judged(ledger, ledger.with_suffix(""), options) | {"measured": machine.facts(uses_accelerator=True)}
        result["rows"].append(row)
        machine.write_to(path, result | {"measured": measured})
        print(json.dumps(row), flush=True)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"forms.py: {error}")
