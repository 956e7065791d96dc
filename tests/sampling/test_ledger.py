"""The ledger keeps every row, goes on where it stood, and refuses what is not its own."""

import csv
import dataclasses
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.ledger import ROWS_PER_GROUP, SCHEMA, Ledger, Part, Request, finished, join

REQUEST = Request(
    model="abc",
    prompts=["Below is …:\n"],
    conditions=['{"band_gap": 1.5}'],
    grammar=['{"formula": "NaCl"}'],
    guidance=None,
    methods=["Temperature(t=0.9)"],
    cache="float32",
    symprec=0.1,
    max_new_tokens=40,
    seed=3,
    num=5,
)


def attempt(index: int, status: str = "ok") -> Attempt:
    ok = status == "ok"
    log_probability = None if status == "nan_logits" else -12.3456789 - index
    formula, cif = ("ClNa", f"data_ClNa\n_cell_length_a {index}.5\n") if ok else (None, None)
    return Attempt(
        index,
        index,
        3,
        REQUEST.prompts[0],
        REQUEST.conditions[0],
        f'5.0 "5.0", 5.0\n{index}',
        status,
        log_probability,
        None if log_probability is None else -0.25,
        17,
        formula,
        cif,
        225 if ok else None,
        "data_ClNa\n" if ok and index else None,  # spglib may find no group
    )


ATTEMPTS = [
    attempt(0),
    attempt(1, "truncated"),
    attempt(2, "parse_error:element"),
    attempt(3, "nan_logits"),
    attempt(4),
]
COUNTS = {"nan_logits": 1, "ok": 2, "parse_error:element": 1, "truncated": 1}
ROWS = [dataclasses.asdict(a) for a in ATTEMPTS]


def write(out, attempts=ATTEMPTS, request=REQUEST) -> Ledger:
    ledger = Ledger(out, request)
    for a in attempts:
        ledger.append(a)
    return ledger


def test_columns_are_those_of_an_attempt():
    assert SCHEMA.names == [field.name for field in dataclasses.fields(Attempt)]


def test_parquet_holds_every_row(tmp_path):
    ledger = write(tmp_path / "new" / "s.parquet")
    ledger.finish()
    assert pq.read_table(tmp_path / "new" / "s.parquet").to_pylist() == ROWS
    assert ledger.counts == COUNTS
    assert json.loads((tmp_path / "new" / "s.parquet.json").read_text())["counts"] == COUNTS
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["s.parquet", "s.parquet.json"]


def test_parquet_is_written_in_row_groups(tmp_path):
    num = ROWS_PER_GROUP + 3
    request = dataclasses.replace(REQUEST, num=num)
    write(tmp_path / "s.parquet", map(attempt, range(num)), request).finish()
    table = pq.ParquetFile(tmp_path / "s.parquet")
    assert [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)] == [ROWS_PER_GROUP, 3]


def test_csv_holds_every_row(tmp_path):
    write(tmp_path / "s.csv").finish()
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [{key: "" if value is None else str(value) for key, value in row.items()} for row in ROWS]
    assert rows == expected


def test_a_folder_holds_a_cif_for_each_crystal_and_every_row(tmp_path):
    write(tmp_path / "cifs").finish()
    names = ["000000.cif", "000004.cif", "attempts.parquet", "symmetrized"]
    assert sorted(p.name for p in (tmp_path / "cifs").iterdir()) == names
    assert (tmp_path / "cifs" / "000004.cif").read_text() == ATTEMPTS[4].cif
    (symmetrized,) = (tmp_path / "cifs" / "symmetrized").iterdir()
    assert (symmetrized.name, symmetrized.read_text()) == ("000004.cif", ATTEMPTS[4].symmetrized_cif)
    assert pq.read_table(tmp_path / "cifs" / "attempts.parquet").to_pylist() == ROWS


@pytest.mark.parametrize("name", ["s.parquet", "s.csv", "cifs"])
@pytest.mark.parametrize("torn", ["", '{"index": 2, "seed"'])
def test_a_ledger_goes_on_after_its_last_whole_row(tmp_path, name, torn):
    (tmp_path / "whole").mkdir()
    write(tmp_path / "whole" / name).finish()
    write(tmp_path / name, ATTEMPTS[:2])
    with (tmp_path / f"{name}.journal").open("a") as journal:
        journal.write(torn)
    ledger = Ledger(tmp_path / name, REQUEST)
    assert len(ledger) == 2
    for a in ATTEMPTS[2:]:
        ledger.append(a)
    ledger.finish()
    for path in (tmp_path / "whole").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / path.relative_to(tmp_path / "whole")).read_bytes()


def test_a_finished_ledger_is_opened_as_finished(tmp_path):
    write(tmp_path / "s.parquet").finish()
    before = (tmp_path / "s.parquet").read_bytes()
    ledger = Ledger(tmp_path / "s.parquet", REQUEST)
    assert ledger.counts == COUNTS
    ledger.finish()
    assert (tmp_path / "s.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 4),
        ("model", "other"),
        ("prompts", ["Below"]),
        ("num", 6),
        ("max_new_tokens", 41),
        ("methods", []),
        ("guidance", "Guidance(w=2.0)"),
        ("cache", "int8"),
        ("symprec", 0.01),
    ],
)
@pytest.mark.parametrize("done", [True, False])
def test_another_request_is_refused_and_nothing_is_touched(tmp_path, field, value, done):
    ledger = write(tmp_path / "s.parquet")
    if done:
        ledger.finish()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=rf"s\.parquet belongs to another run: {field} was .*now it is"):
        Ledger(tmp_path / "s.parquet", dataclasses.replace(REQUEST, **{field: value}))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_file_that_is_no_ledger_is_not_overwritten(tmp_path):
    (tmp_path / "s.csv").write_text("mine")
    with pytest.raises(UserError, match=r"s\.csv exists already"):
        Ledger(tmp_path / "s.csv", REQUEST)
    (tmp_path / "t.csv.json").write_text("[1]")
    with pytest.raises(UserError, match=r"t\.csv\.json describes no samples"):
        Ledger(tmp_path / "t.csv", REQUEST)
    assert (tmp_path / "s.csv").read_text() == "mine"


def test_a_damaged_journal_is_named_with_its_line(tmp_path):
    write(tmp_path / "s.csv", ATTEMPTS[:3])
    journal = tmp_path / "s.csv.journal"
    journal.write_text(journal.read_text().replace('{"index": 1', '{"index": 7'))
    with pytest.raises(UserError, match=r"s\.csv\.journal, line 2 is damaged"):
        Ledger(tmp_path / "s.csv", REQUEST)


def test_a_place_that_cannot_be_written_and_a_form_that_is_unknown(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/s\.csv: "):
        Ledger(tmp_path / "file" / "s.csv", REQUEST)
    with pytest.raises(UserError, match=r"s\.xlsx: give a name that ends in"):
        Ledger(tmp_path / "s.xlsx", REQUEST)


def test_rows_come_in_order(tmp_path):
    with pytest.raises(ValueError, match="next row is 0, not 1"):
        Ledger(tmp_path / "s.csv", REQUEST).append(attempt(1))


def test_a_long_setting_is_told_in_short(tmp_path):
    write(tmp_path / "s.csv")
    with pytest.raises(UserError, match=r"prompts was .*, now it is .*…") as told:
        Ledger(tmp_path / "s.csv", dataclasses.replace(REQUEST, prompts=[str(i) for i in range(10_000)]))
    assert len(str(told.value)) < 1000


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_parts_are_all_rows_each_once(total, of):
    parts = [Part(number, of).rows(total) for number in range(of)]
    assert [row for rows in parts for row in rows] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def write_part(out, part: Part, request=REQUEST) -> Ledger:
    ledger = Ledger(out, request, part)
    for index in ledger.rows:
        ledger.append(ATTEMPTS[index])
    assert ledger.complete
    ledger.finish()
    return ledger


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["s.parquet", "s.csv", "cifs"])
@pytest.mark.parametrize("of", [2, 3, 7])
def test_parts_are_joined_to_what_one_process_would_have_written(tmp_path, name, of):
    write(tmp_path / "one" / name).finish()
    for number in reversed(range(of)):
        write_part(tmp_path / "many" / name, Part(number, of))
    assert finished(tmp_path / "many" / name, REQUEST) is None
    assert join(tmp_path / "many" / name, REQUEST) == finished(tmp_path / "many" / name, REQUEST) == COUNTS
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert join(tmp_path / "many" / name, REQUEST) is None


def test_a_part_goes_on_where_it_stood(tmp_path):
    ledger = Ledger(tmp_path / "s.csv", REQUEST, Part(1, 2))
    assert list(ledger.rows) == [2, 3, 4]
    ledger.append(ATTEMPTS[2])
    again = Ledger(tmp_path / "s.csv", REQUEST, Part(1, 2))
    assert len(again) == 1 and not again.complete
    with pytest.raises(ValueError, match="next row is 3, not 2"):
        again.append(ATTEMPTS[2])


def test_parts_of_an_unfinished_run_are_named_and_left(tmp_path):
    write_part(tmp_path / "s.parquet", Part(0, 3))
    Ledger(tmp_path / "s.parquet", REQUEST, Part(1, 3))  # has begun
    before = contents(tmp_path)
    missing = r"run of 3 processes that is not done: s-00001-of-00003\.parquet, s-00002-of-00003\.parquet; go on"
    with pytest.raises(UserError, match=missing):
        join(tmp_path / "s.parquet", REQUEST)
    for part in (Part(), Part(0, 2)):
        with pytest.raises(UserError, match=f"is a part of a run on 3 processes, this one is on {part.of}; go on"):
            Ledger(tmp_path / "s.parquet", REQUEST, part)
    assert contents(tmp_path) == before


def test_a_part_of_another_run_is_refused(tmp_path):
    write_part(tmp_path / "s.parquet", Part(0, 2))
    other = dataclasses.replace(REQUEST, seed=4)
    write_part(tmp_path / "elsewhere" / "s.parquet", Part(1, 2), other)
    for name in ("s-00001-of-00002.parquet", "s-00001-of-00002.parquet.json"):
        (tmp_path / "elsewhere" / name).rename(tmp_path / name)
    with pytest.raises(UserError, match=r"s-00001-of-00002\.parquet belongs to another run: seed was 4, now it is 3"):
        join(tmp_path / "s.parquet", REQUEST)
    with pytest.raises(UserError, match="model was 'abc', now it is 'other'"):
        Ledger(tmp_path / "s.parquet", dataclasses.replace(REQUEST, model="other"), Part(0, 2))


def test_a_join_that_was_killed_while_it_removed_the_parts_is_ended(tmp_path):
    for number in range(3):
        write_part(tmp_path / "s.csv", Part(number, 3))
    parts = contents(tmp_path)
    join(tmp_path / "s.csv", REQUEST)
    whole = contents(tmp_path)
    for name in ("s-00001-of-00003.csv.json", "s-00002-of-00003.csv", "s-00002-of-00003.csv.json"):
        (tmp_path / name).write_bytes(parts[name])
    assert join(tmp_path / "s.csv", REQUEST) == COUNTS
    assert contents(tmp_path) == whole


def test_a_ledger_whose_draws_had_other_keys_is_done_or_refused(tmp_path):
    out = tmp_path / "s.parquet"
    header = tmp_path / "s.parquet.json"

    def age() -> None:
        written = json.loads(header.read_text())
        del written["request"]["draws"]
        header.write_text(json.dumps(written))

    ledger = Ledger(out, REQUEST)
    ledger.append(attempt(0))
    age()
    with pytest.raises(UserError, match="belongs to another run: draws was None"):
        Ledger(out, REQUEST)
    for index in range(1, 5):
        ledger.append(attempt(index))
    ledger.finish()
    age()
    assert finished(out, REQUEST) == {"ok": 5}
