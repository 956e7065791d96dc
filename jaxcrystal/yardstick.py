"""With what a model's crystals are compared where nobody says it: what it was trained on, a reference, energies.

A model of the package has its own in `box.json`; one that was improved has it beside its weights, in `yardstick.json`,
and the crystals of its rounds with it. The ledger of its attempts carries it, wherever the ledger goes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath

FILE = "yardstick.json"


@dataclass(frozen=True)
class Yardstick:
    """Names of the package's, or paths."""

    model: str  #: who drew them
    train: tuple[str, ...]  #: the sets that it was trained on
    reference: str | None = None  #: crystals of the same kind that it never saw
    hull: str | None = None
    potential: str | None = None

    @classmethod
    def of(cls, told: dict[str, Any]) -> Yardstick:
        """From JSON, where one set may stand by itself."""
        train = told["train"]
        return cls(**told | {"train": (train,) if isinstance(train, str) else tuple(train)})


def write(directory: Path, yardstick: Yardstick) -> None:
    """Beside a model; what lies in its directory is named without it, so that the two can move together."""
    (directory / FILE).write_text(json.dumps(asdict(yardstick), indent=1) + "\n", encoding="utf-8")


def read(directory: AnyPath) -> Yardstick | None:
    """Of a model's directory; None where it has none. Raises UserError if it cannot be read."""
    path = directory / FILE
    if not path.exists():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        beside = [directory / name for name in told["train"]]
        train = [str(one.resolve()) if one.exists() else name for one, name in zip(beside, told["train"], strict=True)]
        return Yardstick.of(told | {"train": train})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it, and name the training set yourself") from None
