"""Structure prediction: from formulas to ranked attempts, which `evaluate --truth` reads: `jaxcrystal predict`.

x.parquet              a row a prediction: those of each crystal in the order of their rank
x.drawn.parquet        the ledger of the attempts, as `sample` writes it; predictions are ranked anew without a draw
x.relaxations/         where they are ranked by energy
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from jaxcrystal import locks
from jaxcrystal.interface import files
from jaxcrystal.interface.asked import asked, naming, wishes
from jaxcrystal.interface.predicted import Ranking
from jaxcrystal.interface.tables import Predictions
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.attempts_table import read_table
from jaxcrystal.sampling.conditions import NumAtoms
from jaxcrystal.sampling.sampling import sample


@locks.holds(lambda formulas, model_dir, out, **_: out)
def predict(
    formulas: Any,
    model_dir: str | PathLike[str],
    out: str | PathLike[str],
    *,
    attempts: int = 20,
    num_atoms: NumAtoms = None,
    given_atoms: bool = True,
    rank_by: str = "log_probability",
    potential: str | PathLike[str] | None = None,
    fmax: float = 0.1,
    max_steps: int = 500,
    limit: int | None = None,
    workers: int | str = 0,
    **settings: Any,
) -> Predictions:
    """Makes `attempts` attempts at the crystal of each formula, ranks them, and writes a row for each to `out`, a
    .parquet or .csv file. The same call goes on where it was stopped, or with more attempts; one with another ranking
    ranks what was drawn.

    - `formulas`: as of `interface.asked`; the first `limit`.
    - `num_atoms`: of every cell, in place of what the table says; without `given_atoms` that is left aside.
    - `settings`: those of `sampling.sample`.
    - all others are those of `Sampler.predict`.

    Raises UserError as `Sampler.predict`, and if `out` cannot be written.
    """
    ranking = Ranking(rank_by, potential, fmax, max_steps, workers)
    table = files.checked_table(Path(out))
    crystals = asked(formulas, num_atoms=given_atoms and num_atoms is None, limit=limit)
    firsts = list(wishes(crystals).values())
    ledger = table.with_name(f"{table.stem}.drawn.parquet")
    with naming(firsts):
        sample(
            model_dir, attempts, ledger, conditions=[one.condition for one in firsts], num_atoms=num_atoms, **settings
        )
    rows = [Attempt(**row) for row in read_table(ledger)]
    found = Predictions(ranking.ranked(crystals, rows, table.with_name(f"{table.stem}.relaxations")))
    files.write_table(found.to_pandas(), table)
    return found
