"""The training set of a round: all that the model was trained on before, and what the round has kept.

    round_1/verdicts.csv          each attempt of the round, with what became of it
    round_1/kept/kept.parquet     what is kept, as `prepare` wrote it, symmetry included
    round_1/train.parquet         the set that the round's model is trained on; the first rows are the original's
    round_1/pairs/                where verdicts teach by preference: attempts as drawn, and which of two is preferred

Crystals that were kept are named `round1-17`, by the round and the attempt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from jaxcrystal.crystals.dataset import PROVENANCE, written_whole
from jaxcrystal.errors import UserError
from jaxcrystal.improvement.recipe import Selection
from jaxcrystal.improvement.selection import Verdict, select
from jaxcrystal.reader.preparing import prepare

#: Labels of a kept crystal, by the columns that an evaluation has them in; a band gap is not known.
LABELS = {
    "formula": "pretty_formula",
    "spacegroup_relaxed": "spacegroup.number",
    "formation_energy_per_atom": "formation_energy_per_atom",
    "e_above_hull": "e_above_hull",
}
BY_SYMMETRY = "symmetry.space_group"  #: null where no space group was found


def keep(table: pd.DataFrame, rule: Selection, earlier: Sequence[Path], folder: Path, number: int) -> Path:
    """Judges the attempts of round `number` by `rule` and prepares those that are kept; returns their file.

    `table` is the round's evaluation, `earlier` the files of the rounds before, whose compositions count. Raises
    UserError if none is kept, with what became of them, or if `folder` cannot be written.
    """
    there = Counter(formula for path in earlier for formula in pd.read_parquet(path)["pretty_formula"])
    verdicts = select(table, rule, there)
    counts = Counter(verdicts)
    with written_whole(folder / "verdicts.csv") as unfinished:
        shown = ["id", "formula", "e_above_hull", "phases_of_system", "spacegroup_relaxed"]
        table[shown].assign(verdict=verdicts).to_csv(unfinished, index=False)
    if not counts[Verdict.KEPT]:
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        raise UserError(f"round {number} keeps none of its {len(table)} attempts ({told}); see {folder}/verdicts.csv")
    kept = table[verdicts == Verdict.KEPT]
    rows = kept[list(LABELS)].rename(columns=LABELS)
    rows.insert(0, "material_id", [f"round{number}-{i}" for i in kept["row"]])
    place = folder / "kept.parquet"
    with written_whole(place) as unfinished:
        rows.assign(cif=kept["relaxed_cif"]).to_parquet(unfinished, index=False)
    prepare([place], folder / "kept", max_atoms=None, workers=1)
    place.unlink()
    return folder / "kept" / place.name


def pair(table: pd.DataFrame, folder: Path, seed: int) -> Path:
    """Writes attempts that were kept, each with one of those that lay too high, as the model drew them; returns the
    pairs' file, beside which `attempts.parquet` has the crystals. `folder` is that of the round.

    Both stood behind the prompt that states nothing. Each attempt of the fewer is taken as often as the others need it.
    Raises UserError if there is none of a kind.
    """
    verdicts = pd.read_csv(folder / "verdicts.csv")["verdict"].to_numpy()
    random = np.random.default_rng(seed)
    kinds = [random.permutation(np.flatnonzero(verdicts == kind)) for kind in (Verdict.KEPT, Verdict.TOO_HIGH)]
    if not all(map(len, kinds)):
        raise UserError(f"{folder}: {len(kinds[0])} attempts were kept and {len(kinds[1])} lay too high; no pairs")
    count = max(map(len, kinds))
    rows = table[np.isin(verdicts, [Verdict.KEPT, Verdict.TOO_HIGH])]
    place = folder / "drawn.parquet"
    with written_whole(place) as unfinished:
        rows[["id", "cif"]].rename(columns={"id": "material_id"}).to_parquet(unfinished, index=False)
    prepare([place], folder / "pairs", max_atoms=None, workers=1)
    place.unlink()
    attempts = folder / "pairs/attempts.parquet"
    join([folder / "pairs" / place.name], attempts)
    there = set(pd.read_parquet(attempts, columns=["material_id"])["material_id"])
    preferred, other = (table["id"].to_numpy()[np.resize(kind, count)] for kind in kinds)
    pairs = pd.DataFrame({"preferred": preferred, "dispreferred": other})
    with written_whole(folder / "pairs/pairs.parquet") as unfinished:
        pairs[pairs.isin(there).all(axis=1)].to_parquet(unfinished, index=False)
    return folder / "pairs/pairs.parquet"


def join(parts: Sequence[Path], out: Path) -> int:
    """Writes the rows of prepared sets one after the other as one; returns how many have no symmetry and are left out.

    Raises UserError if one cannot be read or was prepared without symmetry, or `out` cannot be written.
    """
    tables, left_out = [], 0
    for path in parts:
        try:
            table = pq.read_table(path)
            found = table[BY_SYMMETRY].is_valid()
        except (OSError, pa.ArrowInvalid, KeyError):
            raise UserError(f"{path} is no set with symmetry that `jaxcrystal prepare` wrote; prepare it") from None
        left_out += len(table) - found.to_numpy().sum()
        tables.append(table.filter(found))
    joined = pa.concat_tables(tables, promote_options="default")
    origins = json.dumps({"joined": [str(path) for path in parts]})
    with written_whole(out) as unfinished:
        pq.write_table(joined.replace_schema_metadata({PROVENANCE: origins}), unfinished)
    return int(left_out)
