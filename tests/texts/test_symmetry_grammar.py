"""The grammar of texts by symmetry: what it lets through is a crystal, and what is a crystal it lets through."""

import itertools
import re
from collections import defaultdict
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from some_crystals import p1_crystal
from symmetric_crystals import counted
from symmetry_texts import Tables, parse, repeated, spelled, stacked, tokens_of, walk, write
from text_trees import Tree

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ELEMENTS
from jaxcrystal.crystals.formulas import ordered, read_formula
from jaxcrystal.crystals.symmetric import SymmetricCrystal
from jaxcrystal.crystals.symmetry import symmetrize
from jaxcrystal.crystals.wyckoff import GROUPS, group
from jaxcrystal.errors import UserError
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.symmetry.form import Symmetry
from jaxcrystal.texts.symmetry.grammar import COORDINATE, SYMBOL, Grammar
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS, kind_of

TABLES = Tables.build()
program = jax.jit(walk, static_argnums=(0, 3, 4))


def build(tables=TABLES, fmt=TextFormat(), limit=300) -> Grammar:  # noqa: B008
    return Grammar.build(tables, fmt, limit)


@cache
def usual() -> Grammar:
    return build()


def walked(
    grammar: Grammar, constraints: list[Constraints], tables=TABLES, seed: int = 0
) -> list[tuple[dict[str, int], SymmetricCrystal]]:
    """Compositions as stated, and crystals, of random walks: none ran into a wall or into the limit."""
    limits = stacked([grammar.limits(each) for each in constraints])
    letters, possible = program(grammar, limits, jax.random.key(seed), len(constraints), grammar.limit)
    assert possible
    found = []
    for row in np.asarray(letters):
        tokens = grammar.tokens[row[row >= 0]]
        text = spelled(tables, tokens)
        composition, crystal = parse(text, grammar.text)
        assert list(composition.items()) == list(crystal.composition.items()), text
        for run in re.findall("[0-9]+", text):  # cut into the widest tokens from its left
            assert " ".join(map(str, tokens_of(tables, run))) in " ".join(map(str, tokens)), text
        found.append((composition, crystal))
    return found


def test_walks_in_every_group_end_in_crystals():
    """Five in each of the 230, drawn without a model."""
    wishes = [Constraints(space_groups=(number,)) for number in GROUPS]
    found = walked(usual(), [wish for wish in wishes for _ in range(5)])
    assert [crystal.space_group for _, crystal in found] == [number for number in GROUPS for _ in range(5)]
    assert len({symbol for composition, _ in found for symbol in composition}) == len(ELEMENTS) - 1
    assert max(len(composition) for composition, _ in found) > 5
    letters = {(crystal.space_group, orbit.letter) for _, crystal in found for orbit in crystal.orbits}
    assert len(letters) > 1000


@pytest.mark.parametrize("groups, words, decimals", [(2, "spaced", 3), (3, "characters", 4), (1, "characters", 2)])
def test_tokens_of_other_tokenizers(groups, words, decimals):
    """Digits in groups of two and three, words of several tokens, spaces of their own."""
    tables = Tables.build(groups, words)
    fmt = TextFormat(coord_decimals=decimals, length_decimals=2, angle_decimals=1)
    grammar = build(tables, fmt)
    assert len(set(grammar.tokens.tolist())) == len(grammar.tokens)
    found = walked(grammar, [Constraints()] * 48, tables)
    assert len({crystal.space_group for _, crystal in found}) > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_64_atoms_find_room_at_two_decimals(seed):
    """Where several lie on one line, there is a value left for each."""
    grammar = build(limit=1100)
    assert grammar.most == MOST_ATOMS
    numbers = (1, 2, 3, 5, 8, 16, 22, 42, 70, 75, 82, 99, 143, 146, 155, 160, 166, 187, 191, 196, 225, 230)
    wishes = [
        Constraints(num_atoms=(64, 64), space_groups=(number,)) for number in numbers if kind_of(number).holds((64,))
    ]
    assert all(sum(composition.values()) == 64 for composition, _ in walked(grammar, wishes, seed=seed))


FORMULAS = ["NaCl", "LiFePO4", "Si", "Ca3(PO4)2", "SrTiO3", "UO2", "Og", "Mg2(SiO4)", "Zr(Nb2O)2Sr"]


def test_formulas_are_exact():
    wishes = [Constraints(formula=formula) for formula in FORMULAS for _ in range(12)]
    wishes += [Constraints(formula="SrTiO3", space_groups=(221, 225)) for _ in range(12)]
    units = defaultdict(set)
    for wish, (composition, _) in zip(wishes, walked(usual(), wishes), strict=True):
        unit = read_formula(wish.formula)
        times = sum(composition.values()) // sum(unit.values())
        assert composition == {symbol: times * unit[symbol] for symbol in ordered(unit)}
        units[wish.formula].add(times)
    assert len(units["NaCl"]) > 3 and len(units["Si"]) > 3


def test_ten_formulas_in_ten_groups():
    """Exact wherever a cell can be counted out; refused where none can, and nowhere else."""
    grammar, wishes, refused = usual(), [], 0
    for formula in [*FORMULAS, "Na3Cl"]:
        unit = tuple(read_formula(formula).values())
        for number in (1, 14, 62, 122, 139, 166, 194, 216, 225, 230):
            wish = Constraints(formula=formula, space_groups=(number,))
            times = range(1, grammar.most // sum(unit) + 1)
            if any(counted(number, tuple(k * n for n in unit), frozenset()) >= 0 for k in times):
                wishes += [wish] * 2
                continue
            refused += 1
            with pytest.raises(UserError, match=f"not possible in space group {number}"):
                grammar.limits(wish)
        counted.cache_clear()
    assert 0 < refused < 50
    for wish, (composition, crystal) in zip(wishes, walked(grammar, wishes), strict=True):
        unit = read_formula(wish.formula)
        times = sum(composition.values()) // sum(unit.values())
        assert composition == {symbol: times * unit[symbol] for symbol in ordered(unit)}
        assert crystal.space_group in wish.space_groups


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_wishes_are_kept(data):
    """All at once; each slot its own; what is refused is refused before anything runs."""
    wishes = [data.draw(wish()) for _ in range(8)]
    grammar, possible = usual(), []
    for each in wishes:
        try:
            grammar.limits(each)
            possible.append(each)
        except UserError as error:
            assert "not possible in" in str(error) or "has a conventional cell" in str(error)
    if not possible:
        return
    possible = list(itertools.islice(itertools.cycle(possible), 24))
    for each, (composition, crystal) in zip(possible, walked(grammar, possible), strict=True):
        assert set(each.required) <= set(composition) <= each.permitted
        low, high = each.num_atoms
        assert low <= sum(composition.values()) <= (high or grammar.most)
        assert each.space_groups is None or crystal.space_group in each.space_groups
        assert each.lengths[0] <= crystal.lengths.min() and crystal.lengths.max() <= each.lengths[1]
        assert each.angles[0] <= crystal.angles.min() and crystal.angles.max() <= each.angles[1]


@st.composite
def wish(draw) -> Constraints:
    pick = st.sampled_from(ELEMENTS[1:])
    allowed = draw(st.none() | st.sets(pick, min_size=1, max_size=12))
    forbidden = draw(st.sets(pick, max_size=60 if allowed is None else 3))
    left = sorted((allowed or set(ELEMENTS[1:])) - forbidden)
    if not left:
        allowed, forbidden, left = None, set(), ELEMENTS[1:]
    required = draw(st.sets(st.sampled_from(left), max_size=min(3, len(left))))
    low = draw(st.integers(1, 12))
    number = st.sampled_from(GROUPS)
    length = draw(st.floats(1, 50))
    return Constraints(
        allowed=None if allowed is None else tuple(allowed),
        forbidden=tuple(forbidden),
        required=tuple(required),
        num_atoms=(low, draw(st.none() | st.integers(max(low, len(required)), 16))),
        space_groups=draw(st.none() | st.sets(number, min_size=1, max_size=9).map(tuple)),
        lengths=draw(st.sampled_from([(0.7, 256.0), (length, length + 1)])),
        angles=draw(st.sampled_from([(1.0, 179.0), (60.0, 120.0), (80.0, 100.0), (91.5, 118.0)])),
    )


@cache
def tree() -> Tree:
    """One for all tests: it is compiled once."""
    return Tree(usual())


def text_of(letters) -> str:
    return "".join(TABLES.pieces[token] for token in usual().tokens[list(letters)])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_compositions_and_groups_are_those_that_can_be_and_no_others(data):
    """All that the grammar lets through, against all that there are."""
    symbols = ordered(data.draw(st.sets(st.sampled_from(ELEMENTS[1:]), min_size=1, max_size=3)))
    required = data.draw(st.sets(st.sampled_from(symbols), max_size=2))
    low = data.draw(st.integers(max(1, len(required)), 7))
    high = data.draw(st.integers(low, 8))
    numbers = data.draw(
        st.sets(st.sampled_from(range(2, 231)) | st.sampled_from(range(195, 231)), min_size=1, max_size=5)
    )
    if data.draw(st.integers(0, 5)) == 0:
        numbers, high = set(GROUPS), min(high, low + 1)
    wanted = defaultdict(set)
    for counts in itertools.product(range(high + 1), repeat=len(symbols)):
        present = {symbol: n for symbol, n in zip(symbols, counts, strict=True) if n}
        if low <= sum(counts) <= high and required <= set(present):
            line = " ".join(f"{symbol} {n}" for symbol, n in present.items())
            holding = {number for number in numbers if kind_of(number).holds(list(present.values()))}
            if holding:
                wanted[line] = holding
    wish = Constraints(
        allowed=tuple(symbols), required=tuple(required), num_atoms=(low, high), space_groups=tuple(numbers)
    )
    if not wanted:
        with pytest.raises(UserError, match="not possible in"):
            usual().limits(wish)
        return
    found = defaultdict(set)
    for letters in tree().explore(usual().limits(wish), lambda field: field == SYMBOL, lambda field: field < 0):
        line, number, _ = text_of(letters).split("\n")
        found[line].add(int(number))
    assert found == wanted


CASES = [
    (225, {"Na": 1, "Cl": 1}),
    (225, {"Ca": 1, "F": 2}),
    (225, {"K": 2, "Na": 1, "Al": 1, "F": 6}),
    (221, {"Ca": 4, "O": 3}),
    (2, {"Si": 2, "O": 2}),
    (2, {"Li": 1, "Na": 1, "O": 4}),
    (166, {"Bi": 2, "Te": 3}),
    (194, {"Mg": 2, "Ni": 4}),
    (227, {"Mg": 2, "Al": 4}),
    (223, {"Cr": 6, "Si": 2}),
    (139, {"Ba": 1, "Fe": 2, "As": 2}),
    (62, {"Ca": 4, "Ti": 4}),
    (208, {"Mg": 2, "Al": 6}),
    (99, {"Pb": 1, "Ti": 1, "O": 3}),
]


@pytest.mark.parametrize("number, composition", CASES, ids=str)
def test_letters_are_those_that_can_be_and_no_others(number, composition):
    """All sequences of positions that the grammar lets through for a composition, against all that there are."""
    counts = {symbol: composition[symbol] for symbol in ordered(composition)}
    places = {p.letter: (p.multiplicity // group(number).centring, p.reusable) for p in group(number).positions}

    def sequences(left: tuple[int, ...], once: frozenset[str]):
        if not left:
            yield ()
        elif left[0] == 0:
            yield from sequences(left[1:], once)
        else:
            for letter, (atoms, reusable) in places.items():
                if atoms <= left[0] and letter not in once:
                    taken = once if reusable else once | {letter}
                    for rest in sequences((left[0] - atoms, *left[1:]), taken):
                        yield (letter, *rest)

    wanted = set(sequences(tuple(counts.values()), frozenset()))
    assert wanted and all(number for number in counts.values())
    formula = "".join(f"{symbol}{n}" for symbol, n in counts.items())
    total = sum(counts.values())
    limits = usual().limits(Constraints(formula=formula, num_atoms=(total, total), space_groups=(number,)))
    found = tree().explore(limits, lambda field: field > COORDINATE, lambda field: field == COORDINATE)
    lines = [text_of(letters).split("\n")[2:-1] for letters in found]
    assert {tuple(line.split(" ")[1] for line in text) for text in lines} == wanted
    assert len(found) == len(wanted)


def pieces(text: str) -> list[str]:
    """Of which `Tables.build()` has tokens."""
    return re.findall(r" [A-Z][a-z]?(?= |$)| [a-zA](?=[ \n])|[A-Z][a-z]?|.|\n", text)


def first_wrong(texts: list[str], grammar: Grammar) -> list[int | None]:
    """The first piece that is not allowed, or behind the last the end; None: all are."""
    letter = {TABLES.pieces[token]: place for place, token in enumerate(grammar.tokens)}
    rows = [[*(letter[piece] for piece in pieces(text)), letter["<eos>"]] for text in texts]
    letters = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, those in zip(letters, rows, strict=True):
        row[: len(those)] = those

    @jax.jit
    def follow(letters):
        def step(state, letter):
            allowed = jnp.take_along_axis(grammar.allowed(state), letter[:, None], axis=1)[:, 0]
            return grammar.advance(state, letter), allowed

        return jax.lax.scan(step, grammar.start(repeated(grammar.limits(), len(letters))), letters.T)[1].T

    wrong = [np.flatnonzero(~ok[: len(row)]) for ok, row in zip(np.asarray(follow(letters)), rows, strict=True)]
    return [int(at[0]) if len(at) else None for at in wrong]


PEROVSKITE = "Sr 1 Ti 1 O 3\n221\nSr a\nTi b\nO c\n3.9"


RIGHT = [
    PEROVSKITE,
    PEROVSKITE.replace("Sr a\nTi b\nO c", "Sr b\nTi a\nO d"),
    "Ti 4 O 8\n62\nTi c 25 07\nO c 00 50\nO c 50 50\n4.5 5.5 9.9",
    "Fe 1\n229\nFe a\n2.9",
    "P 4\n2\nP i 10 20 30\nP i 10 20 31\n4.0 5.0 6.0 80 90 100",
    "P 2\n15\nP e 25\n4.0 5.0 6.0 95",
]
WRONG = {
    "Ti 1 Sr": " Sr",  # elements in order
    "Sr 1 Ti 1 O 3\n221\nTi": "Ti",
    PEROVSKITE.replace("Ti b", "Ti a"): " a",  # taken
    PEROVSKITE.replace("Sr a", "Sr c"): " c",  # too many atoms
    PEROVSKITE.replace("O c", "O a"): " a",
    "Sr 0": "0",
    "Sr 1 Ti 1 O 3\n230\n": "0",
    "Sr 1 Ti 1 O 3\n231\n": "1",
    "P 2\n2\nP i 00 50 50\n": "0",  # a centre
    "P 4\n2\nP i 10 20 30\nP i 90 80 70\n": "0",  # the same points
    "P 8\n225\nP f 25\n": "5",  # on c
    "Sr 1 Ti 1 O 3\n221\nSr a\nTi b\nO c\n0.6": "6",
    f"{PEROVSKITE} ": " ",
}


def test_texts_that_are_right_are_let_through_and_others_stopped_where_they_are_wrong():
    found = first_wrong([*RIGHT, *WRONG], usual())
    assert found[: len(RIGHT)] == [None] * len(RIGHT)
    for at, (text, piece) in zip(found[len(RIGHT) :], WRONG.items(), strict=True):
        assert at is not None and pieces(text)[at] == piece, text


@pytest.mark.parametrize("decimals", [2, 3])
def test_no_crystal_of_mp20_is_impossible(shared, decimals):
    """Made symmetric; but for those that are no crystals once they are rounded."""
    fmt = TextFormat(coord_decimals=decimals, length_decimals=2)
    cifs = pd.read_parquet(shared / "data/mp20/val.parquet", columns=["cif"])["cif"][::30]
    found = [symmetrize(p1_crystal(cif)) for cif in cifs]
    texts = [write(each.crystal.sorted(), fmt) for each in found if each is not None]
    assert len(texts) > 250
    lost = 0
    for text, wrong in zip(texts, first_wrong(texts, build(fmt=fmt, limit=500)), strict=True):
        if wrong is not None:
            with pytest.raises(UserError):
                parse(text, fmt)
            lost += 1
    assert lost < 3


def test_idle_slots_may_advance_by_any_letter():
    """A slot that starts again behind them is as good as new."""
    grammar, random = usual(), np.random.default_rng(0)
    limits = repeated(grammar.limits(), tree().size)
    state = grammar.start(limits)
    for _ in range(400):
        state = tree().advance(state, random.integers(0, len(grammar.tokens), tree().size))
        tree().allowed(state)
    again = jax.tree.map(lambda x, y: jnp.where(jnp.ones(x.shape, bool), x, y), grammar.start(limits), state)
    np.testing.assert_array_equal(tree().allowed(again), tree().allowed(grammar.start(limits)))


@pytest.mark.parametrize(
    "constraints, message",
    [
        (dict(formula="LiFePO4", space_groups=(225,)), "smallest one there has .*possible in"),
        (dict(num_atoms=(5, 5), space_groups=(225,)), "5 atoms .* not possible in space group 225"),
        (dict(num_atoms=(40, 50)), "max_new_tokens is 300"),
        (dict(num_atoms=(70, 80)), "70 atoms"),
        (dict(required=tuple(ELEMENTS[1:12])), "11 elements are required, but a text names 10"),
        (dict(angles=(95.0, 100.0), space_groups=(225, 221)), "none of the space groups 221, 225 has a conventional"),
        (dict(space_groups=(230,), num_atoms=(1, 7)), "not possible in space group 230, the smallest one there has 8"),
        (dict(formula="NaCl", space_groups=(230,), num_atoms=(2, 12)), "NaCl .* next larger one there has 16"),
        (dict(required=("Na", "Cl", "O"), space_groups=(220,)), "3 elements"),
        (dict(lengths=(4.91, 4.94)), "no number with 1 decimals"),
    ],
)  # fmt: skip
def test_what_no_crystal_can_be_is_said(constraints, message):
    with pytest.raises(UserError, match=message):
        usual().limits(Constraints(**constraints))


@pytest.mark.parametrize("decimals", [1, 5])
def test_decimals_that_do_not_do_are_refused(decimals):
    with pytest.raises(UserError, match=f"coord_decimals is {decimals}"):
        Symmetry(TextFormat(form="symmetry", coord_decimals=decimals))


def test_a_limit_that_holds_no_atom_is_refused():
    with pytest.raises(
        UserError, match=r"a crystal of one atom can take [0-9]+ tokens, but max_new_tokens is 20"
    ) as error:
        build(limit=20)
    least = int(re.search("take ([0-9]+) tokens", str(error.value))[1])
    with pytest.raises(UserError, match=f"max_new_tokens is {least - 1}"):
        build(limit=least - 1)
    assert build(limit=least).most == 1


def test_atoms_that_the_limit_holds_are_what_the_longest_text_takes():
    """A triclinic text of one element's general positions, with the widest numbers."""
    grammar = build(limit=120)
    wish = Constraints(num_atoms=(grammar.most,) * 2, space_groups=(1,), lengths=(100.0, 200.0), angles=(100.0, 110.0))
    assert max(len(crystal.orbits) for _, crystal in walked(grammar, [wish] * 16)) == grammar.most


def test_constants_are_small():
    """At a token a digit, all tables together."""
    grammar = usual()
    text = jax.jit(grammar.advance).lower(grammar.start(repeated(grammar.limits(), 2)), jnp.zeros(2, jnp.int32))
    words = sum(x.nbytes for x in vars(grammar.words).values())
    assert words < 400_000
    assert len(text.as_text()) < 4_000_000


def test_fields_of_a_state_have_a_slot_each():
    state = usual().start(repeated(usual().limits(), 3))
    assert {x.shape[0] for x in jax.tree.leaves(state)} == {3}
