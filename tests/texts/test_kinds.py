"""What a group can hold, against counting with its own positions."""

import dataclasses
import itertools

import numpy as np
import pytest
from symmetric_crystals import counted, positions

from jaxcrystal.crystals.wyckoff import GROUPS
from jaxcrystal.texts.symmetry.kinds import MOST_ATOMS, KindTables, kind_of, kinds, most_orbits


def of_every_sort() -> list[int]:
    """A group of each multiset of positions without free coordinates and set of the others' atoms."""
    sorts = {}
    for number in GROUPS:
        listed = positions(number)
        sort = (tuple(sorted(n for n, reusable in listed if not reusable)), frozenset(n for n, r in listed if r))
        sorts.setdefault(sort, number)
    return sorted(sorts.values())


def test_there_are_42():
    assert len(kinds()) == 42 and max(len(kind.taken) for kind in kinds()) == 24
    assert kinds()[0] == kind_of(1) and kinds()[0].often == (1,)
    assert kind_of(225).once == ((1, 2), (2, 1)) and kind_of(225).often == (6, 8)


def test_tables_are_small():
    tables = KindTables.build()
    assert sum(getattr(tables, field.name).nbytes for field in dataclasses.fields(tables)) < 400_000


def test_what_a_group_holds_is_what_can_be_counted():
    """Up to three elements, in a group of every sort."""
    pairs = itertools.product(range(1, 7), repeat=2)
    triples = itertools.product(range(1, 4), repeat=3)
    wide = [(16,), (17,), (24,), (7, 8), (12, 5), (13, 1), (8, 1, 6)]
    compositions = [*((n,) for n in range(1, 13)), *pairs, *triples, *wide]
    for number in of_every_sort():
        kind = kind_of(number)
        for counts in compositions:
            assert kind.holds(counts) == (counted(number, counts, frozenset()) >= 0), (number, counts)
        counted.cache_clear()


@pytest.mark.parametrize("number", [1, 2, 69, 99, 192, 199, 208, 221, 223, 225, 227, 230])
def test_most_orbits(number):
    found = most_orbits(kind_of(number), MOST_ATOMS)
    assert [counted(number, (n,), frozenset()) for n in range(1, 13)] == found[1:13].tolist()


def test_states_of_a_kind_are_those_of_its_groups():
    """A position that lies there once makes the state grow by what stands in the table, and never too far."""
    tables = KindTables.build()
    for number in GROUPS:
        kind = kind_of(number)
        strides = tables.stride[number]
        once = [letter for letter, (_, reusable) in enumerate(positions(number)) if not reusable]
        assert strides[[k for k in range(27) if k not in once]].sum() == 0
        assert strides.sum() == len(kind.taken) - 1
        assert [n for n, _ in positions(number)] == tables.atoms[number][tables.atoms[number] > 0].tolist()
        taken = dict(kind.once)
        for atoms, stride in zip([n for n, _ in kind.once], kind.strides, strict=True):
            of_size = [k for k in once if positions(number)[k][0] == atoms]
            assert len(of_size) == taken[atoms] and (strides[of_size] == stride).all()


def test_placed_are_the_states_that_a_number_of_atoms_leads_to():
    tables = KindTables.build()
    for i, kind in enumerate(kinds()):
        states = len(kind.taken)
        leads = (tables.placed[:, :states, i, None] >> np.arange(states, dtype=np.uint32)) & 1
        assert (leads[0] == np.eye(states)).all() and not tables.placed[:, states:, i].any()
        for first, second in [(1, 2), (3, 5), (6, 6)]:
            now = (np.eye(states)[0] @ leads[first] > 0) @ leads[second] > 0
            assert now.any() == kind.holds([first, second])
