"""jaxcrystal: designs crystals with language models.

From a script or a notebook: `jaxcrystal.read`, `prepare`, `train`, `load`, `templates`, `evaluate`, `relax`
(docs/python.md); the command line calls the same. Importing this costs nothing: each function imports what it needs
when it is called.
"""

from typing import TYPE_CHECKING, Any

from jaxcrystal.errors import UserError
from jaxcrystal.interface.functions import evaluate, load, prepare, read, relax, templates, train

if TYPE_CHECKING:
    from jaxcrystal.crystals.crystal import Crystal
    from jaxcrystal.interface.evaluation import Evaluation
    from jaxcrystal.interface.sampler import Sampler
    from jaxcrystal.interface.tables import Attempts, Crystals, Relaxations, Substitutions
    from jaxcrystal.texts.constraints import Constraints

__version__ = "0.1.0"
__all__ = [
    "Attempts",
    "Constraints",
    "Crystal",
    "Crystals",
    "Evaluation",
    "Relaxations",
    "Sampler",
    "Substitutions",
    "UserError",
    "evaluate",
    "load",
    "prepare",
    "read",
    "relax",
    "templates",
    "train",
]

#: Classes, by the module that holds them: read when they are first named, for they need numpy, pandas and jax.
_CLASSES = {
    "Attempts": "jaxcrystal.interface.tables",
    "Constraints": "jaxcrystal.texts.constraints",
    "Crystal": "jaxcrystal.crystals.crystal",
    "Crystals": "jaxcrystal.interface.tables",
    "Relaxations": "jaxcrystal.interface.tables",
    "Substitutions": "jaxcrystal.interface.tables",
    "Evaluation": "jaxcrystal.interface.evaluation",
    "Sampler": "jaxcrystal.interface.sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module 'jaxcrystal' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_CLASSES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
