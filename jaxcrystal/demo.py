"""The main job, small and offline: from the embedded crystals to a report on crystals that a model has designed.

Each step is a verb that can be typed as well; the demo prints it first. What an earlier run has finished is kept.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import jaxcrystal
from jaxcrystal.sampling.sampling import sample

RECIPE = "demo.yaml"
ATTEMPTS = 112


def demo(out: Path) -> Path:
    """Runs the demo in the folder `out`; returns the path of its report. Raises UserError if `out` is not writable."""
    data, model, samples, report = out / "data", out / "model", out / "samples.parquet", out / "report"
    known, held_out = data / "prototypes_train.parquet", data / "prototypes_validation.parquet"

    _say(1, "embedded crystals, checked and reduced", f"prepare prototypes --out {data}")
    if not (data / "report.json").exists():
        print(jaxcrystal.prepare("prototypes", data, workers=2))

    _say(2, "a tiny model learns them", f"train {RECIPE} --set out={model}")
    with resources.as_file(resources.files("jaxcrystal") / RECIPE) as path:
        places = {"out": model, "data.train": known, "data.validation": held_out}
        if jaxcrystal.train(path, places).stopped is not None:
            raise KeyboardInterrupt

    _say(3, f"{ATTEMPTS} attempts at new crystals", f"sample --model {model} --num {ATTEMPTS} --out {samples}")
    sample(model, ATTEMPTS, samples)

    _say(
        4,
        "which of them would exist",
        f"evaluate {samples} --train {known} --nearest --reference {known} --potential chgnet "
        f"--hull {known} {held_out} --out {report}",
    )
    compared = {"train": known, "nearest": True, "reference": known}
    found = jaxcrystal.evaluate(samples, report, **compared, potential="chgnet", hull=[known, held_out], workers=2)
    print(f"{found}\n\nopen {found.report.resolve()}")
    return found.report


def _say(step: int, what: str, command: str) -> None:
    print(f"\n[{step}/4] {what}\n      jaxcrystal {command}", flush=True)
