"""Texts are judged in other processes, in order; a crystal that hangs or kills moyo costs its space group alone."""

import gc
import os
import sys
import time
from pathlib import Path

import pytest

from jaxcrystal.config import TextFormat
from jaxcrystal.sampling.attempt import judge
from jaxcrystal.sampling.judging import Judgement, Judges, judgement
from jaxcrystal.texts.forms import form_of

P1 = form_of(TextFormat())

SALT = "5.6 5.6 5.6\n90 90 90\nNa\n0.00 0.00 0.00\nCl\n0.50 0.50 0.50"
TEXTS = [SALT, None, SALT.replace("Na", "K"), "no crystal", SALT.replace("Na", "Li"), SALT.replace("0.50", "0.25")]

#: As models without training write them; each kept moyo longer than anybody waited, at one tolerance or the next.
THIN = [
    "53.2 175.4 0.8\n47 69 39\nAt\n0.36 0.63 0.15",
    "251.0 0.8 65.8\n63 58 34\nNb\n0.66 0.33 0.34\nPa\n0.03 0.18 0.09",
    "0.9 158.3 0.8\n51 27 61\nP\n0.43 0.69 0.29\nCu\n0.11 0.86 0.99",
    "1.9 28.9 86.9\n57 76 67\nHs\n0.18 0.95 0.39\nAm\n0.90 0.83 0.60\nSi\n0.94 0.04 0.00\nF\n0.64 0.66 0.94",
    "2.2 2.0 0.5\n107.6 126.7 73.2\nNd\n0.10 0.20 0.30",
    "40.0 1.0 40.0\n90 90 90\nNd\n0.10 0.20 0.30",
]

#: Of moyo, what symmetrize calls first; it is found by worker processes only, for here moyo is imported already.
MOYO = """
import os, time
def minkowski_reduce(basis): return basis, None
def Cell(basis, positions, numbers): return numbers
class Setting: standard = staticmethod(lambda: None)
def MoyoDataset(numbers, symprec, setting):
    if 19 in numbers: os._exit(1)
    if 3 in numbers: time.sleep({seconds})
    raise ValueError
"""


@pytest.fixture
def judges():
    found = Judges(P1, timeout=60)
    yield found
    found.close()


def test_judgements_are_those_of_one_process_in_order(judges):
    found = list(judges.judged(enumerate(TEXTS), 0.1))
    assert found == [(i, None if text is None else judgement(text, P1, 0.1)) for i, text in enumerate(TEXTS)]
    assert [each and each.space_group for _, each in found] == [221, None, 221, None, 221, 160]
    assert found[0][1].symmetrized_cif.startswith("# refined by moyo") and found[3][1].status == "parse_error:lengths"
    assert [each.space_group for _, each in judges.judged([(0, SALT)], 0.1)] == [221]  # the same processes again


def test_what_is_more_symmetric_than_it_says_keeps_what_was_found():
    """One atom a cell: whatever F-43m says of it, it is Fm-3m."""
    form = form_of(TextFormat(form="symmetry"))
    for stated, exact in ((225, True), (216, False)):
        found = judgement(f"Ni 1\n{stated}\nNi a\n3.52", form, 0.1)
        assert (found.status, found.written_group, found.space_group) == ("ok", stated, 225)
        asked = found.exact()
        assert (asked == found) == exact and (asked.status, asked.cif is None) != ("ok", True)
        assert (asked.formula, asked.written_group, asked.space_group) == ("Ni", stated, 225)
    assert (asked.status, asked.cif, asked.symmetrized_cif) == ("higher_symmetry", None, None)


@pytest.mark.parametrize("symprec", [0.2, 0.1, 0.01])
def test_thin_cells_have_a_group_soon(judges, symprec):
    found = [each for _, each in judges.judged(enumerate(THIN), symprec)]
    assert [each.symmetry_failure for each in found] == [None] * len(THIN) and all(each.space_group for each in found)


def test_a_hang_and_a_crash_cost_a_space_group_and_no_row(monkeypatch, tmp_path):
    (tmp_path / "moyopy.py").write_text(MOYO.format(seconds=600))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sys.modules["moyopy"].__version__  # ours is another
    judges = Judges(P1, timeout=0.5)
    try:
        found = [each for _, each in judges.judged(enumerate(TEXTS), 0.1)]
    finally:
        judges.close()
    assert [each and each.symmetry_failure for each in found] == [None, None, "crashed", None, "timeout", None]
    for text, each in zip(TEXTS, found, strict=True):
        if text is not None and judge(text, P1)[1] is not None:
            assert each.status == "ok" and each.cif == judge(text, P1)[1].to_cif() and each.space_group is None


def test_the_next_draws_come_while_texts_are_judged(monkeypatch, tmp_path):
    (tmp_path / "moyopy.py").write_text(MOYO.format(seconds=0.03))
    monkeypatch.syspath_prepend(str(tmp_path))
    taken = []

    def draws():
        for i in range(3):
            taken.append(time.monotonic())
            yield i, SALT.replace("Na", "Li")

    judges = Judges(P1)
    found = []
    for i, each in judges.judged(draws(), 0.1):
        found.append((i, each.status, len(taken)))
    judges.close()
    assert found == [(0, "ok", 3), (1, "ok", 3), (2, "ok", 3)]


def test_what_is_abandoned_does_not_hold_the_processes(judges):
    waiting = judges.judged(((i, SALT) for i in range(10_000)), 0.1)
    assert next(waiting)[0] == 0
    waiting.close()
    assert list(judges.judged([(7, "")], 0.1)) == [(7, Judgement("parse_error:empty"))]


def children() -> set[str]:
    """Processes that this one has started and that live."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(stat.parent.name)
    return found


def test_the_processes_end_with_their_owner():
    judges = Judges(P1)
    before = children()
    assert len(list(judges.judged([(0, SALT), (1, SALT)], 0.1))) == 2
    ours = children() - before
    assert ours
    del judges
    gc.collect()
    assert not ours & children()
