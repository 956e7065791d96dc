"""Many relaxations: in processes, with a progress bar, each stored when it ends so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from jaxcrystal.errors import UserError
from jaxcrystal.relaxation.batch import Relaxation, RelaxationSettings, RelaxationStatus, relax_together
from jaxcrystal.relaxation.potentials import Potential, PotentialCard, load_potential
from jaxcrystal.workers import Lost, Workers, run

if TYPE_CHECKING:
    from pymatgen.core import Structure

#: A process is sent the atoms of so many batches: the more, the fewer batches run out, and the longer the last one
#: works while the others have nothing left.
BATCHES = 3

#: Changes whenever the same crystal relaxes otherwise, and so parts what was stored before and after.
VERSION = 2


def potential_card(name_or_dir: str | Path, workers: Workers | None) -> PotentialCard:
    """What is known of a potential, found by a worker, so that only processes that relax load torch and the weights.

    Without `workers` it is loaded in this process, and the `Potential` itself is returned.
    Raises UserError as `load_potential` does, and if the worker is lost over it.
    """
    if workers is None:
        return load_potential(name_or_dir)
    source = str(name_or_dir)
    if source != "chgnet" and Path(source).is_dir():
        source = str(Path(source).resolve())  # workers on other machines may stand in another directory
    ((_, card),) = run(_cards, [source], workers)
    if isinstance(card, Lost):
        raise UserError(f"the potential {name_or_dir} could not be loaded: {card.reason}. Is there memory for it?")
    return card


def _cards(names: Iterable[str]) -> Iterator[tuple[int, PotentialCard]]:
    return ((i, _loaded(name, None).card) for i, name in enumerate(names))


def relax_all(
    structures: Sequence[Structure],
    potential: PotentialCard,
    settings: RelaxationSettings = RelaxationSettings(),  # noqa: B008
    *,
    workers: Workers | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    label: str = "relaxing",
) -> list[Relaxation]:
    """One Relaxation for each structure, in their order. Without `workers` they are relaxed in this process.

    Workers load the potential themselves: for them its card is enough, and without them it is loaded from that.
    Equal crystals are relaxed once. With `cache_dir`, what is known from an earlier run, stopped or not, is read from
    `relaxations.jsonl` there: a line a crystal, keyed by potential, crystal and settings. A crystal that was lost with
    its process or to the clock has no line: the next run tries it again.
    Raises UserError if `cache_dir` cannot be written.
    """
    keys = [_key(structure, potential, settings) for structure in structures]
    store = _Store(Path(cache_dir)) if cache_dir is not None else None
    known = store.read(set(keys)) if store else {}
    missing = {key: structure for key, structure in zip(keys, structures, strict=True) if key not in known}
    bar = tqdm(total=len(missing), desc=label, unit="crystal", disable=not progress)
    with bar:
        for key, relaxation in _relax_missing(missing, potential, settings, workers):
            known[key] = relaxation
            if store and relaxation.status not in (RelaxationStatus.TIMEOUT, RelaxationStatus.CRASHED):
                store.append(key, relaxation)
            bar.update()
    return [known[key] for key in keys]


def _relax_missing(
    missing: dict[str, Structure], potential: PotentialCard, settings: RelaxationSettings, workers: Workers | None
) -> Iterator[tuple[str, Relaxation]]:
    keys, structures = list(missing), list(missing.values())
    if not missing:
        return
    if workers is None:
        here = potential if isinstance(potential, Potential) else _loaded(potential.source, potential.device)
        found = relax_together(structures, here, settings)
        yield from ((keys[i], relaxation) for i, relaxation in filter(None, found))
        return
    on_gpu = potential.device != "cpu"
    if on_gpu and workers.one_machine:
        workers = replace(workers, slots=1)  # processes that share a GPU would only share its memory out
    # Workers on other machines have devices of their own.
    device = potential.device if workers.one_machine else None
    job = partial(_relax_in_process, potential.source, device, potential.sha256, settings)
    atoms = sum(map(len, structures))
    jobs = max(math.ceil(atoms / (BATCHES * potential.atoms_at_once)), workers.slots)
    for index, result in run(job, structures, workers, chunk=math.ceil(len(keys) / jobs), timeout=settings.timeout):
        if isinstance(result, Lost):
            result = Relaxation(RelaxationStatus(result.value), result.reason)
        yield keys[index], result


def _relax_in_process(
    source: str, device: str | None, sha256: str, settings: RelaxationSettings, structures: Iterable[Structure]
) -> Iterator[tuple[int, Relaxation] | None]:
    potential = _loaded(source, device)
    if potential.sha256 != sha256:
        raise UserError(f"{potential.source} changed while it was in use")
    return relax_together(structures, potential, settings)


def _loaded(source: str, device: str | None) -> Potential:
    """The potential, read once in a process."""
    if (source, device) not in _LOADED:
        found = load_potential(source, device)
        _LOADED.update(dict.fromkeys([(source, device), (source, found.device)], found))
    return _LOADED[source, device]


_LOADED: dict[tuple[str, str | None], Potential] = {}


def _key(structure: Structure, potential: PotentialCard, settings: RelaxationSettings) -> str:
    crystal = [
        structure.lattice.matrix.tolist(),
        structure.frac_coords.tolist(),
        [site.species_string for site in structure],
    ]
    judge = [VERSION, potential.sha256, potential.note, potential.package]
    text = json.dumps([*judge, settings.fmax, settings.max_steps, crystal])
    return hashlib.sha256(text.encode()).hexdigest()


class _Store:
    """`relaxations.jsonl`: appended line by line, so that a kill costs at most the line being written."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "relaxations.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.tell() and self.path.read_bytes()[-1:] != b"\n":
                    file.write(b"\n")  # of a line at which a killed run stopped, so that the next is not lost with it
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; name a directory that can be written"
            ) from None

    def read(self, keys: set[str]) -> dict[str, Relaxation]:
        known = {}
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line at which a killed run stopped; its crystal is relaxed again
            if row["key"] in keys:
                known[row["key"]] = _from_row(row)
        return known

    def append(self, key: str, relaxation: Relaxation) -> None:
        row = {"key": key, **asdict(replace(relaxation, structure=None))}
        if relaxation.structure is not None:
            row["structure"] = relaxation.structure.as_dict()
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _from_row(row: dict[str, Any]) -> Relaxation:
    from pymatgen.core import Structure

    fields = {name: value for name, value in row.items() if name != "key"}
    fields["status"] = RelaxationStatus(fields["status"])
    if fields["structure"] is not None:
        fields["structure"] = Structure.from_dict(fields["structure"])
    return Relaxation(**fields)
