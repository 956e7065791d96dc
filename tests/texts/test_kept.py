"""What is kept of a crystal: the texts that the grammars let through are those that repeat it, and no others."""

import itertools
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure
from symmetric_crystals import random_symmetric
from symmetry_texts import Tables
from text_trees import Tree

from jaxcrystal.config import TextFormat
from jaxcrystal.crystals.crystal import ATOMIC_NUMBER, Crystal
from jaxcrystal.crystals.formulas import ordered
from jaxcrystal.crystals.prototypes import embedded
from jaxcrystal.crystals.symmetric import Orbit, SymmetricCrystal
from jaxcrystal.crystals.symmetry import orbits_of_atoms
from jaxcrystal.crystals.wyckoff import group
from jaxcrystal.errors import UserError
from jaxcrystal.texts.constraints import Constraints
from jaxcrystal.texts.forms import form_of
from jaxcrystal.texts.kept import Kept, Site
from jaxcrystal.texts.p1 import tables as p1_tables
from jaxcrystal.texts.p1.grammar import Grammar as P1Grammar
from jaxcrystal.texts.parsing import ParseError
from jaxcrystal.texts.symmetry.grammar import COORDINATE, PARAMETER, SYMBOL, Grammar
from jaxcrystal.texts.symmetry.text import parse
from jaxcrystal.texts.tokenizer import load_tokenizer

TABLES = Tables.build()
COMPACT = load_tokenizer("compact")
BY_SYMMETRY = form_of(TextFormat(form="symmetry"))


@cache
def usual() -> Grammar:
    return Grammar.build(TABLES, TextFormat(), 300)


@cache
def tree() -> Tree:
    return Tree(usual())


@cache
def p1_tree() -> Tree:
    """Of texts with one decimal."""
    return Tree(P1Grammar.build(p1_tables.build(COMPACT), TextFormat(coord_decimals=1), 120))


def text_of(letters) -> str:
    return "".join(TABLES.pieces[token] for token in usual().tokens[list(letters)])


def never(field) -> np.ndarray:
    return field < 0


def places(number: int) -> dict[str, tuple[int, bool]]:
    """Atoms of an orbit in the primitive cell, and whether several may lie there."""
    here = group(number)
    return {p.letter: (p.multiplicity // here.centring, p.reusable) for p in here.positions}


def fits(number: int, counts: tuple[int, ...], once: frozenset[str]) -> bool:
    """Whether orbits of so many atoms of each element find room beside the letters that are taken."""
    if not counts:
        return True
    if counts[0] <= 0:
        return counts[0] == 0 and fits(number, counts[1:], once)
    return any(
        fits(number, (counts[0] - atoms, *counts[1:]), once if reusable else once | {letter})
        for letter, (atoms, reusable) in places(number).items()
        if atoms <= counts[0] and letter not in once
    )


@st.composite
def kept_in_a_group(draw, symbols) -> tuple[int, tuple[Site, ...]]:
    """One or two orbits that leave room in a small cell."""
    number = draw(st.sampled_from([1, 2, 12, 47, 99, 123, 166, 187, 194, 200, 221, 225, 229]))
    once, sites = set(), []
    for _ in range(draw(st.integers(1, 2))):
        small = [letter for letter, (n, many) in places(number).items() if n <= 4 and (many or letter not in once)]
        letter = draw(st.sampled_from(small))
        once.add(letter)
        coords = (0.13, 0.29, 0.41 + 0.05 * len(sites))
        point = group(number).position(letter).representative(np.array(coords))
        sites.append(Site(draw(st.sampled_from(symbols)), tuple(point.tolist()), letter))
    return number, tuple(sites)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_compositions_hold_what_is_kept_and_what_fits_beside_it(data):
    """All that the grammar lets through, against all that can be counted."""
    symbols = ordered(data.draw(st.sets(st.sampled_from(["Li", "O", "Ti", "Sr", "Cl"]), min_size=2, max_size=3)))
    number, sites = data.draw(kept_in_a_group(symbols))
    required = data.draw(st.sets(st.sampled_from(symbols), max_size=1))
    low = data.draw(st.integers(1, 6))
    high = data.draw(st.integers(max(low, len({site.symbol for site in sites} | required)), 9))
    there = [sum(places(number)[site.letter][0] for site in sites if site.symbol == symbol) for symbol in symbols]
    once = frozenset(site.letter for site in sites if not places(number)[site.letter][1])
    wanted = set()
    for counts in itertools.product(range(high + 1), repeat=len(symbols)):
        present = {symbol: n for symbol, n in zip(symbols, counts, strict=True) if n}
        left = tuple(n - kept for n, kept in zip(counts, there, strict=True))
        if low <= sum(counts) <= high and required <= set(present) and min(left) >= 0 and fits(number, left, once):
            wanted.add(" ".join(f"{symbol} {n}" for symbol, n in present.items()))
    wish = Constraints(
        allowed=tuple(symbols),
        required=tuple(required),
        num_atoms=(low, high),
        space_groups=(number,),
        kept=Kept(sites),
    )
    if not wanted:
        with pytest.raises(UserError, match="does not fit around"):
            usual().limits(wish)
        return
    found = tree().explore(usual().limits(wish), lambda field: field == SYMBOL, never)
    assert {tuple(text_of(letters).split("\n")[:2]) for letters in found} == {(line, str(number)) for line in wanted}


CASES = [
    (221, {"Sr": 1, "Ti": 1, "O": 3}, ["Ti b", "O c"]),
    (221, {"Sr": 3, "Ti": 2, "O": 3}, ["Ti b", "Ti a", "O d"]),
    (225, {"K": 2, "Na": 1, "Al": 1, "F": 6}, ["Na b", "F e"]),
    (2, {"Li": 1, "Na": 1, "O": 4}, ["O a", "O i"]),
    (166, {"Bi": 2, "Te": 3}, ["Te a"]),
    (139, {"Ba": 1, "Fe": 2, "As": 2}, ["As e"]),
    (99, {"Pb": 1, "Ti": 1, "O": 3}, ["Ti b", "O c"]),
]


@pytest.mark.parametrize("number, composition, kept", CASES, ids=str)
def test_kept_orbits_come_first_of_their_element_and_others_around_them(number, composition, kept):
    """All sequences of positions, against all that there are."""
    counts = {symbol: composition[symbol] for symbol in ordered(composition)}
    given = {symbol: [word.split(" ")[1] for word in kept if word.split(" ")[0] == symbol] for symbol in counts}
    points = group(number)
    sites = tuple(
        Site(*word.split(" ")[:1], tuple(points.position(word[-1]).representative(np.array([0.1, 0.2, 0.3]))), word[-1])
        for word in kept
    )

    def sequences(elements, left: int, once: frozenset[str]):
        if left == 0:
            if not elements:
                yield ()
                return
            symbol, *others = elements
            head = tuple(given[symbol])
            rest = counts[symbol] - sum(places(number)[letter][0] for letter in head)
            for tail in sequences(others, rest, once) if rest == 0 else within(others, rest, once):
                yield (*head, *tail)
        else:
            yield from within(elements, left, once)

    def within(elements, left, once):
        for letter, (atoms, reusable) in places(number).items():
            if atoms <= left and letter not in once:
                taken = once if reusable else once | {letter}
                for rest in sequences(elements, left - atoms, taken):
                    yield (letter, *rest)

    start = frozenset(site.letter for site in sites if not places(number)[site.letter][1])
    wanted = set(sequences(list(counts), 0, start))
    assert wanted
    formula, total = "".join(f"{symbol}{n}" for symbol, n in counts.items()), sum(counts.values())
    wish = Constraints(formula=formula, num_atoms=(total, total), space_groups=(number,), kept=Kept(sites))
    found = tree().explore(usual().limits(wish), lambda field: field >= PARAMETER, lambda field: field == COORDINATE)
    lines = [text_of(letters).split("\n")[2:-1] for letters in found]
    assert {tuple(line.split(" ")[1] for line in text) for text in lines} == wanted and len(found) == len(wanted)


def test_free_orbits_meet_no_kept_one_be_it_written_later():
    """All texts with all coordinates, against all that the parser reads."""
    kept = Kept((Site("O", (0.25, 0.0, 0.0), "e"),), (4.0, 4.0, 4.0, 90.0, 90.0, 90.0))
    wish = Constraints(formula="NaO", num_atoms=(12, 12), space_groups=(221,), kept=kept)
    found = {text_of(path[:-1]) for path in tree().explore(usual().limits(wish), never, never)}
    positions = [p for p in group(221).positions if p.multiplicity <= 6]
    alone = [f"Na {p.letter}" for p in positions if not p.reusable]
    orbits = [*itertools.chain(*(itertools.permutations(alone, n) for n in range(1, len(alone) + 1)))]
    orbits += [(f"Na {p.letter} {x:02}",) for p in positions if p.reusable for x in range(100)]
    wanted = {"\n".join(["Na 6 O 6", "221", *those, "O e 25", "4.0"]) for those in orbits}
    readable = set()
    for text in wanted:
        try:
            parse(text)
        except ParseError:
            continue
        readable.add(text)
    assert found == readable and len(found) > 100
    assert not any("Na e 25" in text or "Na e 75" in text for text in found)


def test_p1_texts_are_all_that_repeat_the_kept_part():
    """A kept cell and site, and at most one atom more: against every text there is."""
    kept = Kept((Site("Na", (0.04, 0.26, 0.999)),), (4.0, 5.04, 61.0, 119.6, 70.2, 101.0))
    wish = Constraints(allowed=("Na", "Cl"), num_atoms=(1, 2), kept=kept)
    grammar = p1_tree().grammar
    paths = p1_tree().explore(grammar.limits(wish), never, never)
    found = [COMPACT.decode(grammar.tokens[list(path[:-1])]) for path in paths]
    first = "4.0 5.0 61.0\n120 70 101\nNa\n0.0 0.3 0.0"
    digits = [f"0.{x}" for x in range(10)]
    others = itertools.product(["Na", "Cl"], digits, digits, digits)
    assert len(found) == 2001
    assert set(found) == {first} | {f"{first}\n{symbol}\n{x} {y} {z}" for symbol, x, y, z in others}
    needed = Constraints(required=("Cl",), allowed=("Na", "Cl"), num_atoms=(1, 2), kept=kept)
    found = p1_tree().explore(grammar.limits(needed), never, never)
    assert len(found) == 1000  # chlorine alone may follow, and must


@pytest.mark.parametrize("form", ["p1", "symmetry"])
@pytest.mark.parametrize("angles", [(60, 60, 119), (119, 60, 60), (130, 60, 90), (100, 120, 130)], ids=str)
def test_a_kept_cell_of_any_angles_is_written(form, angles):
    """α and β leave what γ needs, where all three are given."""
    own, groups = (p1_tree(), None) if form == "p1" else (tree(), (1,))
    kept = Kept((), (4.0, 5.0, 6.0, *angles))
    wish = Constraints(formula="H", num_atoms=(1, 1), space_groups=groups, kept=kept)
    (path,) = own.explore(own.grammar.limits(wish), never, lambda field: field >= 0)
    text = COMPACT.decode(own.grammar.tokens[list(path[:-1])]) if form == "p1" else text_of(path[:-1])
    crystal = form_of(TextFormat(form=form)).parse(text)
    assert (*crystal.lengths, *np.round(crystal.angles, 6)) == kept.cell


def test_nothing_kept_changes_nothing():
    for grammar in (usual(), p1_tree().grammar):
        plain, empty = grammar.limits(), grammar.limits(Constraints(kept=Kept()))
        jax.tree.map(np.testing.assert_array_equal, plain, empty)


@pytest.mark.parametrize("number", [1, 2, 5, 31, 99, 122, 148, 161, 187, 194, 198, 216, 227])
def test_atoms_are_found_on_their_orbits(number):
    """In a cell that was shifted and shuffled: each on an orbit of its element, as many as the orbit has."""
    random = np.random.default_rng(number)
    crystal = random_symmetric(number, 1).to_crystal(niggli=True)
    order = random.permutation(len(crystal))
    moved = Crystal(
        crystal.lengths, crystal.angles, crystal.species[order], crystal.frac_coords[order] + random.random(3)
    )
    whole, orbit_of = orbits_of_atoms(moved, 1e-3)
    for i, orbit in enumerate(whole.orbits):
        atoms = np.flatnonzero(orbit_of == i)
        assert len(atoms) * len(SymmetricCrystal.to_crystal(whole)) == whole.group.atoms(orbit.letter) * len(moved)
        assert (moved.species[atoms] == orbit.species).all()


def test_kept_sites_are_where_they_were():
    """Kept sites alone, in the kept cell, against the given atoms alone: pymatgen finds the same structure."""
    matcher = StructureMatcher(ltol=1e-3, stol=1e-3, angle_tol=0.1, primitive_cell=False, scale=False)
    compared = 0
    for entry in embedded()[::307]:
        crystal = entry.crystal
        whole, orbit_of = orbits_of_atoms(crystal, 1e-3)
        chosen = int(orbit_of[-1])
        keeping = BY_SYMMETRY.keeping(crystal, (len(crystal) - 1,), True, False, 1e-3)
        (site,), cell = keeping.kept.sites, np.array(keeping.kept.cell)
        alone = SymmetricCrystal(
            keeping.space_groups[0],
            cell[:3],
            cell[3:],
            (Orbit(ATOMIC_NUMBER[site.symbol], site.letter, site.frac_coords),),
        )
        given = crystal.to_structure()
        kept = Structure.from_sites([given[int(i)] for i in np.flatnonzero(orbit_of == chosen)])
        ours = alone.to_crystal().to_structure()
        copies = len(crystal) // sum(whole.composition.values())
        assert len(kept) == copies * len(ours)
        if copies == 1:
            assert matcher.fit(kept, ours), entry
            compared += 1
    assert compared > 5


@pytest.mark.parametrize(
    "wish, message",
    [
        (dict(kept=Kept((Site("Na", (0, 0, 0)),)), forbidden=("Na",)), "Na is kept, but it is forbidden"),
        (dict(kept=Kept((Site("Na", (0, 0, 0)),)), formula="LiF"), "Na is kept, but LiF has none"),
        (dict(kept=Kept((Site("Na", (0, 0, 0)),) * 5), num_atoms=(1, 4)), "with the 5 sites .* at most 4"),
        (dict(kept=Kept((Site("Na", (0, 0, 0)),) * 7)), "7 atoms can take .* max_new_tokens is 120"),
        (dict(kept=Kept((Site("Na", (0, 0, 0)),) * 99)), "99 sites are kept, but max_new_tokens is 120"),
        (dict(kept=Kept((), (4, 5, 6, 90, 90, 90)), lengths=(5.0, 9.0)), "its a is 4, not within 5 and 9"),
        (dict(kept=Kept((), (4, 5, 6, 60.4, 60.4, 120.6))), "the cell cannot be kept"),
    ],
)  # fmt: skip
def test_what_p1_texts_cannot_keep_is_said(wish, message):
    with pytest.raises(UserError, match=message):
        p1_tree().grammar.limits(Constraints(**wish))


@pytest.mark.parametrize(
    "wish, message",
    [
        (dict(kept=Kept((Site("Na", (0, 0, 0), "a"),))), "kept sites imply their space group"),
        (dict(kept=Kept((Site("Na", (0.001, 0, 0), "e"),)), space_groups=(221,)), "with 2 decimals .* no crystal"),
        (dict(kept=Kept((Site("Na", (0.1, 0.2, 0.3), "n"),)), space_groups=(221,)), "max_new_tokens is 300"),
        (dict(kept=Kept((Site("Na", (0, 0, 0), "a"),)), space_groups=(221,), num_atoms=(2, 2), required=("O", "F")),
         "does not fit around the 1 that are kept in space group 221"),
        (dict(kept=Kept((), (4, 4, 6, 90, 90, 90))), "kept with its crystal system"),
        (dict(kept=Kept((), (4, 4, 4, 90, 90, 90)), space_groups=(221,), lengths=(5.0, 9.0)), "not within 5 and 9"),
        (dict(kept=Kept((), (4, 5, 6, 60.04, 60.04, 120.06)), space_groups=(1,)), "does not close"),
    ],
)  # fmt: skip
def test_what_texts_by_symmetry_cannot_keep_is_said(wish, message):
    with pytest.raises(UserError, match=message):
        usual().limits(Constraints(**wish))


def test_what_is_put_back_may_meet_what_was_written():
    """A free orbit where the kept one lies exactly, though not as it is written: no crystal, and said so."""
    kept = Kept((Site("O", (0.254, 0.0, 0.0), "e"),))
    text = "Na 6 O 6\n221\nNa e 254\nO e 25\n4.0"
    assert len(BY_SYMMETRY.parse(text)) == 12
    with pytest.raises(ParseError, match="on the same points"):
        replace(BY_SYMMETRY, kept=kept).parse(text)
