"""The ledger keeps every row, goes on where it stood, and refuses what is not its own."""

import csv
import dataclasses
import json

import pyarrow.parquet as pq
import pytest

from jaxcrystal.errors import UserError
from jaxcrystal.sample.attempt import Attempt
from jaxcrystal.sample.ledger import ROWS_PER_GROUP, SCHEMA, Ledger, Request

REQUEST = Request("abc", "Below is …:\n", '{"band_gap": 1.5}', '{"formula": "NaCl"}', ["Temperature(t=0.9)"], 40, 3, 5)


def attempt(index: int, status: str = "ok") -> Attempt:
    ok = status == "ok"
    log_probability = None if status == "nan_logits" else -12.3456789 - index
    formula, cif = ("ClNa", f"data_ClNa\n_cell_length_a {index}.5\n") if ok else (None, None)
    return Attempt(
        index,
        3,
        REQUEST.prompt,
        REQUEST.conditions,
        f'5.0 "5.0", 5.0\n{index}',
        status,
        log_probability,
        None if log_probability is None else -0.25,
        17,
        formula,
        cif,
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
    assert sorted(p.name for p in (tmp_path / "cifs").iterdir()) == ["000000.cif", "000004.cif", "attempts.parquet"]
    assert (tmp_path / "cifs" / "000004.cif").read_text() == ATTEMPTS[4].cif
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
    [("seed", 4), ("model", "other"), ("prompt", "Below"), ("num", 6), ("max_new_tokens", 41), ("methods", [])],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_request_is_refused_and_nothing_is_touched(tmp_path, field, value, finished):
    ledger = write(tmp_path / "s.parquet")
    if finished:
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
