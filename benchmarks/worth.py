"""What models and settings are worth: as many samples, the same judge, a row each.

    jaxcrystal train tiny_symmetry_cpu && jaxcrystal train tiny_cpu
    python benchmarks/worth.py runs/tiny_symmetry_cpu runs/tiny_cpu --work runs/worth --train data/mp20/train.parquet \\
        --potential M3GNet-MP-2021.2.8-PES --hull mp_formation_energies.parquet \\
        --references mp_elemental_reference_entries.json.gz

    python benchmarks/worth.py runs/mini ... --title temperatures --temperature 0.7 --top-p 1 --new --num 500

Of each model: the crystals it has seen and the seconds of its steps, by its own log; nats of the first 1,000 crystals
of --validation (text and end, given the unconditional prompt, written as they are); tokens of a sampled text, its end
included; crystals per second of `sample`, programs compiled before; and shares of all attempts with 95 % intervals
(Wilson, bootstrap), as `jaxcrystal evaluate` tells them. What is measured stands in the result at once, and a model
that is in it, with as many samples, the same settings and the same judge, is not measured again. Ledgers and
evaluations lie in --work: another folder for a model that was trained again under the same name.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
from pretraining import AS_IT_IS, nats

import jaxcrystal
from jaxcrystal.config import Recipe, load
from jaxcrystal.crystals import dataset
from jaxcrystal.errors import UserError
from jaxcrystal.evaluation.intervals import bootstrap_mean
from jaxcrystal.weights.saved import load_model

#: Of `sample`, by their defaults.
SETTINGS = {"temperature": 0.9, "top_p": 0.9, "composition_temperature": None, "new": False}
VALIDATION = 1000  #: crystals on which nats are taken
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


def held_out(model: Path, validation: str) -> dict[str, Any]:
    """Nats of a crystal that it has not seen."""
    recipe = replace(load(Recipe, model / "recipe.yaml"), augment=AS_IT_IS)
    found = nats(load_model(model), recipe, dataset.load(validation).first(VALIDATION))
    return {"validation": Path(validation).name, "nats": float(np.mean(found)), "nats_interval": bootstrap_mean(found)}


def sampled(model: Path, ledger: Path, num: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Draws the ledger, and as many crystals once more to take the time."""
    with jaxcrystal.load(model, **settings) as sampler:
        drawn = sampler.sample(num, seed=0).to_pandas()
        begin = time.perf_counter()
        sampler.sample(num, seed=1)
        seconds = time.perf_counter() - begin
    drawn.to_parquet(ledger)
    told = {"tokens": float(drawn["tokens"].mean()), "crystals_per_second": num / seconds}
    return told | ({"redraws": int(drawn["redraws"].sum())} if settings["new"] else {})


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
    counts = {name: found["counts"][name] for name in ("unique", "novel")}
    return {"ok": found["counts"]["outcomes"].get("ok", 0), **counts, "shares": shares}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="model directories of `jaxcrystal train`")
    parser.add_argument("--work", type=Path, required=True, help="where ledgers and evaluations are kept")
    parser.add_argument("--title", default="worth", help="of the result, and so of its file (worth)")
    parser.add_argument("--train", default="mp20", help="the training crystals, for novelty (mp20)")
    parser.add_argument("--validation", default="mp20-val", help="crystals on which nats are taken (mp20-val)")
    parser.add_argument("--potential", default="chgnet")
    parser.add_argument("--hull", default="mp")
    parser.add_argument("--references")
    parser.add_argument("--num", type=int, default=300, help="attempts of each model (300)")
    for name, default in SETTINGS.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(option, action="store_true", help="as of `sample`")
        else:
            parser.add_argument(option, type=float, default=default, help=f"as of `sample` ({default})")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args(arguments)
    measured = machine.facts(uses_accelerator=True)
    path = machine.place(options.title, measured, options.out)
    new = {"benchmark": "worth", "title": options.title, "rows": []}
    result = json.loads(path.read_text()) if path.exists() else new
    options.work.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in SETTINGS}
    changed = {name: value for name, value in settings.items() if value != SETTINGS[name]}
    for model in options.models:
        asked = {"model": model.name, "samples": options.num, "potential": Path(options.potential).name}
        asked |= {"hull": Path(options.hull).name, "train": Path(options.train).name}
        there = (row for row in result["rows"] if row.get("settings", {}) == changed)
        if any(asked.items() <= row.items() for row in there):
            continue
        words = "".join(f"_{name}_{value}" for name, value in changed.items())
        ledger = options.work / f"{model.name}_{options.num}{words}.parquet"
        row = asked | {"settings": changed} | trained(model) | held_out(model, options.validation)
        row |= sampled(model, ledger, options.num, settings)
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
        sys.exit(f"worth.py: {error}")
