"""What is in the package beside the code, by the names that stand for it.

    mp20, mp20-val, mp20-test    crystals, the three parts of MP-20: wherever crystals or a data set are read
    mp                           a hull, the lowest formation energy of each composition: where `evaluate` takes a hull

`box.json` says of each file where it came from, under which licence, and the hash that `jaxcrystal doctor` checks;
`launch/build_box.py` made them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError

FOLDER = Path(__file__).parent
CRYSTALS = {"mp20": "mp20.parquet", "mp20-val": "mp20-val.parquet", "mp20-test": "mp20-test.parquet"}
PARTS = {"mp20": "train", "mp20-val": "val", "mp20-test": "test"}  #: as `prepare` calls them
HULLS = {"mp": "hull-mp.parquet"}


def crystals(name: object) -> Path | None:
    """The file of packed crystals that a name stands for; None for all else, and where a file has this name."""
    return _file(CRYSTALS, name)


def hull(name: object) -> Path | None:
    """The hull that a name stands for; None as of `crystals`."""
    return _file(HULLS, name)


def _file(names: dict[str, str], name: object) -> Path | None:
    return FOLDER / names[str(name)] if str(name) in names and not Path(str(name)).exists() else None


def contents() -> dict[str, dict[str, Any]]:
    """What `box.json` says, by file. Raises UserError if it cannot be read."""
    try:
        return json.loads((FOLDER / "box.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{FOLDER / 'box.json'} cannot be read ({error}); install jaxcrystal again") from None


def check() -> int:
    """How many files there are. Raises UserError for one that is missing, or whose bytes are not those that shipped."""
    told = contents()
    for name, facts in told.items():
        try:
            found = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{FOLDER / name} cannot be read: {error.strerror}; install jaxcrystal again") from None
        if found != facts["sha256"]:
            raise UserError(f"{FOLDER / name} is not what was shipped (sha256 {found[:12]}…); install jaxcrystal again")
    return len(told)
