"""What a hull can be built from, and `jaxcrystal hull build`, which writes it to one file.

- `mp:Li-Fe-O`: the Materials Project's entries of a chemical system and of its subsystems, through `mp-api`
- JSON: pymatgen's computed entries, in the shapes that `json_documents.py` lists, or a phase diagram of them
- a pickled phase diagram, as matbench-discovery publishes it
- a table of formation energies, with the elements' reference entries
- with a potential: any crystals that `samples.read` reads, which the potential labels
"""

from __future__ import annotations

import bz2
import gzip
import math
import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxcrystal import box, locks
from jaxcrystal.errors import UserError
from jaxcrystal.hull.formation import ElementReferences
from jaxcrystal.hull.hull import Hull, is_hull_file, source
from jaxcrystal.hull.phases import table_phases
from jaxcrystal.reader.inputs import require_crystals
from jaxcrystal.reader.reading import read
from jaxcrystal.reader.sources import is_json, json_items
from jaxcrystal.relaxation.batch import RelaxationSettings
from jaxcrystal.relaxation.potentials import PotentialCard
from jaxcrystal.relaxation.relaxations import potential_card
from jaxcrystal.workers import Workers

if TYPE_CHECKING:
    from pymatgen.core import Structure

MATERIALS_PROJECT = "mp:"
KEY = "MP_API_KEY"
TABLES = (".parquet", ".pq", ".csv", ".csv.gz", ".csv.bz2", ".csv.xz")
PICKLES = (".pkl", ".pickle", ".pkl.gz", ".pickle.gz", ".pkl.bz2")

#: What labels a crystal: the end of its relaxation, or a single point where it stands.
LABELS = ("relaxed", "single-point")


def label_settings(labels: str, fmax: float = 0.1, max_steps: int = 500) -> RelaxationSettings:
    """How a potential labels known crystals. Raises UserError for another word than `LABELS` has."""
    if labels not in LABELS:
        raise UserError(f"unknown labels {labels!r}; known are {', '.join(LABELS)}")
    return RelaxationSettings(fmax, max_steps if labels == "relaxed" else 0)


def known_hull(paths: Sequence[str | Path], references: str | Path | None, labels: str = "relaxed") -> Hull | None:
    """The hull of `evaluate --hull`, if its energies are known; None for crystals that the potential is to label.

    Raises UserError if the options do not go together.
    """
    label_settings(labels)
    paths = [box.hull(path) or path for path in paths]
    if pickled := next((path for path in paths if str(path).lower().endswith(PICKLES)), None):
        raise UserError(
            f"{pickled} is a pickle, and reading one runs whatever code is in it: build the hull first, of the JSON of "
            f"its entries or, if you trust who made it, by `jaxcrystal hull build {pickled} --trust-pickle`"
        )
    built = [path for path in paths if is_hull_file(path)]
    if references is None and not built:
        return None
    if labels != "relaxed":
        raise UserError(f"the energies of {paths[0]} are known: hull labels are for crystals that a potential labels")
    if built:
        if len(paths) != 1 or references is not None:
            raise UserError(f"the hull {built[0]} is whole: it takes no other file and no references")
        return Hull.from_file(built[0])
    if len(paths) != 1:
        raise UserError(f"one table of formation energies goes with the references {references}, not {len(paths)}")
    return Hull.from_table(paths[0], ElementReferences.from_file(references))


@locks.holds(lambda inputs, out, **_: out)
def build(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    references: str | Path | None = None,
    potential: str | None = None,
    labels: str = "relaxed",
    samples: str | Path | None = None,
    trust_pickle: bool = False,
    workers: Workers | None = None,
) -> Hull:
    """Builds the hull of `inputs`, all of one kind, writes it to `out` and returns it.

    - `references`: elemental reference entries, for tables and for entries that hold formation energies.
    - `potential`: labels the crystals of `inputs` by their `labels`. Those are kept beside `out`, in
      `<out's stem>.labels/`, so that a build which is stopped, or repeated with more crystals, goes on.
    - `samples`: only crystals in the chemical systems of these are labelled.
    - `trust_pickle`: read pickles. Reading one runs whatever code is in it.

    Raises UserError if inputs cannot be read, are of several kinds, or options do not go together.
    """
    out = Path(out)
    if out.suffix != ".parquet":
        raise UserError(f"the hull is written as parquet: name it {out.with_suffix('.parquet')}, not {out}")
    try:  # before the work, not after it, is when to learn that it cannot be written
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    if potential is not None:
        if references is not None:
            raise UserError("a hull that a potential labels takes its element references from the same crystals")
        settings, candidates = label_settings(labels), None
        if samples is not None:
            wished = read(samples, workers=workers).rows
            candidates = [sample.crystal.to_structure() for sample in wished if sample.crystal is not None]
            if not candidates:
                raise UserError(f"{samples} has no crystal, whose chemical system the hull could be of")
        judge, kept = potential_card(potential, workers), out.with_suffix(".labels")
        hull = labelled(inputs, judge, candidates, settings, workers=workers, cache_dir=kept)
    else:
        if labels != "relaxed" or samples is not None:
            raise UserError("labels and samples are for crystals that a potential labels: name the potential")
        hull = _published(inputs, references, trust_pickle)
    hull.write(out)
    return hull


def labelled(
    inputs: Sequence[str | Path],
    potential: PotentialCard,
    candidates: Sequence[Structure] | None,
    settings: RelaxationSettings,
    *,
    workers: Workers | None,
    cache_dir: Path,
) -> Hull:
    """The hull of the crystals in files, labelled by the potential; of the candidates' chemical systems, if given."""
    try:
        sets = [read(path, workers=workers) for path in inputs]
    except UserError as error:
        raise UserError(
            f"{error}. A hull of known energies is built first, by `jaxcrystal hull build`; a table of formation "
            "energies may also be named with its references"
        ) from None
    counted = [require_crystals("hull", found) for found in sets]
    known = [sample.crystal for found in sets for sample in found.rows]
    hull = Hull.from_crystals(
        [crystal.to_structure() for crystal in known if crystal is not None],
        potential,
        candidates=candidates,
        settings=settings,
        workers=workers,
        cache_dir=cache_dir,
    )
    left_out = Counter(hull.left_out or {})
    for one in counted:
        left_out.update(one.left_out)
    how = "relaxed" if settings.max_steps else "single-point"
    sources = tuple(f"{found.path.name} sha256:{found.sha256}" for found in sets)
    return replace(hull, name=f"{hull.name}, {how}", sources=sources, left_out=left_out)


def _published(inputs: Sequence[str | Path], references: str | Path | None, trust_pickle: bool) -> Hull:
    kinds = {str(path): _kind(str(path)) for path in inputs}
    if len(set(kinds.values())) != 1:
        found = "; ".join(f"{path} is {kind}" for path, kind in kinds.items()) or "there are none"
        raise UserError(f"the inputs of a hull must be of one kind: {found}")
    (kind,) = set(kinds.values())
    known = None if references is None else ElementReferences.from_file(references)
    paths = [Path(path) for path in inputs]
    if kind == "systems":
        systems = [_system(str(path)) for path in inputs]
        entries, origin = materials_project_entries(systems)
        return Hull.from_entries(origin, entries, known, systems=systems, sources=[origin])
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} does not exist; expected entries, a phase diagram, or a table")
    sources, name = [source(path) for path in paths], ", ".join(path.name for path in paths)
    if kind == "a table":
        if known is None:
            raise UserError(f"{name} is a table of formation energies, which needs element references: --references")
        phases = [phase for path in paths for phase in table_phases(path)]
        return Hull.from_phases(name, phases, known, left_out={}, sources=[*sources, source(Path(references))])
    reader: Callable[[Path], list[Any]] = entries_of_json
    if kind == "a pickle":
        if not trust_pickle:
            raise UserError(
                f"{name}: reading a pickle runs whatever code is in it; add --trust-pickle if you trust who made it, "
                "or take the JSON of the same entries"
            )
        reader = entries_of_pickle
    entries = [entry for path in paths for entry in reader(path)]
    return Hull.from_entries(name, entries, known, sources=sources)


def _kind(name: str) -> str:
    lower = name.lower()
    if name.startswith(MATERIALS_PROJECT):
        return "systems"
    if lower.endswith(TABLES):
        return "a table"
    if lower.endswith(PICKLES):
        return "a pickle"
    if is_json(Path(name)):
        return "entries"
    raise UserError(
        f"{name} is nothing that a hull is built from: mp:Li-Fe-O, JSON of entries, a phase diagram (.json, .pkl), a "
        "table of formation energies (.parquet, .csv); or, with --potential, crystals"
    )


def _system(name: str) -> frozenset[str]:
    from pymatgen.core import Element

    symbols = name.removeprefix(MATERIALS_PROJECT).split("-")
    for symbol in symbols:
        if not Element.is_valid_symbol(symbol):
            raise UserError(f"{name}: {symbol!r} is no chemical element; write mp:Li-Fe-O")
    return frozenset(symbols)


def materials_project_entries(systems: Sequence[frozenset[str]]) -> tuple[list[Any], str]:
    """The Materials Project's GGA and GGA+U entries of chemical systems, subsystems included; and whence they are.

    Raises UserError without `mp-api`, without a key in the environment, or if the answer is an error.
    """
    try:
        from mp_api.client import MPRester
    except ImportError as error:
        raise UserError(f"{error.name or error} is not installed; pip install 'jaxcrystal[mp]'") from error
    key = os.environ.get(KEY)
    if not key:
        raise UserError(f"the Materials Project wants a key: put yours into the environment variable {KEY}")
    entries: dict[str, Any] = {}
    try:
        with MPRester(key) as rester:
            for system in systems:
                # Today's default mixes in r2SCAN, whose energies no potential here is trained on.
                found = rester.get_entries_in_chemsys(
                    sorted(system), additional_criteria={"thermo_types": ["GGA_GGA+U"]}
                )
                entries |= {str(entry.entry_id): entry for entry in found}
            release = rester.get_database_version()
    except Exception as error:  # of requests, of the client, of pydantic: whatever it is, there are no entries
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the Materials Project gave no entries ({type(error).__name__}: {reason})") from error
    names = ", ".join("-".join(sorted(system)) for system in systems)
    return list(entries.values()), f"Materials Project {release}, {names}, mp-api {_version('mp-api')}"


def entries_of_json(path: Path) -> list[Any]:
    """The computed entries in a JSON file. Raises UserError, naming the item, for one that is none."""
    from pymatgen.analysis.phase_diagram import PDEntry
    from pymatgen.entries.computed_entries import ComputedEntry

    entries = []
    for number, (name, item) in enumerate(json_items(path)):
        try:
            inside = _entry_of(item)
            if not math.isfinite(inside["energy"]):
                raise ValueError("its energy is not finite")
            # The structure is not asked for: what the corrections need of it, entries carry as `oxide_type`.
            kind = PDEntry if inside.get("@class") == "PDEntry" else _with_structure(inside) or ComputedEntry
            entries.append(kind.from_dict({"correction": 0.0, **inside} if kind is not PDEntry else inside))
        except Exception as error:  # a stranger's file can break the reading in any way
            reason = " ".join(str(error).split())[:200]
            item_name = number if name is None else name
            raise UserError(
                f"{path}, {item_name}: no computed entry with composition and energy ({type(error).__name__}: {reason})"
            ) from None
    return entries


def _with_structure(item: dict[str, Any]) -> Any:
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    return ComputedStructureEntry if item.get("structure") is not None else None


def _entry_of(item: Any) -> dict[str, Any]:
    """The entry in an item, which may be a row around it."""
    if "energy" in item and "composition" in item:
        return item
    named = [value for name, value in item.items() if str(name).lower().endswith("entry")]
    if len(named) != 1:
        raise ValueError(f"it has {', '.join(map(str, item))}")
    return _entry_of(named[0])


def entries_of_pickle(path: Path) -> list[Any]:
    """The entries of a pickled phase diagram, or a pickled list of entries. **Runs code that is in the file.**

    Raises UserError if it cannot be read, or holds something else.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
    try:
        with openers.get(path.suffix.lower(), open)(path, "rb") as file:
            found = pickle.load(file)
    except Exception as error:  # a pickle of another version of pymatgen breaks in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} cannot be read by pymatgen {_version('pymatgen')} ({type(error).__name__}: {reason}); "
            "take the JSON of the same entries"
        ) from None
    entries = getattr(found, "all_entries", found)
    if not isinstance(entries, list | tuple | set) or not all(
        hasattr(entry, "composition") and hasattr(entry, "energy") for entry in entries
    ):
        raise UserError(f"{path} holds {type(found).__name__}; expected a phase diagram, or a list of entries")
    return list(entries)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
