"""The ledger keeps every row, goes on where it stood, and refuses what is not its own."""

import csv
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import full_disk  # noqa: F401  (a fixture)

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import Attempt
from jaxcrystal.sampling.attempts_table import ROWS_PER_GROUP, SCHEMA, read_table
from jaxcrystal.sampling.ledger import Ledger, Part, Request, effective_number, finished, join, yardstick_of
from jaxcrystal.yardstick import Yardstick

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
        ("num", 4),
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


NAMES = ["s.parquet", "s.csv", "cifs"]


def table(out: Path) -> Path:
    return out if out.suffix else out / "attempts.parquet"


def truncate(out: Path) -> None:
    os.truncate(table(out), table(out).stat().st_size // 2)


def exchange(out: Path) -> None:
    """The table of another run, whole in itself."""
    other = out.parent / "other" / out.name
    write(other, [attempt(i, "truncated") for i in range(5)]).finish()
    table(other).replace(table(out))
    shutil.rmtree(other.parent)


def flip(out: Path) -> None:
    content = bytearray(table(out).read_bytes())
    content[len(content) // 2] ^= 1
    table(out).write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [truncate, exchange, flip])
def test_a_damaged_table_is_not_finished(tmp_path, name, damage):
    write(tmp_path / name).finish()
    assert finished(tmp_path / name, REQUEST) == COUNTS
    damage(tmp_path / name)
    before = contents(tmp_path)
    wrong = rf"{name} is not what was written there: its checksum is another; put a copy of it back, or remove it and"
    for use in (finished, Ledger):
        with pytest.raises(UserError, match=wrong):
            use(tmp_path / name, REQUEST)
    assert contents(tmp_path) == before
    shutil.rmtree(tmp_path / name) if name == "cifs" else (tmp_path / name).unlink()  # the remedy that the line names
    (tmp_path / f"{name}.json").unlink()
    write(tmp_path / name).finish()
    assert finished(tmp_path / name, REQUEST) == COUNTS


@pytest.mark.parametrize("lost", ["attempts.parquet", "000004.cif"])
def test_a_folder_that_lacks_a_file_is_not_finished(tmp_path, lost):
    write(tmp_path / "cifs").finish()
    (tmp_path / "cifs" / lost).unlink()
    for use in (finished, Ledger):
        with pytest.raises(UserError, match=r"cifs is not what was written there: .*; put a copy of it back") as error:
            use(tmp_path / "cifs", REQUEST)
    assert "\n" not in str(error.value) and (lost in str(error.value) or lost == "000004.cif")


def test_a_header_of_an_older_version_has_no_checksum(tmp_path):
    write(tmp_path / "s.parquet").finish()
    header = tmp_path / "s.parquet.json"
    header.write_text(json.dumps({k: v for k, v in json.loads(header.read_text()).items() if k != "checksum"}))
    assert finished(tmp_path / "s.parquet", REQUEST) == Ledger(tmp_path / "s.parquet", REQUEST).counts == COUNTS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'{"index": 1', b'{"index": 7'),
        (b'{"index": 1', b'{"index": 3'),  # of a row that comes later
        (b'{"index": 1, "draw"', b'{"index": 1, \xff\x00aw"'),
        (b'"status": "truncated"', b'"status": 5'),
    ],
)
@pytest.mark.parametrize("last", [3, 5])
def test_a_damaged_line_costs_its_row(tmp_path, name, old, new, last):
    write(tmp_path / "whole" / name).finish()
    write(tmp_path / name, ATTEMPTS[:last])
    journal = tmp_path / f"{name}.journal"
    assert journal.read_bytes().count(old) == 1
    journal.write_bytes(journal.read_bytes().replace(old, new))
    ledger = Ledger(tmp_path / name, REQUEST)
    assert ledger.missing == [1, *range(last, 5)] and len(ledger) == last - 1 and not ledger.complete
    assert ledger.notes == [f"1 line of {journal} cannot be read; row 1 is drawn again"]
    with pytest.raises(ValueError, match="next row is 1, not 2"):
        ledger.append(ATTEMPTS[2])
    for index in ledger.missing:
        ledger.append(ATTEMPTS[index])
    assert Ledger(tmp_path / name, REQUEST).complete  # as if it had been killed here
    ledger.finish()
    found = contents(tmp_path)
    assert all(found[path] == content for path, content in contents(tmp_path / "whole").items())


def test_no_byte_of_a_line_can_change_unnoticed(tmp_path):
    """The lowest bit of each byte of an ok row, one after the other: its row is drawn again, whatever it had become."""
    write(tmp_path / "s.csv", ATTEMPTS[:1])
    journal = tmp_path / "s.csv.journal"
    whole = journal.read_bytes()
    assert ATTEMPTS[0].status == "ok" and len(Ledger(tmp_path / "s.csv", REQUEST)) == 1
    for place in range(len(whole)):
        journal.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert 0 in Ledger(tmp_path / "s.csv", REQUEST).missing, whole[:place]


def test_a_damaged_row_counts_among_those_of_num_valid(tmp_path):
    request = dataclasses.replace(REQUEST, num_valid=2)
    assert write(tmp_path / "s.csv", request=request).complete
    journal = tmp_path / "s.csv.journal"
    journal.write_text(journal.read_text().replace('"status": "truncated"', '"status": 5'))
    ledger = Ledger(tmp_path / "s.csv", request)
    assert not ledger.complete and ledger.missing == [1]
    ledger.append(ATTEMPTS[1])
    assert ledger.complete


@pytest.mark.parametrize("name", NAMES)
def test_a_journal_outlives_the_loss_of_its_header(tmp_path, name):
    write(tmp_path / name, ATTEMPTS[:3])
    header = tmp_path / f"{name}.json"
    header.rename(tmp_path / "kept")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=rf"{name}\.journal exists already, without {name}\.json, which says"):
        Ledger(tmp_path / name, REQUEST)
    header.write_text('{"request": ')
    with pytest.raises(UserError, match=rf"{name}\.json describes no samples"):
        Ledger(tmp_path / name, REQUEST)
    header.unlink()
    assert contents(tmp_path) == before
    (tmp_path / "kept").rename(header)
    assert len(Ledger(tmp_path / name, REQUEST)) == 3


def test_a_table_whose_journal_is_gone_is_not_overwritten(tmp_path):
    write(tmp_path / "s.csv")
    (tmp_path / "s.csv.journal").rename(tmp_path / "s.csv")
    with pytest.raises(UserError, match=r"s\.csv is there, and s\.csv\.journal is not"):
        Ledger(tmp_path / "s.csv", REQUEST)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path, name, full_disk):  # noqa: F811
    write(tmp_path / "whole" / name).finish()
    ledger = write(tmp_path / name, ATTEMPTS[:3])
    size = (tmp_path / f"{name}.journal").stat().st_size
    full = rf"cannot write .*{name}: .*; what was written before is kept"
    with full_disk(size + 100), pytest.raises(UserError, match=full) as error:  # in the middle of a line
        ledger.append(ATTEMPTS[3])
    assert "\n" not in str(error.value)
    ledger = Ledger(tmp_path / name, REQUEST)
    assert ledger.missing == [3, 4]
    for index in (3, 4):
        ledger.append(ATTEMPTS[index])
    with full_disk(300), pytest.raises(UserError, match=full):
        ledger.finish()
    assert not list(tmp_path.rglob("*.part")) and finished(tmp_path / name, REQUEST) is None
    ledger = Ledger(tmp_path / name, REQUEST)
    assert ledger.complete
    ledger.finish()
    found = contents(tmp_path)
    assert all(found[path] == content for path, content in contents(tmp_path / "whole").items())


TWO = dataclasses.replace(REQUEST, prompts=["a", "b"], conditions=["{}", "{}"], grammar=None, num=3)


def of_two(num: int) -> list[Attempt]:
    """Rows of two prompts; draw 1 of each is not ok, draw 2 has no symmetry."""
    kinds = [attempt(0), attempt(1, "truncated"), attempt(2)]
    return [
        dataclasses.replace(
            kinds[draw % 3], index=prompt * num + draw, draw=draw, prompt=TWO.prompts[prompt], conditions="{}"
        )
        for prompt in range(2)
        for draw in range(num)
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", [0, 2, 5, "all", "finished"])
def test_num_may_grow(tmp_path, name, there):
    grown = dataclasses.replace(TWO, num=7)
    write(tmp_path / "whole" / name, of_two(7), grown).finish()
    ledger = write(tmp_path / name, of_two(3)[: there if isinstance(there, int) else 6], TWO)
    if there == "finished":
        ledger.finish()
    kept = {(row.prompt, row.draw) for row in of_two(3)[: len(ledger)]}
    assert finished(tmp_path / name, grown) is None
    ledger = Ledger(tmp_path / name, grown)
    assert ledger.missing == [row.index for row in of_two(7) if (row.prompt, row.draw) not in kept]
    assert ledger.notes == [f"{tmp_path / name} had 3 attempts for each prompt, and goes on to 7"]
    with pytest.raises(UserError, match="num was 7, now it is 3"):
        Ledger(tmp_path / name, TWO)
    for index in Ledger(tmp_path / name, grown).missing:
        ledger.append(of_two(7)[index])
    ledger.finish()
    assert finished(tmp_path / name, grown) == ledger.counts
    found = {path: content for path, content in contents(tmp_path).items() if not path.startswith("whole")}
    assert found == contents(tmp_path / "whole")


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("there", [4, "finished"])
def test_growth_that_was_killed_is_done_or_was_never_begun(tmp_path, monkeypatch, moment, there):
    ledger = write(tmp_path / "s.csv", of_two(3)[: 6 if there == "finished" else there], TWO)
    if there == "finished":
        ledger.finish()
    steps = iter(range(3))
    replace = os.replace

    def killed(*paths):
        if next(steps) == moment:
            raise KeyboardInterrupt
        replace(*paths)

    grown = dataclasses.replace(TWO, num=7)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        Ledger(tmp_path / "s.csv", grown)
    if moment < 2:
        assert len(Ledger(tmp_path / "s.csv", TWO)) == len(ledger)
    assert len(Ledger(tmp_path / "s.csv", grown)) == len(ledger)
    rows = [json.loads(line) for line in (tmp_path / "s.csv.journal").read_text().splitlines()]
    assert all(row.pop("crc32") for row in rows)
    assert rows == [dataclasses.asdict(of_two(7)[row["index"]]) for row in rows]


def test_num_of_a_run_of_several_processes_stays(tmp_path):
    write_part(tmp_path / "s.csv", Part(0, 2))
    grown = dataclasses.replace(REQUEST, num=6)
    with pytest.raises(UserError, match="num was 5, now it is 6"):
        Ledger(tmp_path / "s.csv", grown, Part(0, 2))
    write_part(tmp_path / "s.csv", Part(1, 2))
    join(tmp_path / "s.csv", REQUEST)
    with pytest.raises(UserError, match="num was 5, now it is 6"):
        Ledger(tmp_path / "s.csv", grown, Part(0, 2))
    assert Ledger(tmp_path / "s.csv", grown).missing == [5]


@pytest.mark.parametrize("there", [4, "finished"])
def test_growth_that_was_killed_last_grows_further(tmp_path, monkeypatch, there):
    """All was done but the journal's name: the rows are those of 7 attempts, and go on to 9."""
    ledger = write(tmp_path / "s.csv", of_two(3)[: 6 if there == "finished" else there], TWO)
    if there == "finished":
        ledger.finish()
    replace = os.replace

    def killed(old, new):
        if str(new).endswith(".journal"):
            raise KeyboardInterrupt
        replace(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        Ledger(tmp_path / "s.csv", dataclasses.replace(TWO, num=7))
    grown = Ledger(tmp_path / "s.csv", dataclasses.replace(TWO, num=9))
    assert len(grown) == len(ledger) and grown.notes == [
        f"{tmp_path / 's.csv'} had 7 attempts for each prompt, and goes on to 9"
    ]


def test_slots_are_those_of_the_rows_that_are_there(tmp_path):
    kept = dataclasses.replace(REQUEST, keep=0.5, keep_by="token")
    out, header = tmp_path / "s.csv", tmp_path / "s.csv.json"
    Ledger(out, REQUEST, slots=2)  # and no row was drawn
    assert Ledger(out, REQUEST, slots=8).slots == 8 == json.loads(header.read_text())["slots"]
    ledger = Ledger(out, REQUEST, slots=8)
    ledger.append(ATTEMPTS[0])
    ledger = Ledger(out, kept, slots=64)
    assert ledger.slots == 8 and len(ledger) == 1
    for each in ATTEMPTS[1:]:
        ledger.append(each)
    ledger.finish()
    Ledger(out, dataclasses.replace(kept, keep=0.25), slots=64).finish()
    assert json.loads(header.read_text())["slots"] == 8
    assert Ledger(out, dataclasses.replace(kept, num=9), slots=64).slots == 64


def test_slots_are_recorded_and_no_part_of_the_request(tmp_path):
    ledger = Ledger(tmp_path / "s.csv", REQUEST, slots=8)
    ledger.append(ATTEMPTS[0])
    again = Ledger(tmp_path / "s.csv", REQUEST, slots=64)
    assert (ledger.slots, again.slots, len(again)) == (8, 8, 1)
    for a in ATTEMPTS[1:]:
        again.append(a)
    again.finish()
    assert json.loads((tmp_path / "s.csv.json").read_text())["slots"] == 8
    assert Ledger(tmp_path / "s.csv", REQUEST, slots=64).slots == 8


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


def write_part(out, part: Part, request=REQUEST, yardstick: Yardstick | None = None) -> Ledger:
    ledger = Ledger(out, request, part, yardstick=yardstick)
    for index in ledger.rows:
        ledger.append(ATTEMPTS[index])
    assert ledger.complete
    ledger.finish()
    return ledger


def test_what_attempts_are_compared_with_goes_with_them(tmp_path):
    """While they are drawn, when they are done, and through the joining of parts."""
    told = Yardstick("round 1 of runs/x", ("mp20", "/there/synthetic.parquet"), potential="chgnet")
    Ledger(tmp_path / "begun.csv", REQUEST, yardstick=told)
    write_part(tmp_path / "whole.csv", Part(), yardstick=told)
    for number in range(2):
        write_part(tmp_path / "parts.csv", Part(number, 2), yardstick=told)
    join(tmp_path / "parts.csv", REQUEST)
    assert [yardstick_of(tmp_path / f"{name}.csv") for name in ("begun", "whole", "parts")] == [told] * 3
    write_part(tmp_path / "other.csv", Part())
    assert yardstick_of(tmp_path / "other.csv") is None is yardstick_of(tmp_path / "none.csv")


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["s.parquet", "s.csv", "cifs"])
@pytest.mark.parametrize("of", [2, 3, 7])
@pytest.mark.parametrize("resample", [None, 6])
def test_parts_are_joined_to_what_one_process_would_have_written(tmp_path, name, of, resample):
    request = dataclasses.replace(REQUEST, resample=resample)
    write(tmp_path / "one" / name, request=request).finish()
    for number in reversed(range(of)):
        write_part(tmp_path / "many" / name, Part(number, of), request)
    assert finished(tmp_path / "many" / name, request) is None
    assert join(tmp_path / "many" / name, request) == finished(tmp_path / "many" / name, request) == COUNTS
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert join(tmp_path / "many" / name, request) is None
    assert effective_number(tmp_path / "many" / name) == (None if resample is None else pytest.approx(4))


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
    with pytest.raises(UserError, match="belongs to another run: draws was None"):  # the new rows would be others
        Ledger(out, dataclasses.replace(REQUEST, num=6))
    Ledger(out, dataclasses.replace(REQUEST, keep=0.5, keep_by="token")).finish()  # which draws nothing
    with pytest.raises(UserError, match="belongs to another run: draws was None"):
        Ledger(out, dataclasses.replace(REQUEST, num=6, keep=0.5, keep_by="token"))


def test_a_carriage_return_is_a_letter_of_a_text(tmp_path):
    """Some vocabularies have one, and without the grammar a model may write it."""
    rows = [dataclasses.replace(row, text=f"a\rb {row.index}") for row in ATTEMPTS]
    write(tmp_path / "s.csv", rows).finish()
    assert [row["text"] for row in read_table(tmp_path / "s.csv")] == [row.text for row in rows]
