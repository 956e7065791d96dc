"""From a model directory to a ledger of crystals: `jaxcrystal sample`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, UInt32
from tqdm import tqdm

from jaxcrystal import hosts
from jaxcrystal.config import MeshConfig, Recipe, load, to_dict
from jaxcrystal.crystals.grammar import Constraints, Grammar
from jaxcrystal.crystals.prompts import generation_prompt
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.crystals.tokenizer import SentencePieceTokenizer, load_tokenizer
from jaxcrystal.crystals.writer import TokenTables
from jaxcrystal.errors import UserError
from jaxcrystal.mesh import make_mesh
from jaxcrystal.sampling.attempt import NAN_LOGITS, OK, TRUNCATED, Attempt, judge
from jaxcrystal.sampling.engine import Draw, Ending, Engine, Task, check_context
from jaxcrystal.sampling.ledger import Ledger, Part, Request, finished, join
from jaxcrystal.sampling.memory import fitting, memory_left
from jaxcrystal.sampling.methods import Guidance, Method, MinP, Temperature, TopK, TopP
from jaxcrystal.weights.saved import SavedModel, load_model

T = TypeVar("T")

LONGEST_TEXT = 512  #: tokens that are allowed by default; 20 atoms with two decimals take about 400


@dataclass(frozen=True)
class SampleReport:
    """What came of a run."""

    out: Path
    counts: dict[str, int]  #: attempts by status; they add up to the number asked for
    resumed: int  #: of them, those that an earlier run had drawn
    seconds: float  #: for the others, compilation included

    @property
    def attempts(self) -> int:
        return sum(self.counts.values())

    @property
    def ok(self) -> int:
        return self.counts.get(OK, 0)


def sample(
    model_dir: str | Path,
    num: int,
    out: str | Path,
    *,
    num_valid: int | None = None,
    conditions: Mapping[str, Any] | Sequence[Mapping[str, Any]] = MappingProxyType({}),
    constraints: Constraints = Constraints(),  # noqa: B008
    grammar: bool = True,
    guidance: float | None = None,
    temperature: float = 0.9,
    top_k: int | None = None,
    top_p: float = 0.9,
    min_p: float | None = None,
    seed: int = 0,
    symprec: float = 0.1,
    slots: int | None = None,
    cache_dtype: str | None = None,
    max_new_tokens: int | None = None,
    mesh: Mesh | None = None,
) -> SampleReport:
    """Makes `num` attempts to draw a crystal from the model in `model_dir` and writes a row for each to `out`; with
    `num_valid` no more than it takes until so many of them are ok.

    `out` is a .parquet or .csv file, or a folder for CIF files; a run that was cut short goes on where it stood.
    `conditions` are attributes (`config.ATTRIBUTES`) that the prompt states; a list of them makes as many prompts, of
    `num` attempts each. With the grammar every text is a crystal and meets `constraints`, to which a stated formula and
    stated elements (these and no others) are added; a run whose recipe never stated them is only constrained, not told.
    `guidance` is the weight of what is stated (`Guidance`). It, temperature, top-k, top-p and min-p act in this order,
    and are by default the paper's. `symprec`, in Å, is how far a crystal may be from the symmetry that is told of it.

    `max_new_tokens` is by default what the model's context leaves after the longest prompt, at most 512. Each copy of
    the model on `mesh` (default: one device) draws `slots` crystals at once, by default as many as its memory holds;
    keys and values are kept as `cache_dtype` (default: the model's). Processes that were joined (`hosts.start`) share
    the rows: each has a mesh of its own devices and draws a part, and the first joins the parts where it sees them all.

    Raises UserError for settings out of range, constraints that contradict each other or cannot be met, a prompt that
    the context cannot hold, slots that do not fit, and as `load_model` and `Ledger`.
    """
    if num < 1:
        raise UserError(f"num is {num}; it must be at least 1")
    if num_valid is not None and not 1 <= num_valid <= num:
        raise UserError(f"num_valid is {num_valid}; it must lie between 1 and num, which is {num}")
    if not 0 < symprec < float("inf"):
        raise UserError(f"symprec is {symprec}; it must be above 0 Å (0.1 is usual for crystals that are not relaxed)")
    if not grammar and constraints != Constraints():
        raise UserError("without the grammar there is nothing to keep the constraints; leave one of the two out")
    guide = None if guidance is None else Guidance(guidance)
    methods = _methods(temperature, top_k, top_p, min_p)
    stated = [dict(each) for each in ([conditions] if isinstance(conditions, Mapping) else conditions)]
    if not stated:
        raise UserError("there is no row of conditions, not even an empty one")
    part = Part(jax.process_index(), jax.process_count())
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.local_devices()) if mesh is None else mesh
    if num_valid is not None and (len(stated) > 1 or part.of > 1):
        raise UserError("num_valid counts along one row of attempts: with several prompts or processes, leave it out")
    kept = _of_each(stated, partial(_constrained, constraints)) if grammar else []
    if grammar:
        stated = _known(stated, Path(model_dir))
    model = load_model(model_dir, mesh)
    tokenizer = load_tokenizer(model.tokenizer_path)
    prompt_of = partial(generation_prompt, paper_compat=model.text.paper_compat)
    plain, prompts = prompt_of({}), _of_each(stated, prompt_of)
    _check_prompts(prompts, kept, plain, guide)
    nothing, *tokens = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in (plain, *prompts)]
    longest = max(map(len, tokens))
    if max_new_tokens is None:
        max_new_tokens = max(1, min(LONGEST_TEXT, model.config.max_position_embeddings - longest))
    check_context(model.config, longest, max_new_tokens)
    rules = None
    if grammar:
        vocab = model.config.padded_vocab_size
        tables = TokenTables.build(tokenizer)
        rules = Grammar.build(tables, model.text, max_new_tokens, vocab, kept)

    copies = mesh.shape["data"] * mesh.shape["fsdp"]  # that have rows of their own

    def make(slots: int) -> Engine:
        return Engine(
            model,
            end_id=tokenizer.eos_id,
            methods=methods,
            grammar=rules,
            guidance=guide,
            unconditional=nothing,
            slots=slots * copies,
            max_new_tokens=max_new_tokens,
            cache_dtype=cache_dtype,
            mesh=mesh,
        )

    request = Request(
        model=fingerprint(model, tokenizer),
        prompts=prompts,
        conditions=[json.dumps(each) for each in stated],
        grammar=[json.dumps(asdict(each)) for each in kept] if grammar else None,
        guidance=guide and repr(guide),
        methods=[repr(method) for method in methods],
        cache=cache_dtype or model.config.dtype,
        symprec=symprec,
        max_new_tokens=max_new_tokens,
        seed=seed,
        num=num,
        num_valid=num_valid,
    )
    rows = part.rows(request.rows)
    engine = fitting(
        make,
        slots,
        max(1, -(-len(rows) // copies)),
        lambda engine: engine.memory(longest, min(len(prompts), 2 * engine.slots)),
        memory_left(mesh),
    )
    tasks = [Task(*divmod(row, num)) for row in rows]
    draws = engine.draw_all(tokens, seed, tasks)  # refuses before anything is written
    there = finished(out, request) or (join(out, request) if part.of == 1 else None)
    if there is not None:
        return SampleReport(Path(out), dict(sorted(there.items())), there.total(), 0.0)
    start = time.monotonic()
    with hosts.apart("sampled"):
        ledger = Ledger(out, request, part)
        resumed = len(ledger)
        if resumed:
            draws = engine.draw_all(tokens, seed, tasks[resumed:])
        if not ledger.complete:
            # Each is judged on the host while the device goes on.
            _record((_attempt(draw, request, tokenizer) for draw in draws), ledger)
        ledger.finish()
    counts, place = ledger.counts, ledger.out
    if part.of > 1 and hosts.is_first() and all(path.exists() for path in part.paths(Path(out))):
        counts, place = join(out, request), Path(out)
    return SampleReport(place, dict(sorted(counts.items())), resumed, time.monotonic() - start)


def _methods(temperature: float, top_k: int | None, top_p: float, min_p: float | None) -> list[Method]:
    methods: list[Method] = [Temperature(temperature)]
    methods += [] if top_k is None else [TopK(top_k)]
    methods += [TopP(top_p)]
    methods += [] if min_p is None else [MinP(min_p)]
    return methods


def _constrained(constraints: Constraints, conditions: Mapping[str, Any]) -> Constraints:
    """What is stated of the composition is kept to as well."""
    formula, elements = conditions.get("pretty_formula"), conditions.get("elements")
    if formula is not None:
        constraints = replace(constraints, formula=formula)
    if elements is not None:
        allowed = tuple(elements) if constraints.allowed is None else tuple(constraints.allowed)
        constraints = replace(constraints, required=(*constraints.required, *elements), allowed=allowed)
    return constraints


def _of_each(stated: Sequence[Any], make: Callable[[Any], T]) -> list[T]:
    """What `make` makes of each; where there are several, an error says which row it is of."""
    made = []
    for row, each in enumerate(stated, start=1):
        try:
            made.append(make(each))
        except UserError as error:
            raise UserError(f"conditions, row {row}: {error}") if len(stated) > 1 else error from None
    return made


def _known(conditions: Sequence[Mapping[str, Any]], model_dir: Path) -> list[dict[str, Any]]:
    """Without a formula or elements that no training text of the model stated: to it they would be noise."""
    recipe = model_dir / "recipe.yaml"  # a converted model has none
    unknown = {"pretty_formula", "elements"}
    unknown = unknown - set(load(Recipe, recipe).augment.attributes) if recipe.exists() else set()
    return [{name: value for name, value in each.items() if name not in unknown} for each in conditions]


def _check_prompts(prompts: Sequence[str], kept: Sequence[Constraints], plain: str, guidance: Guidance | None) -> None:
    seen: dict[Any, int] = {}
    for row, asked in enumerate(zip(prompts, kept or prompts, strict=True), start=1):
        if guidance is not None and asked[0] == plain:
            raise UserError(
                f"guidance weighs what the prompt states, and prompt {row} states nothing that this model was told of"
            )
        if (other := seen.setdefault(asked, row)) != row:
            raise UserError(
                f"conditions, row {row}: the same as row {other}; raise num for more crystals of one prompt"
            )


def fingerprint(model: SavedModel, tokenizer: SentencePieceTokenizer) -> str:
    """A hash of what decides which text a draw gives: configuration, weights, tokenizer. The same on any mesh."""

    @jax.jit
    def checksum(x: Array) -> UInt32[Array, ""]:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
        place = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
        return (bits * (2 * place + 1)).sum(dtype=jnp.uint32)  # modulo 2³²: exact in any order of summation

    description = [to_dict(model.config), model.lora and to_dict(model.lora), tokenizer.sha256]
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.variables):
        description.append([jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), int(checksum(leaf))])
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]


def _attempt(draw: Draw, request: Request, tokenizer: SentencePieceTokenizer) -> Attempt:
    ended = draw.ending is Ending.FINISHED
    text = tokenizer.decode(draw.tokens[:-1] if ended else draw.tokens)
    status, crystal = TRUNCATED if draw.ending is Ending.TRUNCATED else NAN_LOGITS, None
    if ended:
        status, crystal = judge(text)
    symmetrized = None if crystal is None else symmetrize(crystal, request.symprec)
    return Attempt(
        index=draw.prompt * request.num + draw.index,
        draw=draw.index,
        seed=request.seed,
        prompt=request.prompts[draw.prompt],
        conditions=request.conditions[draw.prompt],
        text=text,
        status=status,
        log_probability=_finite(draw.log_probability),
        grammar_log_probability=None if request.grammar is None else _finite(draw.grammar_log_probability),
        tokens=len(draw.tokens),
        formula=None if crystal is None else crystal.formula,
        cif=None if crystal is None else crystal.to_cif(),
        space_group=None if symmetrized is None else symmetrized.number,
        symmetrized_cif=None if symmetrized is None else symmetrized.to_cif(),
    )


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


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
