"""The grammar by itself: what it lets through is a crystal, and what is a crystal it lets through."""

import dataclasses
from collections import Counter
from functools import cache

import byte_pair_tokenizers
import digit_pairs
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from byte_pair_tokenizers import REAL
from hypothesis import given, settings
from hypothesis import strategies as st
from some_crystals import crystals, p1_crystal

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals import prototypes
from jaxcrystal.crystals.crystal import ELEMENTS, Crystal, cell_volume
from jaxcrystal.crystals.formulas import read_formula
from jaxcrystal.errors import UserError
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.p1 import tables as p1_tables
from jaxcrystal.texts.p1.grammar import END, GAMMA, Grammar, Limits, State
from jaxcrystal.texts.p1.text import parse, write
from jaxcrystal.texts.parsing import ParseError
from jaxcrystal.texts.prompts import generation_prompt
from jaxcrystal.texts.tokenizer import Tokenizer, load_tokenizer

LIMIT = 300
COMPACT = load_tokenizer("compact")


@pytest.fixture(scope="module", params=["compact", "llama2"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "compact":
        return COMPACT
    return load_tokenizer(request.getfixturevalue("shared") / "tokenizer/llama2/tokenizer.model")


def build(tokenizer=COMPACT, fmt=TextFormat(), limit=LIMIT) -> Grammar:  # noqa: B008
    return Grammar.build(p1_tables.build(tokenizer), fmt, limit)


def start(grammar: Grammar, slots: int, limits: Limits | None = None) -> State:
    """Of slots that all keep to the same."""
    limits = grammar.limits() if limits is None else limits
    return grammar.start(jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), limits))


def tokens_of(tokenizer, text: str) -> list[int]:
    """As they follow the prompt."""
    return tokenizer.encode("\n" + text)[len(tokenizer.encode("\n")) :]


def walk(grammar: Grammar, limits: Limits, key: jax.Array, texts: int) -> tuple[jax.Array, jax.Array]:
    """Letters that are drawn uniformly among those allowed, -1 behind the end; whether there always was one."""

    def step(carry: tuple[State, jax.Array], key: jax.Array):
        state, ended = carry
        allowed = grammar.allowed(state)
        letter = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf))
        letter = jnp.where(ended, -1, letter)
        state = grammar.advance(state, jnp.maximum(letter, 0))
        return (state, ended | (letter == len(grammar.digits) + END)), (letter, ended | allowed.any(-1))

    begin = (start(grammar, texts, limits), jnp.zeros(texts, bool))
    (_, ended), (letters, possible) = jax.lax.scan(step, begin, jax.random.split(key, grammar.limit))
    return letters.T, possible.all() & ended.all()


def walked(tokenizer, grammar: Grammar, texts: int, seed: int = 0, **constraints) -> list[Crystal]:
    """Crystals of random walks, none of which ran into a wall or into the limit."""
    limits = grammar.limits(Constraints(**constraints))
    program = jax.jit(walk, static_argnums=(0, 3))
    letters, possible = jax.device_get(program(grammar, limits, jax.random.key(seed), texts))
    assert possible
    return [read(tokenizer, grammar.tokens[row[row >= 0]]) for row in letters]


def read(tokenizer, tokens: np.ndarray) -> Crystal:
    assert tokens[-1] == tokenizer.eos_id
    text = tokenizer.decode(tokens[:-1])
    assert tokens_of(tokenizer, text) == tokens[:-1].tolist()  # as the tokenizer would have written it
    return parse(text)


FORMATS = [TextFormat(), TextFormat(6, 4, 2), TextFormat(3, 2, 1, paper_compat=True)]


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=str)
def test_every_walk_ends_in_a_crystal(tokenizer, fmt):
    found = walked(tokenizer, build(tokenizer, fmt), 500)
    assert len({len(crystal) for crystal in found}) > 3
    assert len({z for crystal in found for z in crystal.species}) > 90


@pytest.mark.parametrize("name", ["pairs", "smollm2", "llama3", "qwen", "tekken", *REAL])
def test_walks_are_what_their_tokenizer_writes(name, tmp_path):
    """encode(decode(tokens)) = tokens, behind the prompt too; LLaMA-3's numbers in its own groups of digits."""
    tokenizer = digit_pairs.load(tmp_path) if name == "pairs" else byte_pair_tokenizers.load(name, tmp_path)
    tables, prompt = p1_tables.build(tokenizer), generation_prompt(form_of(TextFormat()), {})
    for fmt in (TextFormat(), TextFormat(6, 4, 2)):
        grammar = Grammar.build(tables, fmt, LIMIT)
        assert grammar.group == {"llama3": 3, "pairs": 2}.get(name, 1) or name in REAL
        for crystal in walked(tokenizer, grammar, 200):
            text = write(crystal, fmt)
            tokens = [*tokenizer.encode(prompt), *tokens_of(tokenizer, text)]
            assert tokenizer.encode(prompt + text) == tokens and tokens_of(tokenizer, text) == p1_tables.spell(
                tables, text
            )


def test_texts_fill_what_room_there_is(tokenizer):
    """The end comes at the last token, not before its time: nothing is truncated, nothing is wasted."""
    grammar = build(tokenizer, limit=120)

    def step(state: State, key: jax.Array):
        allowed = grammar.allowed(state)
        # Never the end, where something else may come.
        allowed = allowed.at[:, 13].min(allowed.sum(-1) == 1)
        letter = jax.random.categorical(key, jnp.where(allowed, 0.0, -jnp.inf))
        return grammar.advance(state, letter), letter

    carbon = start(grammar, 64, grammar.limits(Constraints(formula="C")))
    _, letters = jax.jit(lambda keys: jax.lax.scan(step, carbon, keys))(jax.random.split(jax.random.key(0), 120))
    lengths = (np.asarray(letters).T == 13).argmax(1) + 1
    assert (lengths > 120 - grammar.atom[6]).all() and (lengths <= 120).all()


@pytest.mark.parametrize(
    "formula",
    ["NaCl", "LiFePO4", "Si", "Ca3(PO4)2", "Zr(Nb2O)2Sr", "UO2", "BaTiO3", "Og", "CsPbI3", "Mg2(SiO4)"],
)
def test_compositions_are_exact(shared, formula):
    tokenizer = load_tokenizer(shared / "tokenizer/llama2/tokenizer.model")
    unit = read_formula(formula)
    units = set()
    for crystal in walked(tokenizer, build(tokenizer), 64, formula=formula):
        counts = Counter(crystal.symbols)
        n = counts[next(iter(unit))] // next(iter(unit.values()))
        assert counts == Counter({symbol: n * count for symbol, count in unit.items()})
        units.add(n)
    assert len(units) > (sum(unit.values()) < 8)


@pytest.mark.parametrize("num_atoms", [(14, 14), (3, 8)])
def test_formula_and_number_of_atoms(num_atoms):
    found = {len(c) for c in walked(COMPACT, build(limit=400), 256, formula="LiFePO4", num_atoms=num_atoms)}
    low, high = num_atoms
    assert found <= set(range(low, high + 1)) & {7, 14, 21} and found


@cache
def _constrained():
    """Walks that are compiled once, whatever the limits."""
    grammar = build(limit=160)
    return grammar, jax.jit(lambda limits, key: walk(grammar, limits, key, 40))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_elements_and_numbers_of_atoms_are_kept(data):
    pick = st.sampled_from(ELEMENTS[1:])
    allowed = data.draw(st.none() | st.sets(pick, min_size=1, max_size=30))
    forbidden = data.draw(st.sets(pick, max_size=60 if allowed is None else 3))
    left = sorted((allowed or set(ELEMENTS[1:])) - forbidden)
    if not left:
        return
    required = data.draw(st.sets(st.sampled_from(left), max_size=min(3, len(left))))
    low = data.draw(st.integers(1, 6))
    high = data.draw(st.none() | st.integers(max(low, len(required)), 8))
    grammar, run = _constrained()
    constraints = Constraints(
        allowed=None if allowed is None else tuple(allowed),
        forbidden=tuple(forbidden),
        required=tuple(required),
        num_atoms=(low, high),
    )
    key = jax.random.key(data.draw(st.integers(0, 2**31)))
    letters, possible = jax.device_get(run(grammar.limits(constraints), key))
    assert possible and run._cache_size() == 1
    for row in letters:
        crystal = read(COMPACT, grammar.tokens[row[row >= 0]])
        assert required <= set(crystal.symbols) <= set(left)
        assert low <= len(crystal) <= (high or 99)


def rejected(tokenizer, grammar: Grammar, texts: list[str]) -> list[tuple[str, int]]:
    """Texts of which some token, or the end, was not allowed, and which token it was."""
    letter = {int(token): number for number, token in enumerate(grammar.tokens)}
    rows = [[*tokens_of(tokenizer, text), tokenizer.eos_id] for text in texts]
    letters = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, tokens in zip(letters, rows, strict=True):
        row[: len(tokens)] = [letter[token] for token in tokens]

    @jax.jit
    def follow(letters):
        def step(state, letter):
            allowed = jnp.take_along_axis(grammar.allowed(state), letter[:, None], axis=1)[:, 0]
            return grammar.advance(state, letter), allowed

        return jax.lax.scan(step, start(grammar, letters.shape[0]), letters.T)[1].T

    followed = np.asarray(follow(letters))
    first_bad = (~followed).argmax(1)
    wrong = [not ok[: len(tokens)].all() for ok, tokens in zip(followed, rows, strict=True)]
    return [(text, int(at)) for text, at, bad in zip(texts, first_bad, wrong, strict=True) if bad]


def assert_none_is_impossible(tokenizer, found: list[Crystal], fmt: TextFormat, limit: int = 512) -> None:
    """Exceptions: angles that close no cell once they are rounded, which `parse` refuses too."""
    for text, at in rejected(tokenizer, build(tokenizer, fmt, limit), [write(crystal, fmt) for crystal in found]):
        with pytest.raises(ParseError):
            parse(text)
            raise AssertionError(f"refused at token {at}: {text!r}")


@pytest.mark.parametrize("fmt", FORMATS[:1], ids=str)
def test_no_embedded_crystal_is_impossible(tokenizer, fmt):
    assert_none_is_impossible(tokenizer, [e.crystal for e in prototypes.embedded()][::5], fmt)


def test_no_crystal_of_mp20_is_impossible(tokenizer, shared):
    cifs = pd.read_parquet(shared / "data/mp20/val.parquet", columns=["cif"])["cif"]
    assert_none_is_impossible(tokenizer, [p1_crystal(cif) for cif in cifs[:1500]], TextFormat())


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["llama2"], indirect=True)
def test_none_of_mp20s_held_out_crystals_is_impossible(tokenizer, shared):
    for part in ("val", "test"):
        cifs = pd.read_parquet(shared / f"data/mp20/{part}.parquet", columns=["cif"])["cif"]
        found = [p1_crystal(cif) for cif in cifs[::3]]
        for start in range(0, len(found), 4096):
            assert_none_is_impossible(tokenizer, found[start : start + 4096], TextFormat())


def test_no_crystal_at_all_is_impossible_within_the_stated_bounds():
    """Random ones: lengths from 0.7 Å, angles from 1° to 179°."""

    @settings(max_examples=200, deadline=None, database=None)
    @given(crystals())
    def collect(crystal):
        if crystal.lengths.min() >= 0.75 and 1.01 <= crystal.angles.min() and crystal.angles.max() <= 178.9:
            found.append(crystal)

    found = []
    collect()
    assert len(found) > 50
    fmt = TextFormat(4, 2, 1)
    texts = [write(crystal, fmt) for crystal in found]
    longest = max(len(tokens_of(COMPACT, text)) for text in texts)
    for text, at in rejected(COMPACT, build(fmt=fmt, limit=longest + 1), texts):
        with pytest.raises(ParseError):
            parse(text)
            raise AssertionError(f"refused at token {at}: {text!r}")


GOOD = "5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50"


def test_what_is_no_crystal_is_refused_where_it_goes_wrong():
    cell = "5.6 5.6 5.6\n90 90 90"
    texts = {  # and what is right of each
        GOOD.replace("5.6 5.6 5.6", "5.6 5.6"): "5.6 5.6",
        GOOD.replace("5.6 5.6 5.6", "05.6 5.6 5.6"): "0",
        GOOD.replace("5.6 5.6 5.6", "256.0 5.6 5.6"): "25",
        GOOD.replace("5.6 5.6 5.6", "0.6 5.6 5.6"): "0.",
        GOOD.replace("5.6 5.6 5.6", "5.60 5.6 5.6"): "5.6",
        GOOD.replace("90 90 90", "90 90 180"): "5.6 5.6 5.6\n90 90 18",
        GOOD.replace("90 90 90", "170 170 90"): "5.6 5.6 5.6\n170 170 9",
        GOOD.replace("90 90 90", "30 30 90"): "5.6 5.6 5.6\n30 30 9",
        GOOD.replace("90 90 90", "179 179 90"): "5.6 5.6 5.6\n179 179 ",
        GOOD.replace("90 90 90", "90.0 90 90"): "5.6 5.6 5.6\n90",
        GOOD.replace("Cl", "9"): f"{cell}\nNa\n0.00 0.00 0.00\n",
        GOOD.replace("0.50 0.50 0.50", "1.00 0.50 0.50"): f"{cell}\nNa\n0.00 0.00 0.00\nCl\n",
        GOOD.removesuffix("\n0.50 0.50 0.50"): GOOD.removesuffix("\n0.50 0.50 0.50"),
        GOOD.removesuffix(" 0.50"): GOOD.removesuffix(" 0.50"),
        cell: cell,
        f"{GOOD}\n": f"{GOOD}\n",
    }
    found = rejected(COMPACT, build(), list(texts))
    assert found == [(text, len(tokens_of(COMPACT, right))) for text, right in texts.items()]
    assert not rejected(COMPACT, build(), [GOOD])


def test_every_pair_of_angles_leaves_exactly_the_angles_that_close_a_cell():
    """All 179³ triples of whole degrees, against the volume in float64."""
    degrees = np.arange(1, 180)
    cos = np.cos(np.radians(degrees))
    a, b, g = np.meshgrid(cos, cos, cos, indexing="ij", sparse=True)
    closes = 1 - a * a - b * b - g * g + 2 * a * b * g > 1e-12
    alpha, beta = (x.ravel() for x in np.meshgrid(degrees, degrees, indexing="ij"))
    grammar = build()
    state = dataclasses.replace(
        start(grammar, len(alpha)),
        field=jnp.full(len(alpha), GAMMA, jnp.int32),
        angles=jnp.stack([alpha, beta], axis=1),
    )
    low, high = map(np.asarray, grammar._bounds(state))
    expected = closes.reshape(-1, 179)
    # A pair may come only if a third angle exists for it.
    possible = expected.any(1)
    _, most = grammar._bounds(dataclasses.replace(state, field=jnp.full(len(alpha), GAMMA - 1, jnp.int32)))
    np.testing.assert_array_equal(possible, beta <= np.asarray(most))
    got = (degrees >= low[:, None]) & (degrees <= high[:, None])
    np.testing.assert_array_equal(got[possible], expected[possible])


def test_the_flattest_cells_are_still_cells():
    """Two decimals: whatever the first two angles, the least and the greatest third angle have a volume for parse."""
    rng = np.random.default_rng(0)
    grammar = build(fmt=TextFormat(angle_decimals=2))
    edge = np.array([100, 101, 17899, 17900, 9000, 6000])
    alpha = np.where(rng.random(4000) < 0.7, rng.choice(edge, 4000), rng.integers(100, 17901, 4000))
    beta = np.where(rng.random(4000) < 0.7, rng.choice(edge, 4000), rng.integers(100, 17901, 4000))
    keep = alpha + beta <= 36000 - 101
    angles = np.stack([alpha, beta], axis=1)[keep]
    state = dataclasses.replace(
        start(grammar, len(angles)),
        field=jnp.full(len(angles), GAMMA, jnp.int32),
        angles=jnp.asarray(angles),
    )
    for gamma in map(np.asarray, grammar._bounds(state)):
        for triple in np.column_stack([angles, gamma]) / 100:
            assert cell_volume(np.ones(3), triple) > 0, triple


@cache
def _next_digits(decimals: int):
    """What may come at a state of a length, for bounds that are arguments."""
    grammar = build(fmt=TextFormat(length_decimals=decimals))

    @jax.jit
    def allowed(low, high, value, column):
        limits = dataclasses.replace(grammar.limits(), low=jnp.full(10, low), high=jnp.full(10, high))
        return grammar.allowed(dataclasses.replace(start(grammar, len(value), limits), value=value, column=column))

    return allowed


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2), st.floats(0.7, 255), st.integers(0, 200))
def test_digits_lead_to_every_number_of_the_interval_and_to_no_other(decimals, least, more):
    """Against all numbers of the interval, written out: what follows a prefix is what follows it in one of them."""
    unit = 10**decimals
    low = round(least * unit)
    high = min(256 * unit - 1, low + more)
    follows: dict[str, set[str]] = {}
    for x in range(low, high + 1):
        number = f"{x // unit}.{x % unit:0{decimals}d} "
        for n in range(len(number)):
            follows.setdefault(number[:n], set()).add(number[n])
    value, column = np.zeros((2, 512), np.int32)
    for i, prefix in enumerate(follows):
        value[i] = int(prefix.replace(".", "") or 0)
        column[i] = 4 + len(prefix.split(".")[1]) if "." in prefix else len(prefix)
    rows = np.asarray(_next_digits(decimals)(low, high, value, column))
    for row, (prefix, expected) in zip(rows, follows.items(), strict=False):
        assert {"0123456789. "[letter] for letter in np.flatnonzero(row)} == expected, prefix


def test_bounds_of_the_cell_are_kept():
    found = walked(COMPACT, build(), 500, lengths=(3.05, 11.19), angles=(58.5, 121))
    lengths, angles = (np.concatenate([getattr(c, name) for c in found]) for name in ("lengths", "angles"))
    assert (lengths.min(), lengths.max()) == (pytest.approx(3.1), pytest.approx(11.1))
    assert angles.min() >= 59 and angles.max() <= 121 and len(set(angles.tolist())) > 50


def test_digits_in_groups_of_three():
    """As LLaMA-3 spells numbers: every run of digits in groups of three from its left, whatever the format."""
    tables = p1_tables.build(COMPACT)
    grouped = dataclasses.replace(tables, digits=np.arange(1000, 1000 + 10 + 100 + 1000))
    spelled = {int(t): str(i) for i, t in enumerate(grouped.digits[:10])}
    spelled |= {int(t): f"{i:02d}" for i, t in enumerate(grouped.digits[10:110])}
    spelled |= {int(t): f"{i:03d}" for i, t in enumerate(grouped.digits[110:])}
    spelled |= {int(tables.point): ".", int(tables.space): " ", int(tables.newline): "\n", int(tables.eos): ""}
    fmt = TextFormat(length_decimals=2, angle_decimals=1, coord_decimals=4)
    grammar = Grammar.build(grouped, fmt, 200)
    program = jax.jit(walk, static_argnums=(0, 3))
    limits = grammar.limits(Constraints(lengths=(2.5, 120.0)))
    letters, possible = jax.device_get(program(grammar, limits, jax.random.key(0), 300))
    assert possible
    widths = set()
    for row in letters:
        tokens = [int(t) for t in grammar.tokens[row[row >= 0]]]
        text = "".join(spelled.get(t) if t in spelled else COMPACT.decode([t]).strip() for t in tokens)
        crystal = parse(text)
        assert 2.5 <= crystal.lengths.min() and crystal.lengths.max() <= 120
        run: list[str] = []
        for token in [*tokens, int(tables.eos)]:
            if token >= 1000:
                run.append(spelled[token])
            elif run:
                together = "".join(run)
                assert run == [together[i : i + 3] for i in range(0, len(together), 3)], text
                widths |= {len(part) for part in run}
                run = []
    assert widths == {1, 2, 3}


@pytest.mark.parametrize(
    ("formula", "unit"),
    [
        ("LiFePO4", {"Li": 1, "Fe": 1, "P": 1, "O": 4}),
        ("Ca3(PO4)2", {"Ca": 3, "P": 2, "O": 8}),
        ("Mg(Al(OH)2)12", {"Mg": 1, "Al": 12, "O": 24, "H": 24}),
        ("HOH", {"H": 2, "O": 1}),
        ("Co", {"Co": 1}),
        ("CO", {"C": 1, "O": 1}),
    ],
)
def test_formulas(formula, unit):
    assert read_formula(formula) == unit


@pytest.mark.parametrize(
    ("formula", "match"),
    [
        ("", "is empty"),
        ("Xx2", "'Xx' of the formula 'Xx2' is no chemical element"),
        ("Na(Cl", r"lacks a \)"),
        ("NaCl)", r"cannot be read from '\)' on"),
        ("NaCl0", "cannot be read from '0' on"),
        ("Fe0.5O", "cannot be read from '0.5O' on"),
        ("Li Fe", "cannot be read from ' Fe' on"),
        ("()2", "is empty"),
        ("2NaCl", "cannot be read from '2NaCl' on"),
    ],
)
def test_what_is_no_formula(formula, match):
    with pytest.raises(UserError, match=match):
        Constraints(formula=formula)


@pytest.mark.parametrize(
    ("constraints", "match"),
    [
        ({"required": ("Xx",)}, "'Xx' is no chemical element"),
        ({"forbidden": ("xe",)}, "'xe' is no chemical element"),
        ({"allowed": ("Li", "")}, "'' is no chemical element"),
        ({"allowed": ()}, "no element is left"),
        ({"allowed": ("Li",), "forbidden": ("Li", "O")}, "no element is left"),
        ({"required": ("O",), "allowed": ("Li",)}, "O is required, but it is not among those allowed: Li"),
        ({"required": ("O",), "forbidden": ("O",)}, "O is required, but it is forbidden"),
        ({"formula": "NaCl", "forbidden": ("Cl",)}, "Cl is in NaCl, but it is forbidden"),
        ({"formula": "NaCl", "allowed": ("Na",)}, "Cl is in NaCl, but it is not among those allowed: Na"),
        ({"formula": "NaCl", "required": ("K",)}, "K is required, but NaCl has none"),
        ({"num_atoms": (0, 4)}, "num_atoms is 0; a crystal has at least 1"),
        ({"num_atoms": (5, 4)}, "num_atoms from 5 to 4 is an empty range"),
        ({"num_atoms": (2, 2), "required": ("Li", "O", "P")}, "3 elements are required, but num_atoms is 2"),
        ({"num_atoms": (8, 8), "formula": "LiFePO4"}, "num_atoms is 8, but LiFePO4 has 7 atoms"),
        ({"num_atoms": (8, 13), "formula": "LiFePO4"}, "num_atoms is 8 to 13, but LiFePO4 has 7 atoms"),
        ({"lengths": (9.0, 3.0)}, "lengths from 9.0 to 3.0 is an empty range"),
        ({"lengths": (2.0, 500.0)}, "lengths from 2.0 to 500.0 are not within 0 and 256"),
        ({"lengths": (float("nan"), 5.0)}, "is an empty range"),
        ({"angles": (0.0, 90.0)}, "angles from 0.0 to 90.0 are not within 1.0 and 179.0"),
        ({"angles": (120.0, 130.0)}, "no cell has three angles of 120.0 or more"),
        ({"space_groups": ()}, "no space group is left"),
        ({"space_groups": (225, 231)}, "space group 231 does not exist; numbers run from 1 to 230"),
    ],
)
def test_contradictions_are_refused(constraints, match):
    with pytest.raises(UserError, match=match):
        Constraints(**constraints)


@pytest.mark.parametrize(
    ("limit", "constraints", "match"),
    [
        (46, {}, "a crystal of one atom can take 47 tokens, but max_new_tokens is 46"),
        (
            300,
            {"formula": "Mg(Al(OH)2)12"},
            r"61 atoms of Mg\(Al.* can take 1067 tokens.*300, which holds about 15 atoms",
        ),
        (300, {"num_atoms": (30, 40)}, "a crystal of 30 atoms can take 540 tokens, but max_new_tokens is 300"),
        (60, {"required": ("Li", "O")}, "a crystal of 2 atoms can take 64 tokens"),
        (300, {"lengths": (3.01, 3.09)}, "lengths from 3.01 to 3.09: no number with 1 decimals lies between"),
        (300, {"space_groups": (225,)}, "the P1 text does not state its space group"),
        (300, {"angles": (119.5, 130.0)}, "no cell has three angles of 119.5 or more, as the model writes them"),
    ],
)
def test_what_cannot_be_written_is_refused(limit, constraints, match):
    with pytest.raises(UserError, match=match):
        build(limit=limit).limits(Constraints(**constraints))
