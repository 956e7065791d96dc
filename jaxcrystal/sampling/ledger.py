"""The ledger: one row for every attempt to draw a crystal, whatever became of it.

    samples.parquet.json      the request, and, once all is done, how the attempts ended and the table's checksum
    samples.parquet.journal   one line of JSON an attempt, while sampling goes on
    samples.parquet           the same rows as a table, once all are there; the journal is then removed

A run that was killed draws the rows that the journal lacks: those after its last whole line, and those whose line is
damaged. Nothing that is there is drawn twice, and the table is the same as if nothing had happened. A request for more
attempts turns the table into a journal again, under the name `.journal.NUM` until the header says NUM. `out` may also
be a CSV file, or a folder: then each crystal is a CIF file of its own, named by its index, and once more with its
symmetry in `symmetrized/`, beside `attempts.parquet`.

Processes that share a run have each a ledger for its part of the rows, samples-00002-of-00016.parquet, which knows
nothing of the others; `join` makes the one table of them, the same as a single process would have written.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
import shutil
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from jaxcrystal.errors import UserError
from jaxcrystal.sampling.attempt import LEFT_OUT, OK, Attempt
from jaxcrystal.sampling.attempts_table import checksum, read_table, write_table, write_whole
from jaxcrystal.sampling.keeping import left_out, restored
from jaxcrystal.sampling.resampling import times
from jaxcrystal.yardstick import Yardstick

CHANGEABLE = ("num", "resample", "keep", "keep_by")  #: of a request, with the rows kept that are there
LONGEST = 200  #: letters of a setting that an error repeats
GOES_ON = "; what was written before is kept: with room on the disk the same command goes on after it"


@dataclass(frozen=True)
class Request:
    """All that decides what the ledger's rows will be."""

    model: str  #: fingerprint of the weights
    prompts: list[str | None]  #: None where there are ranges, and so prompts for them
    conditions: list[str]  #: of each prompt, as JSON
    grammar: list[str] | None  #: each prompt's constraints, as JSON; None if the model writes what it likes
    guidance: str | None  #: with the prompt that states nothing; None without
    methods: list[str]  #: in the order of their application
    cache: str  #: dtype of keys and values
    symprec: float  #: Å
    max_new_tokens: int
    seed: int
    num: int  #: attempts for each prompt, prompt after prompt
    num_valid: int | None = None  #: attempts end once so many are ok
    resample: int | None = None  #: of each prompt's attempts, drawn again by the grammar's weights
    keep: float | None = None  #: share of each prompt's attempts that are ok: the likeliest; the others are left out
    keep_by: str | None = None  #: as of `keeping.PER`
    exact_symmetry: bool | None = None  #: what is more symmetric than its text says is not ok
    composition_methods: list[str] | None = None  #: of the composition; None: as the rest
    labels: str | None = None  #: hash of those that values within ranges are drawn from; None without ranges
    dtype: str | None = None  #: of activations and products; None: the model's own
    new: str | None = None  #: hash of the formulas that are not drawn; None without
    draws: str = "hash of the prompt's tokens, index"  #: what a draw's key is made of, beside the seed

    @property
    def rows(self) -> int:
        """Attempts in all."""
        return self.num * len(self.prompts)


class Part(NamedTuple):
    """A range of a run's rows that one process draws."""

    number: int = 0
    of: int = 1

    def rows(self, total: int) -> range:
        """Which of all rows: parts follow each other, and differ by one row at most."""
        return range(total * self.number // self.of, total * (self.number + 1) // self.of)

    def path(self, out: Path) -> Path:
        """Of its own ledger, where `out` is that of all parts."""
        return out if self.of == 1 else out.with_name(f"{out.stem}-{self.number:05d}-of-{self.of:05d}{out.suffix}")

    def paths(self, out: Path) -> list[Path]:
        """Of all parts."""
        return [Part(number, self.of).path(out) for number in range(self.of)]


class Ledger:
    """Opens the ledger of `request` at `out`, or of a part of its rows beside it, as far as it was written before.

    `slots`: the number that this run would draw with; `Ledger.slots` is the one that the rows there were drawn with.
    `yardstick`: of the model, which a later evaluation finds here.
    The same request with a larger `num`, another `resample` or another `keep` keeps the rows that are there, those of
    several parts excepted.

    Raises UserError if `out` is neither .parquet, .csv nor a folder's name, if it cannot be written, if it exists and
    is no ledger, if its header is gone or its table is not the one that was finished, or if it is the ledger of another
    request: the message names what differs.
    """

    def __init__(
        self,
        out: str | Path,
        request: Request,
        part: Part = Part(),  # noqa: B008
        slots: int | None = None,
        yardstick: Yardstick | None = None,
    ) -> None:
        self.out = part.path(Path(out))
        self.request = request
        self.slots = slots
        self.yardstick = yardstick
        self.rows = part.rows(request.rows)  #: their indices
        self.notes: list[str] = []  #: what was found on opening, a line each
        self.counts: Counter[str] = Counter()
        self._header = _beside(self.out, ".json")
        self._journal = _beside(self.out, ".journal")
        self._whole = part.of == 1
        if self.out.suffix not in (".parquet", ".csv", ""):
            raise UserError(f"cannot write {out}: give a name that ends in .parquet or .csv, or that of a folder")
        others = [other for other in _parts(Path(out)) if other.of != part.of]
        if others:
            raise UserError(
                f"{others[0].path(Path(out))} is a part of a run on {others[0].of} processes, this one is on "
                f"{part.of}; go on with as many, or remove it with its .json and .journal"
            )
        if part.of > 1:
            _read_header(Path(out), request)  # only one process keeps the rows of a smaller `num`
        with _disk(self.out):
            self._open()

    def __len__(self) -> int:
        """Rows that are there."""
        return self.counts.total()

    @property
    def missing(self) -> list[int]:
        """The indices of the rows that are not there, in the order in which `append` takes them."""
        return list(self._missing)

    @property
    def complete(self) -> bool:
        """Nothing is left to be drawn."""
        valid = self.request.num_valid
        enough = valid is not None and self.counts[OK] >= valid
        return not self._missing or (enough and self._missing[0] > self._last)

    def append(self, attempt: Attempt) -> None:
        """Writes the next row; it outlives this process from here on. Raises UserError if the disk refuses it."""
        if not self._missing or attempt.index != self._missing[0]:
            raise ValueError(f"the ledger's next row is {next(iter(self._missing), None)}, not {attempt.index}")
        with _disk(self.out, GOES_ON), self._journal.open("a") as journal:
            journal.write(_line(dataclasses.asdict(attempt)))
        self._last = max(self._last, self._missing.popleft())
        self.counts[attempt.status] += 1

    def finish(self) -> None:
        """Makes the table (and the CIF files) of a complete journal; a second call does nothing.

        Raises UserError if the disk refuses it; the journal is then still there.
        """
        with _disk(self.out, GOES_ON):
            if self._journal.exists():
                effective, unkept = _write_table(self.out, self._in_order, self.request if self._whole else None)
                _leave_out(self.counts, unkept)
                self._describe(self.counts, effective)
                self._journal.unlink()

    def _describe(self, *of_table: Any) -> None:
        _describe(self.out, self.request, self.slots, self.yardstick, *of_table)

    def _open(self) -> None:
        header, own = _read_header(self.out, self.request, may_change=self._whole), self.slots
        if header is None:
            for path in (self._journal, self.out):
                if path.exists():
                    raise UserError(
                        f"{path} exists already, without {self._header.name}, which says whose rows it has; put that "
                        f"back, remove {path.name}, or choose another name"
                    )
        else:
            waiting = self._waiting(header["request"]["num"])
            if waiting.exists():  # of a change that was killed when all but this was done
                os.replace(waiting, self._journal)
            if header["request"]["num"] == self.request.num:
                self.slots = header.get("slots") or own  # as many as drew the rows that are there draw the rest
            if _changed(header, self.request):
                self._change(header)
        if header is not None and self._journal.exists():
            there = self._resume()
        elif header is not None and self.out.exists():
            self.counts, there = _checked_counts(self.out, header), set(self.rows)
        else:
            there = set()
        if not there:
            self.slots = own
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._describe()
            self._journal.write_text("")
        self._missing = deque(row for row in self.rows if row not in there)
        self._last = max(there, default=-1)

    def _waiting(self, num: int) -> Path:
        """A journal that takes the place of the one that is there, once the header says this number of attempts."""
        return _beside(self._journal, f".{num}")

    def _change(self, header: dict[str, Any]) -> None:
        """Makes a journal of the rows of another header, numbered as this request does: killed at any time, it is done
        or was never begun."""
        former = header["request"]
        before = dataclasses.replace(self.request, **{key: former.get(key) for key in CHANGEABLE})
        if self._journal.exists():
            rows = (row for _, row in self._whole_lines(before))
        elif self.out.exists():
            _checked_counts(self.out, header)
            rows = read_table(self.out)
        else:
            rows = iter(())

        def lines(path: Path) -> None:
            with path.open("w") as journal:
                for row in rows:
                    index = row["index"] // before.num * self.request.num + row["draw"]
                    journal.write(_line(restored(row) | {"index": index, "resampled": None}))

        write_whole(self._waiting(self.request.num), lines)
        self.request = dataclasses.replace(self.request, draws=former.get("draws"))  # the rows stay as they were drawn
        self._describe()
        os.replace(self._waiting(self.request.num), self._journal)
        if before.num != self.request.num:
            self.notes.append(
                f"{self.out} had {before.num} attempts for each prompt, and goes on to {self.request.num}"
            )

    def _resume(self) -> set[int]:
        """Counts the journal's rows, whose indices it returns, and cuts off a last line that was being written."""
        lines = whole = 0
        with self._journal.open("rb") as journal:
            for line in journal:
                if line.endswith(b"\n"):
                    lines, whole = lines + 1, whole + len(line)
        os.truncate(self._journal, whole)
        there = set()
        for _, row in self._whole_lines(self.request):
            there.add(row["index"])
            self.counts[row["status"]] += 1
        if damaged := lines - len(self):
            these = f"{damaged} line" + "s" * (damaged > 1)
            self.notes.append(f"{these} of {self._journal} cannot be read; {_listed(self._gaps(there))} drawn again")
        return there

    def _gaps(self, there: set[int]) -> list[int]:
        """Rows that are not there, before one that is."""
        last = max(there, default=-1)
        return [row for row in self.rows if row < last and row not in there]

    def _whole_lines(self, request: Request) -> Iterator[tuple[int, dict[str, Any]]]:
        """The journal's rows with the place of their lines, without those that are damaged."""
        there: set[int] = set()
        rows, place = self.rows if request is self.request else range(request.rows), 0
        with self._journal.open("rb") as journal:
            for line in journal:
                if (row := _row(line, request)) is not None and row["index"] in rows and row["index"] not in there:
                    there.add(row["index"])
                    yield place, row
                place += len(line)

    def _in_order(self) -> Iterator[dict[str, Any]]:
        """The journal's rows by their index: those that a damaged line had cost were drawn last."""
        places = sorted((row["index"], place) for place, row in self._whole_lines(self.request))
        with self._journal.open("rb") as journal:
            for _, place in places:
                journal.seek(place)
                yield _row(journal.readline(), self.request)


def finished(out: str | Path, request: Request) -> Counter[str] | None:
    """How the attempts of a finished ledger ended; None if it is not there, not finished, or of a smaller `num`,
    another `resample` or another `keep`.

    Raises UserError if it is of another request, or if its table is not the one that was finished.
    """
    return _finished(Path(out), request, may_change=True)


def model_of(out: str | Path) -> str | None:
    """The fingerprint of the model that drew a ledger's attempts; None for what is no ledger."""
    try:
        return json.loads(_beside(Path(out), ".json").read_text())["request"]["model"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def yardstick_of(out: str | Path) -> Yardstick | None:
    """With what the attempts of a ledger are compared, where their model had that beside it."""
    try:
        return _yardstick(json.loads(_beside(Path(out), ".json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _yardstick(header: dict[str, Any]) -> Yardstick | None:
    return Yardstick.of(header["yardstick"]) if "yardstick" in header else None


def effective_number(out: str | Path) -> float | None:
    """To how many independent draws the attempts of a finished ledger amount, all prompts together; None if they were
    not resampled."""
    numbers = json.loads(_beside(Path(out), ".json").read_text()).get("effective_numbers")
    return None if numbers is None else sum(numbers)


def _finished(out: Path, request: Request, may_change: bool = False) -> Counter[str] | None:
    header = _read_header(out, request, may_change)
    if header is None or not out.exists() or _beside(out, ".journal").exists():
        return None
    of_this = not _changed(header, request) and "counts" in header
    return _checked_counts(out, header) if of_this else None


def join(out: str | Path, request: Request) -> Counter[str] | None:
    """Makes one ledger of all parts beside `out`, which are then removed; None where there are no parts.

    Raises UserError if some are missing or unfinished, or are of another request: the message names them.
    """
    out = Path(out)
    parts = _parts(out)
    if not parts:
        return None
    counts = _finished(out, request)  # a former join may have been killed while it removed the parts
    if counts is None:
        wanted = [Part(number, parts[0].of) for number in range(parts[0].of)]
        each = [_finished(part.path(out), request) for part in wanted]
        missing = [part.path(out).name for part, counted in zip(wanted, each, strict=True) if counted is None]
        if missing or parts != wanted:
            raise UserError(
                f"{out} has parts of a run of {parts[0].of} processes that is not done: {', '.join(missing[:3])}"
                f"{', …' * (len(missing) > 3)}; go on with as many processes, bring the parts of all hosts to one "
                "folder, or remove them"
            )
        counts = sum(each, Counter())
        header = json.loads(_beside(parts[0].path(out), ".json").read_text())
        with _disk(out, GOES_ON):
            rows = partial(map, read_table, [part.path(out) for part in parts])
            effective, unkept = _write_table(out, lambda: chain.from_iterable(rows()), request)
            _leave_out(counts, unkept)
            _describe(out, request, header.get("slots"), _yardstick(header), counts, effective)
    for path in (part.path(out) for part in parts):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        _beside(path, ".json").unlink()
    return counts


def _parts(out: Path) -> list[Part]:
    """All parts of a ledger that have begun, in order."""
    name = re.compile(rf"{re.escape(out.stem)}-(\d{{5}})-of-(\d{{5}}){re.escape(out.suffix)}\.json")
    found = (name.fullmatch(path.name) for path in out.parent.glob(f"{glob.escape(out.stem)}-*.json"))
    return sorted(Part(*map(int, match.groups())) for match in found if match)


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


@contextmanager
def _disk(out: Path, remedy: str = "") -> Iterator[None]:
    """What the disk refuses is a UserError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"cannot write {out}: {error.strerror or error}{where}{remedy}") from None


def _describe(
    out: Path,
    request: Request,
    slots: int | None,
    yardstick: Yardstick | None,
    counts: Mapping[str, int] | None = None,
    effective: Sequence[float] | None = None,
) -> None:
    """Writes the header; `counts`, and each prompt's effective number: of the table, which is there."""
    description: dict[str, Any] = {"request": dataclasses.asdict(request)}
    if slots is not None:
        description["slots"] = slots
    if yardstick is not None:
        description["yardstick"] = dataclasses.asdict(yardstick)
    if counts is not None:
        description |= {"counts": dict(sorted(counts.items())), "checksum": checksum(out)}
    if effective is not None:
        description["effective_numbers"] = list(effective)
    write_whole(_beside(out, ".json"), lambda path: path.write_text(json.dumps(description, indent=2) + "\n"))


def _checked_counts(out: Path, header: dict[str, Any]) -> Counter[str]:
    """How the attempts of a finished ledger ended. Headers of older versions have no checksum."""
    wrong = None
    if "counts" not in header:
        wrong = f"is there, and {out.name}.journal is not"
    elif "checksum" in header:
        try:
            if header["checksum"] != checksum(out):
                wrong = "is not what was written there: its checksum is another"
        except OSError as error:
            wrong = f"is not what was written there: {error.filename}: {error.strerror}"
    if wrong is not None:
        raise UserError(
            f"{out} {wrong}; put a copy of it back, or remove it and {out.name}.json, and the same command draws it "
            "again"
        )
    return Counter(header["counts"])


def _line(row: dict[str, Any]) -> str:
    """The journal's line of a row, with a checksum of its own."""
    return json.dumps(row | {"crc32": _crc32(row)}) + "\n"


def _crc32(row: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(row).encode())


def _row(line: bytes, request: Request) -> dict[str, Any] | None:
    """The row of a journal's line; None for a damaged one."""
    try:
        row = json.loads(line)
        if row.pop("crc32") != _crc32(row):
            return None
        prompt, draw = divmod(row["index"], request.num)
        good = row["draw"] == draw and row["prompt"] == (request.prompts[prompt] or row["prompt"])
        good = good and row["seed"] == request.seed
        return row if good and isinstance(row["status"], str) and line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def _changed(header: dict[str, Any], request: Request) -> bool:
    return any(header["request"].get(key) != getattr(request, key) for key in CHANGEABLE)


def _read_header(out: Path, request: Request, may_change: bool = False) -> dict[str, Any] | None:
    """What the .json file says; None if there is none. Raises UserError if it is of another request."""
    header = _beside(out, ".json")
    if not header.exists():
        return None
    try:
        saved = json.loads(header.read_text())
        then = saved["request"]
        now = json.loads(json.dumps(dataclasses.asdict(request)))
        differing = {key: (then.get(key), now[key]) for key in now if then.get(key) != now[key]}
        if may_change:
            for key in set(CHANGEABLE) - {"num"}:
                differing.pop(key, None)
        if may_change and "num" in differing and then["num"] < now["num"]:
            del differing["num"]
        elif "counts" in saved and "num" not in differing:
            differing.pop("draws", None)  # nothing is drawn any more
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{header} describes no samples; remove it or choose another name") from None
    if differing:
        changes = "; ".join(
            f"{key} was {_short(old)}, now it is {_short(new)}" for key, (old, new) in differing.items()
        )
        raise UserError(
            f"{out} belongs to another run: {changes}. Choose another name, or remove {out.name} with its .json and "
            ".journal"
        )
    return saved


def _listed(rows: list[int]) -> str:
    """As the subject of a sentence; none are those at the end of a journal."""
    if not rows:
        return "what is missing is"
    more = f" and {len(rows) - 5} more" * (len(rows) > 5)
    return f"rows {', '.join(map(str, rows[:5]))}{more} are" if len(rows) > 1 else f"row {rows[0]} is"


def _short(setting: Any) -> str:
    return text if len(text := repr(setting)) <= LONGEST else f"{text[:LONGEST]}…"


def _write_table(
    out: Path, read: Callable[[], Iterator[dict[str, Any]]], request: Request | None
) -> tuple[list[float] | None, int]:
    """The rows that `read` gives in their order, with those marked that a `request` chooses among them, if it does;
    each prompt's effective number then, and how many were left out."""
    rows, effective, unkept = read(), None, set()
    if request is not None and request.resample is not None:
        chosen, effective = _chosen(rows, request)
        rows = (row | {"resampled": int(times)} for row, times in zip(read(), chosen, strict=True))
    if request is not None and request.keep is not None:
        unkept = left_out(rows, request.num, request.keep, request.keep_by)
        rows = (row | {"status": LEFT_OUT} if place in unkept else row for place, row in enumerate(read()))
    write_table(out, rows)
    return effective, len(unkept)


def _leave_out(counts: Counter[str], number: int) -> None:
    """Of those that were ok."""
    if number:
        counts[OK], counts[LEFT_OUT] = counts[OK] - number, number


def _chosen(rows: Iterator[dict[str, Any]], request: Request) -> tuple[list[int], list[float]]:
    """How often each row is drawn again, and each prompt's effective number."""
    logs = [row["grammar_log_probability"] for row in rows]
    each = [
        times(logs[first : first + request.num], request.resample, request.seed)
        for first in range(0, len(logs), request.num)
    ]
    return [n for chosen, _ in each for n in chosen], [effective for _, effective in each]
