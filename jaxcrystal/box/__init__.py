"""What is in the package beside the code, by the names that stand for it.

    mp20, mp20-val, mp20-test    crystals, the three parts of MP-20: wherever crystals or a data set are read
    mp                           a hull, the lowest formation energy of each composition: where `evaluate` takes a hull
    mini                         a model, wherever a model directory is read

`box.json` says of each where it came from, under which licence, and the hash that `jaxcrystal doctor` checks, and of a
model with what its crystals are compared; `launch/build_box.py` made them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.yardstick import Yardstick

FOLDER = Path(__file__).parent
CRYSTALS = {"mp20": "mp20.parquet", "mp20-val": "mp20-val.parquet", "mp20-test": "mp20-test.parquet"}
PARTS = {"mp20": "train", "mp20-val": "val", "mp20-test": "test"}  #: as `prepare` calls them
HULLS = {"mp": "hull-mp.parquet"}
MODELS = {"mini": "mini"}  #: folders


def crystals(name: object) -> Path | None:
    """The file of packed crystals that a name stands for; None for all else, and where a file has this name."""
    return _file(CRYSTALS, name)


def hull(name: object) -> Path | None:
    """The hull that a name stands for; None as of `crystals`."""
    return _file(HULLS, name)


def model(name: object) -> Path | None:
    """The directory of the model that a name stands for; None as of `crystals`.

    Raises UserError if its files are not those that shipped.
    """
    path = _file(MODELS, name)
    if path is not None:
        _check(path.name, contents().get(path.name, {}))
    return path


def yardstick(fingerprint: str) -> Yardstick | None:
    """Of the model of that fingerprint (`sampling.sampling.fingerprint`); None if it is none of the box."""
    told = contents()
    found = (name for name, path in MODELS.items() if told.get(path, {}).get("fingerprint") == fingerprint)
    return next((Yardstick.of({"model": name} | told[MODELS[name]]["yardstick"]) for name in found), None)


def _file(names: dict[str, str], name: object) -> Path | None:
    return FOLDER / names[str(name)] if str(name) in names and not Path(str(name)).exists() else None


def contents() -> dict[str, dict[str, Any]]:
    """What `box.json` says, by file. Raises UserError if it cannot be read."""
    try:
        return json.loads((FOLDER / "box.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{FOLDER / 'box.json'} cannot be read ({error}); install jaxcrystal again") from None


def check() -> int:
    """How many there are. Raises UserError for one that is missing, or whose bytes are not those that shipped."""
    told = contents()
    for name, facts in told.items():
        _check(name, facts)
    return len(told)


def sha256(path: Path) -> str:
    """Of a file its bytes; of a folder its files' names and hashes, but of hidden ones. Raises OSError."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    lines = (f"{file.name} {sha256(file)}\n" for file in sorted(path.iterdir()) if file.name[0] != ".")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check(name: str, facts: dict[str, Any]) -> None:
    path = FOLDER / name
    try:
        found = sha256(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; install jaxcrystal again") from None
    if found != facts.get("sha256"):
        raise UserError(f"{path} is not what was shipped (sha256 {found[:12]}…); install jaxcrystal again")
