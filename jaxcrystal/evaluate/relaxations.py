"""Many relaxations: in processes, with a progress bar, each stored as it ends so that a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from jaxcrystal.errors import UserError
from jaxcrystal.evaluate.potentials import Potential, load_potential
from jaxcrystal.evaluate.relax import Relaxation, RelaxationStatus, relax
from jaxcrystal.evaluate.workers import Lost, run

if TYPE_CHECKING:
    from pymatgen.core import Structure


@dataclass(frozen=True)
class RelaxationSettings:
    """What a relaxation's outcome depends on beside the crystal and the potential."""

    fmax: float = 0.1  #: largest force left, in eV/Å
    max_steps: int = 500
    timeout: float = 600.0  #: seconds that one crystal may take

    def __post_init__(self) -> None:
        if not (self.fmax > 0 and self.max_steps >= 0 and self.timeout > 0):
            raise UserError(f"{self}: fmax and timeout must be positive, max_steps not negative")


def relax_all(
    structures: Sequence[Structure],
    potential: Potential,
    settings: RelaxationSettings = RelaxationSettings(),
    *,
    workers: int = 2,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    label: str = "relaxing",
) -> list[Relaxation]:
    """One Relaxation for each structure, in their order.

    Equal crystals are relaxed once. With `cache_dir`, what is known from an earlier run, stopped or not, is read from
    `relaxations.jsonl` there: a line a crystal, keyed by potential, crystal and settings. A crystal that was lost with
    its process or to the clock has no line: the next run tries it again.
    Raises UserError if `cache_dir` cannot be written.
    """
    if workers < 1:
        raise UserError(f"{workers} workers cannot relax anything; at least 1 is needed")
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
    missing: dict[str, Structure], potential: Potential, settings: RelaxationSettings, workers: int
) -> Iterator[tuple[str, Relaxation]]:
    keys = list(missing)
    jobs = [(structure, settings.fmax, settings.max_steps) for structure in missing.values()]
    args = (potential.to_spec(), potential.sha256)
    for index, result in run(_relax_one, jobs, workers=workers, timeout=settings.timeout, prepare=_load, args=args):
        if isinstance(result, Lost):
            reason = f"over {settings.timeout:g} s" if result is Lost.TIMEOUT else "the process died"
            result = Relaxation(RelaxationStatus(result.value), reason)
        yield keys[index], result


#: In a worker process: the potential that it loaded.
_potential: Potential | None = None


def _load(spec: str, sha256: str) -> None:
    import torch

    global _potential
    torch.set_num_threads(1)  # one process a core; threads of one would steal the others'
    _potential = load_potential(spec)
    if _potential.sha256 != sha256:
        raise UserError(f"{spec} changed while it was in use")


def _relax_one(job: tuple[Structure, float, int]) -> Relaxation:
    structure, fmax, max_steps = job
    assert _potential is not None, "the worker was not prepared"
    return relax(structure, _potential, fmax, max_steps)


def _key(structure: Structure, potential: Potential, settings: RelaxationSettings) -> str:
    crystal = [
        structure.lattice.matrix.tolist(),
        structure.frac_coords.tolist(),
        [site.species_string for site in structure],
    ]
    text = json.dumps([potential.sha256, potential.note, settings.fmax, settings.max_steps, crystal])
    return hashlib.sha256(text.encode()).hexdigest()


class _Store:
    """`relaxations.jsonl`: appended line by line, so that a kill costs at most the line being written."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "relaxations.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self.path.open("a"):
                pass
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
