"""The verbs as functions: `jaxcrystal.read`, `prepare`, `train`, `load`, `templates`, `evaluate`, `relax`.

Crystals may come as a path (whatever the reader reads: a table, CIF, POSCAR, JSON, extxyz, a folder), or from memory:

- one crystal or any iterable of them: pymatgen Structures, ASE Atoms, `Crystal`s, texts of CIFs, None for a failure;
- a mapping from ids to them, or a pandas Series;
- a pandas DataFrame with a column `structure` of such objects or `cif` of texts, and of whatever else is known;
- `Crystals`, which `read` returned, or `Attempts`, which a sampler did, or `Substitutions`, which `templates` did.

All go through the one reader. Wherever a function takes `workers`:

- 0: the work is done in this process, which dies of whatever crystal kills it;
- a number: in so many processes on this machine, of which a crystal that kills or hangs one costs only itself;
- an address such as `tcp://10.0.0.1:8786`: by the workers of dask's scheduler there.

Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd
    from pymatgen.core import Structure

    from jaxcrystal.config import Recipe
    from jaxcrystal.interface.evaluation import Evaluation
    from jaxcrystal.interface.sampler import Sampler
    from jaxcrystal.interface.scored import Scored
    from jaxcrystal.interface.sources import Place, Source
    from jaxcrystal.interface.tables import Crystals, Relaxations, Substitutions
    from jaxcrystal.reader.preparing import PrepareReport
    from jaxcrystal.training.loop import TrainReport
    from jaxcrystal.workers import Workers


def read(source: Source, *, limit: int | None = None, workers: int | str = 0) -> Crystals:
    """The first `limit` (default: all) crystals of a source, a row each, whatever became of it.

    Raises UserError if the source does not exist, is empty, or holds no crystals.
    """
    from jaxcrystal.interface.sources import rows
    from jaxcrystal.interface.tables import Crystals

    with _pool(workers) as pool:
        return Crystals(rows(source, "crystals", pool, limit))


def prepare(
    inputs: Place | Sequence[Place] | Source | Mapping[str, Source],
    out: Place,
    *,
    niggli: bool = True,
    max_atoms: int | None = 20,
    symprec: float = 0.1,
    labels: Place | None = None,
    workers: int = 0,
) -> PrepareReport:
    """Checks crystals, reduces them to the Niggli cell, and stores them in the folder `out`, as `train` reads them.

    - `inputs`: a path or a list of paths, each of which becomes the file `out`/<its name>.parquet (`prototypes`, and
      `mp20`, `mp20-val` and `mp20-test`, which become train, val and test, come with the package); or crystals from
      memory: a mapping from names of files to sources, or one source that is no mapping, of crystals.parquet.
    - `niggli`: whether cells are reduced.
    - `max_atoms`: larger cells are left out; None: none is.
    - `symprec`: in Å, how far a crystal may be from symmetric, to be written by its symmetry too.
    - `labels`: a CSV or parquet file of labels of one's own, joined by ids, which a recipe may name as properties.

    What is left out, and why, is in the report, and in `out`. Raises UserError if an input cannot be read, two have one
    name, or `out` cannot be written.
    """
    from dataclasses import replace

    from jaxcrystal.interface.sources import is_place, rows
    from jaxcrystal.reader import preparing

    places: list[Any]
    if is_place(inputs):
        places = [inputs]
    elif isinstance(inputs, Sequence) and all(map(is_place, inputs)):
        places = list(inputs)
    else:
        named = inputs if isinstance(inputs, Mapping) else {"crystals": inputs}
        places = [replace(rows(source, name, None), path=Path(name)) for name, source in named.items()]
    return preparing.prepare(
        places, Path(out), niggli=niggli, max_atoms=max_atoms, symprec=symprec, labels=labels, workers=max(workers, 1)
    )


def train(recipe: Place | Recipe | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()) -> TrainReport:
    """Fine-tunes a LLaMA with adapters, or trains a small one; goes on where a run of the same recipe was stopped.

    - `recipe`: a YAML file, the name of one that comes with the package (`configs/`; such as "tiny_cpu"), a Recipe, or
      its keys as a mapping (`jaxcrystal.config` lists them).
    - `overrides`: keys to set otherwise, such as {"optimizer.learning_rate": 1e-3}, or as `--set` takes them:
      ["optimizer.learning_rate=1e-3"].

    On many hosts call `jaxcrystal.hosts.start()` first. Raises UserError for what in the recipe cannot be run.
    """
    import json

    from jaxcrystal import compilation_cache
    from jaxcrystal.config import Recipe, load, to_dict
    from jaxcrystal.training import loop

    def words(keys: Mapping[str, Any]) -> list[str]:
        return [f"{key}={json.dumps(value, default=str)}" for key, value in keys.items()]  # JSON is YAML

    compilation_cache.enable()
    changes = words(overrides) if isinstance(overrides, Mapping) else list(overrides)
    if isinstance(recipe, Recipe):
        if not changes:
            return loop.train(recipe)
        recipe = to_dict(recipe)
    if isinstance(recipe, Mapping):
        return loop.train(load(Recipe, None, [*words(recipe), *changes]))
    return loop.train(load(Recipe, recipe, changes))


def load(model_dir: Place, *, base: Place | None = None, tensor: int = 1, **settings: Any) -> Sampler:
    """A sampler of a model, which `train` or `jaxcrystal convert` wrote, or "mini", which comes with the package.

    It is loaded once, and draws for call after call.

    - `base`: for adapters, another base than the one they were trained on, made of the same float weights: such as what
      `jaxcrystal convert --weights int8` made of them.
    - `tensor`: devices that share a copy of the model; the others of this process hold copies.
    - `settings`: what the compiled programs depend on, as `jaxcrystal sample` has it: `temperature`, `top_p`, `top_k`,
      `min_p`, `composition_temperature`, `new`, `guidance`, `grammar`, `slots`, `dtype`, `cache_dtype`,
      `max_new_tokens` (`sampling.sampler.SamplerSettings`).

    Raises UserError if there is no such model, for a base of other weights, or for a setting out of range.
    """
    import jax

    from jaxcrystal.config import MeshConfig
    from jaxcrystal.interface.sampler import Sampler
    from jaxcrystal.mesh import make_mesh
    from jaxcrystal.sampling.sampler import SamplerSettings

    mesh = make_mesh(MeshConfig(data=-1, fsdp=1, tensor=tensor), jax.local_devices())
    return Sampler(model_dir, SamplerSettings(**settings), mesh, base)


def templates(
    source: Source,
    num: int,
    out: Place | None = None,
    *,
    swaps: int | None = None,
    tolerance: float = 0.1,
    seed: int = 0,
    new: bool = False,
    workers: int | str = 0,
) -> Substitutions:
    """Makes `num` new crystals of known ones, drawn at random of `source`: other elements of like size take the places
    of theirs, and the volume is rescaled (`crystals.substitution`). The baseline of every generator.

    - `out`: also writes them, as a table that `evaluate` reads: x.parquet or x.csv.
    - `swaps`: how many elements of a crystal become others, drawn at random; None, or more than it has: all of them.
    - `tolerance`: in Å, how far the radius of an ion may be from the one that it replaces (`crystals.radii`).
    - `seed`: it and the attempt's number decide the attempt.
    - `new`: a crystal whose formula a crystal of `source` has is drawn again.

    Raises UserError if the source cannot be read or holds no crystal, for a number out of range, or if `out` cannot be
    written.
    """
    from jaxcrystal.crystals.substitution import alike
    from jaxcrystal.errors import UserError
    from jaxcrystal.interface import files
    from jaxcrystal.interface.sources import rows
    from jaxcrystal.interface.tables import Substitutions
    from jaxcrystal.locks import held
    from jaxcrystal.sampling.templates import check_request, substitutions

    check_request(num, swaps, seed)
    pool = alike(tolerance)
    with nullcontext() if out is None else held(files.checked_table(Path(out))), _pool(workers) as processes:
        there = rows(source, "templates", processes)
        found = [(row.id, row.crystal) for row in there.rows if row.crystal is not None]
        if not found:
            raise UserError(f"{there.path} holds no crystal: its first row is {there.rows[0].outcome}")
        if missing := len(there) - len(found):
            print(
                f"note: {missing} of {len(there)} rows of {there.path} are no crystal, and no template", file=sys.stderr
            )
        known = {crystal.formula for _, crystal in found} if new else None
        made = Substitutions(substitutions(found, num, pool, swaps=swaps, known=known, seed=seed))
        if out is not None:
            files.write_table(made.to_pandas(), Path(out))
    return made


def evaluate(
    samples: Source,
    out: Place | None = None,
    *,
    train: Source | None = None,
    nearest: bool = False,
    truth: Source | None = None,
    reference: Source | None = None,
    unconditional: Place | Evaluation | None = None,
    scores: Place | Scored | pd.DataFrame | None = None,
    protocol: str = "cdvae",
    cutoffs: str = "mp_20",
    potential: Place | None = None,
    hull: Place | Crystals | pd.DataFrame | Sequence[Place | Crystals | pd.DataFrame] = (),
    references: Place | None = None,
    hull_labels: Literal["relaxed", "single-point"] = "relaxed",
    fmax: float = 0.1,
    max_steps: int = 500,
    symprec: float = 0.1,
    judges: Mapping[str, Callable[[Structure], Any]] | None = None,
    limit: int | None = None,
    workers: int | str = 0,
) -> Evaluation:
    """Says which crystals would exist: a row an attempt, rates with 95 % intervals, and a page that shows them.

    - `out`: the folder to write to; the same call with the same folder goes on where it was stopped. None: a temporary
      one, which lasts as long as the Evaluation does (`Evaluation.save` keeps it).
    - `train`: crystals that count as known, of one source or of a list of files and names; adds novelty.
    - `nearest`: of each attempt the training crystal most like it; minutes for tens of thousands of them, once.
    - `truth`: the true crystals that `samples` predict, by ids, or in order if neither has ids; adds match rate, RMSE.
    - `reference`: crystals to compare with; adds coverage, within the `cutoffs` of a data set, and distributions.
    - `unconditional`: an evaluation of crystals for which nothing was asked, or its folder; adds which share of these
      meets what was asked for the samples, as a base rate.
    - `scores`: what `Sampler.score` said of the samples, or the table or file of it; adds how probable the model found
      each. Attempts of a sampler have that anyway.
    - `protocol`: cdvae, crystal-text-llm, strict or lemat (docs/metrics.md).
    - `potential`: `chgnet` or a directory in matgl's format; adds relaxation until no force exceeds `fmax` eV/Å, or for
      `max_steps` steps.
    - `hull`: competing phases; adds the distance to their hull. `mp`, the package's; what `jaxcrystal hull build`
      wrote; crystals, which the potential labels (`hull_labels`); or, with `references` (elemental reference entries),
      a table of formula and formation_energy_per_atom in eV/atom.
    - `symprec`: in Å, within which space groups are found.
    - `judges`: functions from a pymatgen Structure to a property of one's own, by its name; adds its columns, and how
      many attempts meet it where it was asked for.
    - `limit`: only the first so many attempts.

    With none of train, truth, reference, potential and hull, attempts of a model that comes with the package, or was
    improved, are compared with what it was trained on, relaxed, and placed against a hull, which is said.

    Raises UserError if an input cannot be read, the output cannot be written, or options do not go together.
    """
    from tempfile import TemporaryDirectory

    from jaxcrystal.evaluation import evaluation
    from jaxcrystal.interface.evaluation import Evaluation
    from jaxcrystal.interface.sources import is_place, rows
    from jaxcrystal.locks import held
    from jaxcrystal.report import report

    others = (train, truth, reference, potential)
    if isinstance(hull, (list, tuple)) and not hull and all(source is None for source in others):
        train, potential, hull = _yardstick(samples)
    kept = None
    if out is None:
        kept = TemporaryDirectory(prefix="jaxcrystal-")
        out = kept.name
    folder = Path(out)
    with held(folder), _pool(workers) as pool, TemporaryDirectory() as scratch:

        def given(source: Source | None, name: str) -> Any:  # a path as it is: what is wrong with it names it
            return source if source is None or is_place(source) else rows(source, name, pool)

        phases = list(hull) if isinstance(hull, (list, tuple)) else [hull]
        evaluation.evaluate(
            given(samples, "samples"),
            folder,
            train=given(train, "train"),
            nearest=nearest,
            truth=given(truth, "truth"),
            reference=given(reference, "reference"),
            unconditional=unconditional.out if isinstance(unconditional, Evaluation) else unconditional,
            scores=scores.to_pandas() if hasattr(scores, "to_pandas") else scores,
            protocol=protocol,
            cutoffs=cutoffs,
            potential=None if potential is None else str(potential),
            hull=[_file(source, Path(scratch), f"hull{i}") for i, source in enumerate(phases)],
            references=None if references is None else Path(references),
            hull_labels=hull_labels,
            fmax=fmax,
            max_steps=max_steps,
            symprec=symprec,
            judges=judges or {},
            limit=limit,
            workers=pool,
        )
        report.write(folder)
    return Evaluation.read(folder, kept)


def relax(
    structures: Source,
    potential: Place = "chgnet",
    *,
    fmax: float = 0.1,
    max_steps: int = 500,
    timeout: float = 600.0,
    store: Place | None = None,
    limit: int | None = None,
    workers: int | str = 0,
) -> Relaxations:
    """Relaxes atoms and cells of the first `limit` crystals; a row each, with the structure and energy that it came to.

    - `potential`: `chgnet` or a directory in matgl's format. It must find known formation energies first.
    - `fmax`: until no force exceeds it, eV/Å; or for `max_steps` steps, or `timeout` seconds a crystal.
    - `store`: a folder that keeps each relaxation; what is known there is not done again.

    Raises UserError if the source or the potential cannot be read, or if `store` cannot be written or is being written.
    """
    from jaxcrystal.interface.sources import rows
    from jaxcrystal.interface.tables import Relaxations, Relaxed
    from jaxcrystal.locks import held
    from jaxcrystal.relaxation.batch import RelaxationSettings
    from jaxcrystal.relaxation.relaxations import potential_card, relax_all

    settings = RelaxationSettings(fmax, max_steps, timeout)
    with nullcontext() if store is None else held(store), _pool(workers) as pool:
        samples = rows(structures, "structures", pool, limit).rows
        judge = potential_card(str(potential), pool)
        found = iter(
            relax_all(
                [sample.crystal.to_structure() for sample in samples if sample.crystal is not None],
                judge,
                settings,
                workers=pool,
                cache_dir=None if store is None else Path(store),
            )
        )
        ends = [Relaxed.of(sample, None if sample.crystal is None else next(found)) for sample in samples]
    return Relaxations(ends, judge.name)


def _yardstick(samples: Source) -> tuple[str | list[str] | None, str | None, tuple[str, ...]]:
    """Training sets, potential and hull for samples of which none were given, by what drew them; said on stderr."""
    from jaxcrystal import box
    from jaxcrystal.interface.sources import is_place
    from jaxcrystal.interface.tables import Attempts
    from jaxcrystal.sampling.ledger import model_of, yardstick_of

    if isinstance(samples, Attempts):
        known, fingerprint = samples.yardstick, samples.model
    elif is_place(samples):
        known, fingerprint = yardstick_of(samples), model_of(samples)
    else:
        known = fingerprint = None
    known = known or (None if fingerprint is None else box.yardstick(fingerprint))
    if known is None:
        return None, None, ()
    judged = [f"train {' and '.join(known.train)}"]
    judged += [f"{name} {value}" for name in ("potential", "hull") if (value := getattr(known, name)) is not None]
    more = f"; reference {known.reference} adds coverage, and takes minutes the first time" if known.reference else ""
    print(f"note: drawn by {known.model}: judged by {', '.join(judged)}{more}", file=sys.stderr)
    train = known.train[0] if len(known.train) == 1 else list(known.train)
    return train, known.potential, () if known.hull is None else (known.hull,)


def _file(source: Any, folder: Path, name: str) -> Path:
    """A file of a hull's phases, in `folder` if they were none."""
    import pandas as pd

    from jaxcrystal.interface.sources import is_place

    if is_place(source):
        return Path(source)
    path = folder / f"{name}.parquet"
    (source if isinstance(source, pd.DataFrame) else read(source).to_pandas()).to_parquet(path)
    return path


@contextmanager
def _pool(workers: int | str) -> Iterator[Workers | None]:
    """What `workers` stands for in all functions here."""
    from jaxcrystal.workers import chosen

    with chosen(workers) as pool:
        yield pool
