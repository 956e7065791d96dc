"""Rows of a source that are used, and those that are not: every row is in exactly one of the counts."""

from dataclasses import replace
from pathlib import Path

import pytest

from jaxcrystal.crystals.crystal import Crystal
from jaxcrystal.errors import UserError
from jaxcrystal.reader.inputs import count, require_crystals
from jaxcrystal.reader.rows import Row, Rows

SALT = Crystal([3.99] * 3, [60] * 3, [11, 17], [[0, 0, 0], [0.5, 0.5, 0.5]])


def source(*outcomes):
    """A set whose rows have these outcomes, each with its reason, or are crystals with these notes."""
    samples = []
    for row, (outcome, *words) in enumerate(outcomes):
        good = outcome == "ok"
        notes, reason = (tuple(words), "") if good else ((), words[0])
        samples.append(Row(str(row), row, outcome, reason, SALT if good else None, "", {}, notes))
    return Rows(Path("some/train.csv"), "ab" * 32, tuple(samples))


def test_every_row_is_used_or_left_out_with_its_reason():
    found = source(
        ("ok", "D is read as H"),
        ("ok", "D is read as H", "wrapped"),
        ("ok",),
        ("cif_error", "no cell"),
        ("unknown_element", "'Nq' is no element"),
        ("unknown_element", "'Xx' is no element"),
        ("unknown_element", "'Nq' is no element"),
    )
    counted = count(found, {2})
    assert (counted.file, counted.sha256, counted.rows, counted.used) == ("train.csv", "ab" * 32, 7, 2)
    assert counted.left_out == {"cif_error": 1, "no_sample": 1, "unknown_element": 3}
    assert counted.notes == {"D is read as H": 2, "wrapped": 1}
    words = "3 unknown_element (for example: 'Nq' is no element), 1 cif_error (no cell), "
    words += "1 no_sample (no sample predicts it)"
    assert counted.words == words
    assert counted.sentence == f"2 of 7 rows of train.csv are used; left out: {words}"
    assert count(replace(found, path=Path("a\udcff.csv"))).file == "a\ufffd.csv"
    whole = count(source(("ok",)))
    assert whole.sentence == "1 of 1 rows of train.csv are used" and not whole.left_out and not whole.reasons


def test_less_than_half_is_a_warning_and_nothing_an_error(capsys):
    good, bad = ("ok",), ("cif_error", "no cell")
    assert require_crystals("training set", source(good, bad)).used == 1
    assert capsys.readouterr().err == ""
    assert require_crystals("training set", source(good, bad, bad)).left_out == {"cif_error": 2}
    expected = "warning: 2 of 3 rows of the training set some/train.csv cannot be used: 2 cif_error (no cell)\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(
        UserError, match=r"some/train.csv cannot be the reference: none of its 2 rows can .*\(no cell\)"
    ):
        require_crystals("reference", source(bad, bad))
