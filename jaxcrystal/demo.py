"""What mini designs, in minutes and offline: new crystals, a wish of one's own, and which of them would exist.

Each step is a verb that can be typed as well; the demo prints it first. What an earlier run has finished is kept.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import jaxcrystal
from jaxcrystal.crystals.formulas import spelled
from jaxcrystal.sampling.sampling import sample

NEW, WISHED, WISH = 50, 20, "SrTiO3"
SHOWN = 5  #: crystals of a step that are printed
OWN = """
[your own] mini goes on with your crystals, some minutes on two cores:
      jaxcrystal prepare mine.csv --out data
      jaxcrystal train mini_finetune --set data.train=data/mine.parquet
      jaxcrystal sample --model runs/mini_finetune --num 100 --out mine.parquet"""


def demo(out: Path) -> Path:
    """Runs the demo in the folder `out`; returns the path of its report. Raises UserError if `out` is not writable."""
    new, wished = out / "new.parquet", out / f"{WISH}.parquet"
    _say(1, "crystals of formulas that its training did not have", f"sample --model mini --num {NEW} --new --out {new}")
    sample("mini", NEW, new, new=True)
    _show(new)
    _say(2, f"a wish: {WISH}", f"sample --model mini --num {WISHED} --formula {WISH} --out {wished}")
    sample("mini", WISHED, wished, conditions={"pretty_formula": WISH})
    _show(wished)
    _say(3, f"which of {WISH} would exist", f"evaluate {wished} --out {out / WISH}")
    print(jaxcrystal.evaluate(wished, out / WISH, workers=2))
    _say(4, "which of the new ones would exist", f"evaluate {new} --out {out / 'new'}")
    found = jaxcrystal.evaluate(new, out / "new", workers=2)
    picture = found.pictures(12).write(out / "best.svg")
    print(f"{found}\n\nopen {found.report.resolve()}\nthe new ones nearest to the hull: {picture.resolve()}\n{OWN}")
    return found.report


def _say(step: int, what: str, command: str) -> None:
    print(f"\n[{step}/4] {what}\n      jaxcrystal {command}", flush=True)


def _show(ledger: Path) -> None:
    """The first crystals of a ledger, a line each."""
    rows = pd.read_parquet(ledger)
    for row in rows[rows["status"] == "ok"].head(SHOWN).itertuples():
        lattice = row.text.splitlines()[-1]
        print(f"      {spelled(row.formula):<16} space group {row.written_group:<4.0f} lattice {lattice}", flush=True)
