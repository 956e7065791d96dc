"""From a model directory to a ledger of crystals: `jaxcrystal sample`."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, UInt32
from tqdm import tqdm

from jaxcrystal.config import Recipe, load, to_dict
from jaxcrystal.crystals.grammar import Constraints, Grammar
from jaxcrystal.crystals.prompts import generation_prompt
from jaxcrystal.crystals.tokenizer import SentencePieceTokenizer, load_tokenizer
from jaxcrystal.crystals.writer import TokenTables
from jaxcrystal.errors import UserError
from jaxcrystal.model.saved import SavedModel, load_model
from jaxcrystal.sample.attempt import NAN_LOGITS, OK, TRUNCATED, Attempt, judge
from jaxcrystal.sample.engine import Draw, Ending, Engine, check_context
from jaxcrystal.sample.ledger import Ledger, Request
from jaxcrystal.sample.methods import Method, MinP, Temperature, TopK, TopP

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
    conditions: Mapping[str, Any] | None = None,
    constraints: Constraints = Constraints(),  # noqa: B008
    grammar: bool = True,
    temperature: float = 0.9,
    top_k: int | None = None,
    top_p: float = 0.9,
    min_p: float | None = None,
    seed: int = 0,
    slots: int = 64,
    max_new_tokens: int | None = None,
    mesh: Mesh | None = None,
) -> SampleReport:
    """Makes `num` attempts to draw a crystal from the model in `model_dir` and writes a row for each to `out`; with
    `num_valid` no more than it takes until so many of them are ok.

    `out` is a .parquet or .csv file, or a folder for CIF files; a run that was cut short goes on where it stood.
    `conditions` are attributes (`config.ATTRIBUTES`) that the prompt states. With the grammar every text is a crystal
    and meets `constraints`, to which a stated formula and stated elements (these and no others) are added; a run whose
    recipe never stated them is only constrained, not told. Temperature, top-k, top-p and min-p act in this order and
    are by default the paper's. `max_new_tokens` is by default what the model's context leaves after the prompt, at most
    512. Each copy of the model on `mesh` (default: one device) draws `slots` crystals at once.

    Raises UserError for settings out of range, constraints that contradict each other or cannot be met, a prompt that
    the context cannot hold, and as `load_model` and `Ledger`.
    """
    if num < 1:
        raise UserError(f"num is {num}; it must be at least 1")
    if num_valid is not None and not 1 <= num_valid <= num:
        raise UserError(f"num_valid is {num_valid}; it must lie between 1 and num, which is {num}")
    methods: list[Method] = [Temperature(temperature)]
    methods += [] if top_k is None else [TopK(top_k)]
    methods += [TopP(top_p)]
    methods += [] if min_p is None else [MinP(min_p)]
    conditions = dict(conditions or {})
    if grammar:
        constraints = _constrained(constraints, conditions)
        conditions = _known(conditions, Path(model_dir))
    elif constraints != Constraints():
        raise UserError("without the grammar there is nothing to keep the constraints; leave one of the two out")
    model = load_model(model_dir, mesh)
    tokenizer = load_tokenizer(model.tokenizer_path)
    prompt = generation_prompt(conditions, model.text.paper_compat)
    prompt_tokens = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if max_new_tokens is None:
        left = model.config.max_position_embeddings - len(prompt_tokens)
        max_new_tokens = max(1, min(LONGEST_TEXT, left))
    check_context(model.config, len(prompt_tokens), max_new_tokens)
    rules = None
    if grammar:
        vocab = model.config.padded_vocab_size
        rules = Grammar.build(TokenTables.build(tokenizer), model.text, max_new_tokens, vocab, [constraints])
    engine = Engine(
        model,
        end_id=tokenizer.eos_id,
        methods=methods,
        grammar=rules,
        slots=min(slots * (1 if mesh is None else mesh.shape["data"]), num),
        max_new_tokens=max_new_tokens,
        mesh=mesh,
    )
    request = Request(
        model=fingerprint(model, tokenizer),
        prompt=prompt,
        conditions=json.dumps(conditions),
        grammar=json.dumps(asdict(constraints)) if grammar else None,
        methods=[repr(method) for method in methods],
        max_new_tokens=max_new_tokens,
        seed=seed,
        num=num,
        num_valid=num_valid,
    )
    draws = engine.draw(prompt_tokens, seed, range(num))  # refuses before anything is written
    ledger = Ledger(out, request)
    resumed, start = len(ledger), time.monotonic()
    if resumed:
        draws = engine.draw(prompt_tokens, seed, range(resumed, num))
    if not ledger.complete:
        for attempt in _with_progress((_attempt(draw, request, tokenizer) for draw in draws), ledger):
            ledger.append(attempt)
            if ledger.complete:
                break
    ledger.finish()
    return SampleReport(Path(out), dict(sorted(ledger.counts.items())), resumed, time.monotonic() - start)


def _constrained(constraints: Constraints, conditions: Mapping[str, Any]) -> Constraints:
    """What is stated of the composition is kept to as well."""
    formula, elements = conditions.get("pretty_formula"), conditions.get("elements")
    if formula is not None:
        constraints = replace(constraints, formula=formula)
    if elements is not None:
        allowed = tuple(elements) if constraints.allowed is None else tuple(constraints.allowed)
        constraints = replace(constraints, required=(*constraints.required, *elements), allowed=allowed)
    return constraints


def _known(conditions: Mapping[str, Any], model_dir: Path) -> dict[str, Any]:
    """Without a formula or elements that no training text of the model stated: to it they would be noise."""
    recipe = model_dir / "recipe.yaml"  # a converted model has none
    if not recipe.exists():
        return dict(conditions)
    unknown = {"pretty_formula", "elements"} - set(load(Recipe, recipe).augment.attributes)
    return {name: value for name, value in conditions.items() if name not in unknown}


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
    finished = draw.ending is Ending.FINISHED
    text = tokenizer.decode(draw.tokens[:-1] if finished else draw.tokens)
    crystal = None
    if finished:
        status, crystal = judge(text)
    else:
        status = TRUNCATED if draw.ending is Ending.TRUNCATED else NAN_LOGITS
    return Attempt(
        index=draw.index,
        seed=request.seed,
        prompt=request.prompt,
        conditions=request.conditions,
        text=text,
        status=status,
        log_probability=_finite(draw.log_probability),
        grammar_log_probability=None if request.grammar is None else _finite(draw.grammar_log_probability),
        tokens=len(draw.tokens),
        formula=None if crystal is None else crystal.formula,
        cif=None if crystal is None else crystal.to_cif(),
    )


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _with_progress(attempts: Iterator[Attempt], ledger: Ledger) -> Iterator[Attempt]:
    """Crystals/s, time left, the share that is ok, and the last crystal's formula."""
    formula, only_valid = "", ledger.request.num_valid is not None

    def done() -> int:
        return ledger.counts[OK] if only_valid else len(ledger)

    total = ledger.request.num_valid if only_valid else ledger.request.num
    with tqdm(total=total, initial=done(), unit="crystal", smoothing=0.1) as bar:
        for attempt in attempts:
            yield attempt
            formula = attempt.formula or formula
            bar.set_postfix_str(f"ok {ledger.counts[OK] / len(ledger):.0%} {formula}", refresh=False)
            bar.update(done() - bar.n)
