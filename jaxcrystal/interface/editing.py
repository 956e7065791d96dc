"""A crystal of whatever the reader reads, and a ledger of what a model writes around the parts of it that stay."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.reader.reading import read
from jaxcrystal.sampling import editing
from jaxcrystal.sampling.editing import Parts
from jaxcrystal.sampling.sampling import SampleReport


def edit(
    model_dir: str | AnyPath,
    source: Any,
    num: int,
    out: str | Path,
    *,
    sites: Iterable[int] = (),
    elements: bool = False,
    composition: bool = False,
    cell: bool = False,
    group: bool = False,
    **settings: Any,
) -> SampleReport:
    """Makes `num` attempts to write the crystal of `source` anew but for what is kept, which is as `Sampler.edit` has
    it, and writes a row for each to `out`. `settings`, and errors, are those of `sampling.sample`.

    Raises UserError if `source` cannot be read or does not hold one crystal, and for what `edit_of` refuses.
    """
    parts = Parts.of(sites, elements=elements, composition=composition, cell=cell, group=group)
    return editing.edit(model_dir, one_crystal(source), num, out, parts, **settings)


def one_crystal(source: Any) -> Crystal:
    """The only one of a source: a path, the text of a CIF, a structure, or a crystal, which is taken as it is.

    Raises UserError if it cannot be read, is no crystal, or holds several.
    """
    if isinstance(source, Crystal):
        return source
    place = isinstance(source, PathLike) or (isinstance(source, str) and "\n" not in source)
    found = read(Path(source) if place else [source], limit=2)
    what = source if place else "the source"
    if len(found) > 1:
        raise UserError(f"{what} holds several crystals; edit takes one: put it into a file of its own")
    (row,) = found.rows
    if row.crystal is None:
        raise UserError(f"{what} holds no crystal: {row.outcome}{row.reason and f', {row.reason}'}")
    return row.crystal
