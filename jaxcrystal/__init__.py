"""jaxcrystal: designs crystals with language models.

From a script or a notebook: `jaxcrystal.read`, `prepare`, `train`, `evaluate`, `relax` (docs/python.md); the command
line calls the same. Importing this costs nothing: each function imports what it needs when it is called.
"""

from typing import TYPE_CHECKING, Any

from jaxcrystal.errors import UserError
from jaxcrystal.interface.functions import evaluate, prepare, read, relax, train

if TYPE_CHECKING:
    from jaxcrystal.crystals.crystal import Crystal
    from jaxcrystal.interface.evaluation import Evaluation
    from jaxcrystal.interface.tables import Crystals, Relaxations

__version__ = "0.1.0"
__all__ = [
    "Crystal",
    "Crystals",
    "Evaluation",
    "Relaxations",
    "UserError",
    "evaluate",
    "prepare",
    "read",
    "relax",
    "train",
]

#: Classes, by the module that holds them: read when they are first named, for they need numpy, pandas and jax.
_CLASSES = {
    "Crystal": "jaxcrystal.crystals.crystal",
    "Crystals": "jaxcrystal.interface.tables",
    "Relaxations": "jaxcrystal.interface.tables",
    "Evaluation": "jaxcrystal.interface.evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module 'jaxcrystal' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
