"""`jaxcrystal write`: crystals from wherever they are, as the files that others read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxcrystal.errors import UserError
from jaxcrystal.interface.files import TABLES
from jaxcrystal.interface.functions import read

if TYPE_CHECKING:
    from jaxcrystal.interface.sources import Place, Source
    from jaxcrystal.interface.tables import Crystals


def write(
    source: Source, out: Place, *, form: Literal["cif", "poscar"] = "cif", workers: int | str = 0
) -> tuple[Crystals, list[Path]]:
    """What was read of `source`, and the files that were written of it: `Crystals.write` says which.

    Raises UserError as `read` does, and if `out` is neither table nor folder, holds something, or cannot be written.
    """
    out = Path(out)
    table = out.suffix in TABLES and not out.is_dir()
    if out.suffix[1:].isalpha() and not table and not out.is_dir():
        raise UserError(f"cannot write {out}: give a name that ends in {' or '.join(TABLES)}, or a folder")
    if table and form != "cif":
        raise UserError(f"{out} is a table of pymatgen's structures; {form} is what a folder may hold")
    crystals = read(source, workers=workers)
    return crystals, crystals.write(out, form)
