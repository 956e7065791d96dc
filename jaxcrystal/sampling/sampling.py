"""From a model directory to a ledger of crystals: `jaxcrystal sample`."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, UInt32
from tqdm import tqdm

from jaxcrystal import hosts, locks
from jaxcrystal.config import to_dict
from jaxcrystal.crystals.training_labels import digest
from jaxcrystal.errors import UserError
from jaxcrystal.paths import AnyPath
from jaxcrystal.sampling.attempt import OK, Attempt
from jaxcrystal.sampling.attempts_table import more_symmetric, redrawn
from jaxcrystal.sampling.conditions import NumAtoms, Trained, targets
from jaxcrystal.sampling.engine import Draw
from jaxcrystal.sampling.keeping import KEEP_BY
from jaxcrystal.sampling.keeping import check as check_keep
from jaxcrystal.sampling.ledger import Ledger, Part, Request, effective_number, finished, join
from jaxcrystal.sampling.planning import Plan
from jaxcrystal.sampling.ranges import as_json
from jaxcrystal.sampling.resampling import ONE_PROMPT, check_exact
from jaxcrystal.sampling.sampler import Sampler, SamplerSettings, check_request, say
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.tokenizer import Tokenizer
from jaxcrystal.weights.saved import SavedModel, model_directory


@dataclass(frozen=True)
class SampleReport:
    """What came of a run."""

    out: Path
    counts: dict[str, int]  #: attempts by status; they add up to the number asked for
    resumed: int  #: of them, those that an earlier run had drawn
    seconds: float  #: for the others, compilation included
    effective_number: float | None = None  #: of the attempts by the grammar's weights; None if none were resampled
    more_symmetric: int = 0  #: of those that are ok, how many have more symmetry than their text says
    redraws: int | None = None  #: compositions that were drawn again, because training had their formula; None: unknown

    @property
    def attempts(self) -> int:
        return sum(self.counts.values())

    @property
    def ok(self) -> int:
        return self.counts.get(OK, 0)


@locks.holds(lambda model_dir, num, out, **_: out, hosts.held)
def sample(
    model_dir: str | AnyPath,
    num: int,
    out: str | Path,
    *,
    base: str | AnyPath | None = None,
    num_valid: int | None = None,
    resample: int | None = None,
    keep: float | None = None,
    keep_by: str | None = None,
    conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]] = MappingProxyType({}),
    num_atoms: NumAtoms = None,
    constraints: Constraints = Constraints(),  # noqa: B008
    seed: int = 0,
    symprec: float = 0.1,
    exact_symmetry: bool = False,
    mesh: Mesh | None = None,
    **settings: Any,
) -> SampleReport:
    """Makes `num` attempts to draw a crystal from the model in `model_dir` and writes a row for each to `out`; with
    `num_valid` no more than it takes until so many of them are ok. With `resample`, so many of each prompt's attempts
    are drawn again by the grammar's weights, as the model alone draws under the constraints (`resampling`); all
    attempts stay, and the column `resampled` says how often each was. With `keep`, a share, of each prompt's crystals
    the likeliest stay ok, by log p in "total", per "token" (the default of `keep_by`) or per "atom", and the others
    become `left_out` (`keeping`).

    Adapters lie on their own base, or on `base`, which was made of the same float weights (`load_model`).
    `out` is a .parquet or .csv file, or a folder for CIF files; a run that was cut short goes on where it stood.
    With `exact_symmetry` a crystal that is more symmetric than its text says is not ok. `conditions`, `num_atoms`,
    `constraints`, `seed` and `symprec` are those of `Sampler.stream`; `settings` are fields
    of `SamplerSettings`. Each copy of the model on `mesh` (default: one device) draws on its own. Processes that were
    joined (`hosts.start`) share the rows: each has a mesh of its own devices and draws a part, and the first joins the
    parts where it sees them all.

    Raises UserError as `SamplerSettings`, `Sampler` and `Ledger`, before anything is written.
    """
    check_request(num, symprec, seed)
    if num_valid is not None and not 1 <= num_valid <= num:
        raise UserError(f"num_valid is {num_valid}; it must lie between 1 and num, which is {num}")
    shaped = SamplerSettings(**settings)
    if resample is not None:
        if resample < 1:
            raise UserError(f"resample is {resample}; it must be at least 1")
        if num_valid is not None:
            raise UserError("resample weighs a fixed number of attempts, and num_valid ends earlier: leave one out")
        if not shaped.grammar:
            raise UserError("resample weighs what the grammar allowed; without a grammar the draws are the model's own")
        check_exact([*shaped.methods, *(shaped.composition_methods or [])], shaped.guidance)
    check_keep(keep, keep_by)
    if keep is not None and (num_valid is not None or resample is not None):
        raise UserError("keep is a share of a fixed number of attempts, each once: leave num_valid and resample out")
    trained = Trained.read(model_directory(model_dir))
    wanted, notes = targets(conditions, constraints, num_atoms, grammar=shaped.grammar, trained=trained)
    if resample is not None and any(target.ranges for target in wanted):
        raise UserError(ONE_PROMPT)
    part = Part(jax.process_index(), jax.process_count())
    if num_valid is not None and (len(wanted) > 1 or part.of > 1):
        raise UserError("num_valid counts along one row of attempts: with several prompts or processes, leave it out")
    with Sampler(model_dir, shaped, mesh, base) as sampler:
        sampler.check_exact_symmetry(exact_symmetry)
        plan = sampler.plan(wanted, num, seed)
        request = Request(
            model=fingerprint(sampler.stored, sampler.tokenizer),
            prompts=[None if t.ranges else generation_prompt(sampler.form, t.conditions) for t in wanted],
            conditions=[as_json(target.conditions) for target in wanted],
            grammar=[_as_json(target.constraints) for target in wanted] if shaped.grammar else None,
            guidance=shaped.guide and repr(shaped.guide),
            methods=[repr(method) for method in shaped.methods],
            cache=shaped.cache_dtype or sampler.model.config.dtype,
            symprec=symprec,
            max_new_tokens=plan.max_new_tokens,
            seed=seed,
            num=num,
            num_valid=num_valid,
            resample=resample,
            keep=keep,
            keep_by=keep_by or (None if keep is None else KEEP_BY),
            exact_symmetry=exact_symmetry or None,
            labels=digest(trained.labels) if any(target.ranges for target in wanted) else None,
            new=hashlib.sha256("\n".join(sampler.known).encode()).hexdigest()[:16] if shaped.new else None,
            dtype=sampler.other_dtype,
            composition_methods=shaped.composition_methods and list(map(repr, shaped.composition_methods)),
        )
        tasks = [plan.tasks[row] for row in part.rows(request.rows)]
        draws = sampler.draws(plan, seed, tasks)  # refuses before anything is written
        if hosts.is_first():
            say(notes.values())
        there = finished(out, request) or (join(out, request) if part.of == 1 else None)
        if there is not None:
            place = Path(out)
            numbers = effective_number(place), more_symmetric(place), redrawn(place)
            return SampleReport(place, dict(sorted(there.items())), there.total(), 0.0, *numbers)
        start = time.monotonic()
        with hosts.apart("sampled"):
            ledger = Ledger(out, request, part, sampler.slots(plan, len(tasks)), sampler.yardstick)
            say(ledger.notes)
            resumed, rows = len(ledger), ledger.missing
            if resumed and not ledger.complete:
                draws = _rest(sampler, plan, ledger)
            if not ledger.complete:
                _record(sampler.attempts(draws, plan, rows, seed, symprec, exact_symmetry), ledger)
            ledger.finish()
    counts, place = ledger.counts, ledger.out
    if part.of > 1 and hosts.is_first() and all(path.exists() for path in part.paths(Path(out))):
        counts, place = join(out, request), Path(out)
    seconds = time.monotonic() - start
    numbers = (None, 0, None)
    if place == Path(out):  # the first process may have removed a part by now
        numbers = effective_number(out), more_symmetric(place), redrawn(place)
    return SampleReport(place, dict(sorted(counts.items())), resumed, seconds, *numbers)


def fingerprint(model: SavedModel, tokenizer: Tokenizer) -> str:
    """A hash of what decides which text a draw gives: configuration, weights, tokenizer. The same on any mesh."""

    @jax.jit
    def checksum(x: Array) -> UInt32[Array, ""]:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)  # modulo 2³²: exact in any order of summation

    # What came to the configuration later counts where it is set: older ledgers go on.
    later = ("qkv_bias", "qk_norm")
    shape = {key: value for key, value in to_dict(model.config).items() if value or key not in later}
    del shape["dropout"]  # of training alone
    description = [shape, model.lora and to_dict(model.lora), tokenizer.sha256, *tokenizer.ends.values()]
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables):
        description.append([jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(checksum(leaf))])
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]


def _as_json(constraints: Constraints) -> str:
    fields = asdict(constraints)
    if constraints.space_groups is None:  # these came later, and count where they are set: older ledgers go on
        del fields["space_groups"]
    if constraints.kept is None:
        del fields["kept"]
    return json.dumps(fields)


def _rest(sampler: Sampler, plan: Plan, ledger: Ledger) -> Iterator[Draw]:
    """The draws that the ledger lacks, by as many slots as drew the others. Raises UserError where those do not fit."""
    tasks = [plan.tasks[row] for row in ledger.missing]
    asked = sampler.slots(plan, len(ledger.rows))
    if sampler.settings.slots is not None and asked != ledger.slots:
        say([f"{ledger.out} was begun with {ledger.slots} slots and goes on with them, not with {asked}"])
    try:
        return sampler.draws(plan, ledger.request.seed, tasks, ledger.slots)
    except UserError as error:
        raise UserError(f"{ledger.out} was begun with {ledger.slots} slots, and goes on with them: {error}") from None


def _record(attempts: Iterator[Attempt], ledger: Ledger) -> None:
    """Writes them down until the ledger is complete; shows crystals/s, time left, the share ok, the last formula."""
    formula, only_valid = "", ledger.request.num_valid is not None

    def done() -> int:
        return ledger.counts[OK] if only_valid else len(ledger)

    total = ledger.request.num_valid if only_valid else len(ledger.rows)
    hidden = not hosts.is_first()  # its part is as large as the others'
    with tqdm(total=total, initial=done(), unit="crystal", smoothing=0.1, disable=hidden) as bar:
        for attempt in attempts:
            ledger.append(attempt)
            formula = attempt.formula or formula
            bar.set_postfix_str(f"ok {ledger.counts[OK] / len(ledger):.0%} {formula}", refresh=False)
            bar.update(done() - bar.n)
            if ledger.complete:
                return
