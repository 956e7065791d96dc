"""Tokens that the grammar forces are appended in the step of the token before: texts are those of one at a time.

Every token of every text is drawn again here, by the stated rule of its key, from logits of the uncached model. Where
the engine's token is another one, the two must be nearly tied: noise of 1e-3 on the logits decides between them.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy.stats import chi2
from test_engine_grammar import LIMIT, PROMPT, engine_of, grammar_of, random_model

from jaxcrystal.errors import UserError
from jaxcrystal.sampling import decoding
from jaxcrystal.sampling.engine import Draw, Engine, Task
from jaxcrystal.sampling.methods import Greedy, Guidance, Method, Temperature, TopP, pick
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.p1.grammar import State
from jaxcrystal.weights.saved import SavedModel

SEED, DRAWS = 11, 24
NUCLEUS = (Temperature(0.9), TopP(0.9))


@pytest.fixture(scope="module")
def model() -> SavedModel:
    return random_model()


def key_of(prompt: list[int], index: int, token: int) -> jax.Array:
    prompt_hash = hashlib.sha256(np.array(prompt, "<i4").tobytes()).digest()[:4]
    key = jax.random.key(SEED)
    for number in (int.from_bytes(prompt_hash, "little"), index, token):
        key = jax.random.fold_in(key, np.uint32(number))
    return key


@dataclass
class Reference:
    """What the uncached model and the grammar say along texts that are there."""

    logits: np.ndarray  #: [draws, time, letters], -inf where the grammar allows no such letter
    free: np.ndarray  #: [draws, time, letters], log-probabilities of the model alone

    @classmethod
    def of(cls, model: SavedModel, prompt: list[int], draws: list[Draw]) -> "Reference":
        grammar = grammar_of(model)
        tokens = np.zeros((len(draws), len(prompt) + LIMIT), np.int32)
        for row, draw in zip(tokens, draws, strict=True):
            row[: len(prompt) + len(draw.tokens)] = [*prompt, *draw.tokens]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        logits = jax.jit(model.module.apply)(model.variables, tokens, positions)[0][:, len(prompt) - 1 : -1]
        free = jax.nn.log_softmax(logits)[..., grammar.tokens]
        state = grammar.start(jax.tree.map(lambda x: np.stack([x] * len(draws)), grammar.limits(Constraints())))
        letters = letters_of(grammar, tokens[:, len(prompt) :])

        def follow(state: State, letter: jax.Array) -> tuple[State, jax.Array]:
            return grammar.advance(state, letter), grammar.allowed(state)

        _, allowed = jax.jit(partial(jax.lax.scan, follow))(state, letters.T)
        masked = np.where(np.moveaxis(np.asarray(allowed), 0, 1), logits[..., grammar.tokens], -np.inf)
        return cls(masked, np.asarray(free, np.float64))


def letters_of(grammar, tokens: np.ndarray) -> np.ndarray:
    letter = {int(token): number for number, token in enumerate(grammar.tokens)}
    return np.vectorize(lambda token: letter.get(int(token), 0))(tokens)


def picked(key: jax.Array, logits: np.ndarray, methods: tuple[Method, ...]) -> np.ndarray:
    """The letter of each row of logits, all by the same key."""
    rows = jnp.asarray(logits, jnp.float32)
    for method in methods:
        rows = method(rows)
    return np.asarray(pick(jnp.broadcast_to(key, len(rows)), rows))


def is_near_tie(key: jax.Array, logits: np.ndarray, methods: tuple[Method, ...], letter: int) -> bool:
    noise = np.random.default_rng(0).uniform(-1e-3, 1e-3, (200, len(logits)))
    return letter in picked(key, logits + noise, methods)


def assert_drawn_by_the_rule(model: SavedModel, draws: list[Draw], methods: tuple[Method, ...]) -> None:
    """Each token is what its key draws from the uncached model; log-probabilities are those of the texts."""
    grammar, reference = grammar_of(model), Reference.of(model, PROMPT, draws)
    again = jax.jit(jax.vmap(lambda key, logits: pick(key[None], _all(methods, logits[None]))[0]))
    for row, draw in enumerate(draws):
        letters, time = letters_of(grammar, draw.tokens), np.arange(len(draw.tokens))
        logits = reference.logits[row, : len(time)]
        keys = jnp.stack([key_of(PROMPT, draw.index, t) for t in time])
        for t in np.flatnonzero(np.asarray(again(keys, jnp.asarray(logits, jnp.float32))) != letters):
            assert is_near_tie(keys[t], logits[t], methods, letters[t])
        free = reference.free[row, : len(time)]
        allowed = np.log(np.where(np.isfinite(logits), np.exp(free), 0).sum(-1)).sum()
        # Logits of weights so wide are rounded by about 1e-5 each.
        assert draw.log_probability == pytest.approx(free[time, letters].sum(), abs=1e-5 * len(time) + 1e-4)
        assert draw.grammar_log_probability == pytest.approx(allowed, abs=1e-5 * len(time) + 1e-4)


def _all(methods: tuple[Method, ...], logits: jax.Array) -> jax.Array:
    for method in methods:
        logits = method(logits)
    return logits


@pytest.mark.parametrize(
    ("methods", "jump"),
    [(NUCLEUS, 1), (NUCLEUS, 2), (NUCLEUS, 4), ((Greedy(),), 4), ((Temperature(1.0),), 6)],
    ids=str,
)
def test_every_token_is_the_one_that_its_key_draws(model, methods, jump):
    draws = list(engine_of(model, methods=methods, jump=jump, slots=16).draw(PROMPT, SEED, range(DRAWS)))
    assert_drawn_by_the_rule(model, draws, methods)


@pytest.mark.parametrize("methods", [(Greedy(),), NUCLEUS], ids=str)
def test_texts_and_log_probabilities_are_those_of_a_token_at_a_time(model, methods):
    one, several = (
        list(engine_of(model, methods=methods, jump=jump, slots=16).draw(PROMPT, SEED, range(DRAWS))) for jump in (1, 4)
    )
    grammar, reference, equal = grammar_of(model), Reference.of(model, PROMPT, one), 0
    for row, (a, b) in enumerate(zip(one, several, strict=True)):
        if a.tokens.tolist() == b.tokens.tolist():
            equal += 1
            assert a.ending == b.ending
            assert a.log_probability == pytest.approx(b.log_probability, abs=1e-5 * len(a.tokens))
            assert a.grammar_log_probability == pytest.approx(b.grammar_log_probability, abs=1e-5 * len(a.tokens))
            continue
        t = next(t for t, pair in enumerate(zip(a.tokens, b.tokens, strict=False)) if pair[0] != pair[1])
        key, logits = key_of(PROMPT, a.index, t), reference.logits[row, t]
        assert all(is_near_tie(key, logits, methods, letters_of(grammar, x.tokens)[t]) for x in (a, b))
    assert equal > 0.9 * DRAWS


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {}), ("bfloat16", {}), ("float32", {"cache_dtype": "int8"}), ("float32", {"guidance": Guidance(1.5)})],
    ids=str,
)
def test_with_as_many_slots_all_is_the_same_to_the_bit(model, dtype, options):
    """Which tokens share a step depends on the neighbours; what comes of them does not, nor do log-probabilities."""
    model = replace(model, config=replace(model.config, dtype=dtype))
    if "guidance" in options:
        options = options | {"unconditional": PROMPT[:2]}
    engine = engine_of(model, methods=(Temperature(1.0),), slots=7, **options)
    whole = {draw.index: draw for draw in engine.draw(PROMPT, SEED, range(DRAWS))}
    orders = np.random.default_rng(0).permutation(DRAWS), np.arange(DRAWS)[::-3], [5]
    for order in orders:
        for draw in engine.draw(PROMPT, SEED, order):
            expected = whole[draw.index]
            assert draw.tokens.tolist() == expected.tokens.tolist()
            assert draw.log_probability == expected.log_probability
            assert draw.grammar_log_probability == expected.grammar_log_probability


def test_guided_texts_are_those_of_a_token_at_a_time(model):
    options = {"guidance": Guidance(1.5), "unconditional": PROMPT[:2], "slots": 16}
    one, several = (
        [draw.tokens.tolist() for draw in engine_of(model, jump=jump, **options).draw(PROMPT, SEED, range(DRAWS))]
        for jump in (1, 4)
    )
    assert sum(a == b for a, b in zip(one, several, strict=True)) > 0.9 * DRAWS
    assert one != [draw.tokens.tolist() for draw in engine_of(model, slots=16).draw(PROMPT, SEED, range(DRAWS))]


def test_a_jump_takes_fewer_steps(model, monkeypatch):
    """With a step a call, the calls are the steps."""
    monkeypatch.setattr(decoding, "STEPS_PER_CALL", 1)

    def steps(jump: int) -> int:
        engine, calls = engine_of(model, jump=jump, slots=8), []
        run = engine._run
        monkeypatch.setattr(engine, "_run", lambda *a: calls.append(1) or run(*a))
        list(engine.draw(PROMPT, SEED, range(8)))
        return len(calls)

    assert steps(4) < 0.75 * steps(1)


def test_a_jump_of_no_token_is_refused(model):
    with pytest.raises(UserError, match="jump is 0"):
        engine_of(model, jump=0)


def test_draw_i_of_one_prompt_uses_other_random_numbers_than_that_of_another(model):
    """Of a model that finds all tokens equally likely, a text is nothing but its random numbers."""
    even = SavedModel(**{**vars(model), "params": jax.tree.map(jnp.zeros_like, model.params)})
    engine = engine_of(even, slots=8)
    other = [*PROMPT, PROMPT[-1]]

    def texts(prompts: list[list[int]]) -> list[list[list[int]]]:
        tasks = [Task(number, index) for number in range(len(prompts)) for index in range(4)]
        draws = [draw.tokens.tolist() for draw in engine.draw_all(prompts, SEED, tasks)]
        return [draws[4 * number : 4 * number + 4] for number in range(len(prompts))]

    first, second = texts([PROMPT, other])
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert texts([other, PROMPT]) == [second, first]
    assert texts([PROMPT]) == [first]


@struct.dataclass
class Nothing:
    """A state that holds nothing but who it is of."""

    slot: jax.Array


@dataclass(frozen=True, eq=False)
class Some:
    """In the place of a grammar: the same letters may come at any time."""

    tokens: np.ndarray
    possible: np.ndarray

    def limits(self) -> Nothing:
        return Nothing(np.int32(0))

    def start(self, limits: Nothing) -> Nothing:
        return limits

    def advance(self, state: Nothing, letter: jax.Array) -> Nothing:
        return state

    def allowed(self, state: Nothing) -> jax.Array:
        return jnp.broadcast_to(self.possible, (len(state.slot), len(self.possible)))


@pytest.mark.parametrize("methods", [(), (Temperature(2.5),), (Temperature(2.0), TopP(0.8))], ids=str)
def test_first_letters_follow_the_models_probabilities_among_those_allowed(model, methods):
    """A chi-square test at 0.1 %, in float64 over all the vocabulary: masked there, tempered, its head by a sort."""
    random = np.random.default_rng(0)
    some = Some(random.permutation(model.config.vocab_size)[:60], random.random(60) < 0.5)
    logits = model.module.apply(model.variables, jnp.array([PROMPT]), jnp.arange(len(PROMPT))[None])[0][0, -1]
    masked = np.full(model.config.padded_vocab_size, -np.inf)
    masked[some.tokens[some.possible]] = np.asarray(logits, np.float64)[some.tokens[some.possible]]
    probability = np.exp((masked - masked.max()) / (methods[0].t if methods else 1))
    probability /= probability.sum()
    if len(methods) == 2:
        head = np.sort(probability)[::-1]
        probability *= probability >= head[np.searchsorted(np.cumsum(head), methods[1].p)]
    engine = Engine(model, end_id=2, grammar=some, methods=methods, slots=500, max_new_tokens=1)
    counts = np.bincount([draw.tokens[0] for draw in engine.draw(PROMPT, 0, range(20_000))], minlength=len(masked))
    assert counts[probability == 0].sum() == 0
    expected = 20_000 * probability / probability.sum()
    often = expected >= 5  # the others together are one cell
    cells = [np.append(x[often], x[~often].sum()) for x in (counts, expected)]
    seen, wanted = (x[cells[1] > 0] for x in cells)
    assert len(seen) > 3
    assert ((seen - wanted) ** 2 / wanted).sum() <= chi2.isf(1e-3, df=len(seen) - 1)
