"""One job an output: the second is refused in one line, and a holder that is dead blocks nobody."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny_llama import checkpoint, pieces  # noqa: F401  (fixtures)

from jaxcrystal import locks
from jaxcrystal.cli import main
from jaxcrystal.errors import UserError
from jaxcrystal.locks import STALE, Holder, held, is_lock, place
from jaxcrystal.reader.reading import read
from jaxcrystal.workers import each, local

ARCHIVE = Path(__file__).with_name("written_by_a3d077c") / "written.tar.xz"
#: Of each verb that writes: what is typed, up to the name of its output.
WRITING = {
    "prepare": "prepare crystals.csv --workers 1 --out new",
    "convert": "convert hf --out new",
    "train": "train recipe.yaml --set out=new",
    "sample": "sample --model run --num 3 --max-new-tokens 120 --num-atoms 1-3 --out new.parquet",
    "evaluate": "evaluate samples.parquet --workers 1 --out new",
    "export": "export --model run --format peft --base-name meta-llama/Llama-2-7b-hf --out new",
    "report": "report evaluation",
    "compare": "compare evaluation another --out new",
    "hull": "hull build entries.json --workers 1 --out new.parquet",
}


@pytest.fixture
def written(tmp_path, monkeypatch, checkpoint) -> Path:  # noqa: F811
    """A folder in which each of the commands can be typed."""
    checkpoint()[1].rename(tmp_path / "hf")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "jaxcrystal.cli", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stopped_while_it_holds(command: str, out: str) -> subprocess.Popen:
    """A process of the command, stopped by a signal while it holds the lock of `out`."""
    while True:
        process = start(command)
        while process.poll() is None:
            if place(Path(out)).exists():
                process.send_signal(signal.SIGSTOP)
                if place(Path(out)).exists() and place(Path(out)).read_text().endswith("}"):
                    return process
                process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        process.communicate()  # it was done before it could be stopped: again


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def line(verb: str, out: str, pid: int) -> str:
    return (
        rf"jaxcrystal {verb}: {out} is being written by process {pid} on \S+, since \d{{4}}-[-\d: +]+; wait for its "
        r"end, or choose another output\n"
    )


@pytest.mark.parametrize("verb", WRITING)
def test_each_verb_that_writes_is_refused_while_another_does(written, verb, capsys):
    out = WRITING[verb].split()[-1].removeprefix("out=")
    with held(out):
        before = files(written)
        assert main(WRITING[verb].split()) == 1
        assert re.fullmatch(line(verb, out, os.getpid()), capsys.readouterr().err)
        assert files(written) == before
    assert not place(Path(out)).exists()


@pytest.mark.parametrize("verb", ["prepare", "hull", "sample"])
def test_of_two_runs_one_goes_on_and_one_is_refused(written, verb):
    command, out = WRITING[verb], WRITING[verb].split()[-1]
    first = stopped_while_it_holds(command, out)
    second = start(command)
    printed, error = second.communicate()
    assert (second.returncode, printed) == (1, "")
    assert re.fullmatch(line(verb, out, first.pid), error)
    first.send_signal(signal.SIGCONT)
    first.communicate()
    assert first.returncode == 0 and not place(Path(out)).exists()
    table = pq.read_table(out if out.endswith(".parquet") else f"{out}/crystals.parquet")
    assert table.num_rows == {"prepare": 6, "hull": 14, "sample": 3}[verb]


@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_a_killed_run_blocks_nobody(written, verb, capsys):
    first = stopped_while_it_holds(WRITING[verb], "new")
    first.kill()
    first.communicate()
    assert place(Path("new")).exists()
    assert main(WRITING[verb].split()) == 0, capsys.readouterr().err
    assert not place(Path("new")).exists()


def foreign(out: Path, age: float) -> Path:
    """The lock of a holder on another host, which renewed it so many seconds ago."""
    path = place(out)
    path.write_text(json.dumps(vars(Holder("far", "another kernel", 4711, "2026-11-29 01:00:00+00:00"))))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_holder_on_another_host_blocks_as_long_as_it_renews(tmp_path):
    path = foreign(tmp_path / "new", STALE / 2)
    with pytest.raises(UserError, match=r"new is being written by process 4711 on far, since 2026-11-29 01:00"):
        held(tmp_path / "new").__enter__()
    assert path.exists()
    foreign(tmp_path / "new", STALE * 2)
    with held(tmp_path / "new"), pytest.raises(UserError, match=f"by process {os.getpid()} on "):
        held(tmp_path / "new").__enter__()
    assert not path.exists()


def test_a_holder_renews_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.01)
    with held(tmp_path / "new"):
        path = place(tmp_path / "new")
        os.utime(path, (0, 0))
        for _ in range(3000):
            if path.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


def test_where_the_disk_has_no_locks_the_time_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_flock", lambda file: False)
    with held(tmp_path / "new"), pytest.raises(UserError, match="is being written by"):
        held(tmp_path / "new").__enter__()
    path = foreign(tmp_path / "new", STALE * 2)
    with held(tmp_path / "new"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_that_another_took_over_is_left_to_it(tmp_path):
    with held(tmp_path / "new"):
        path = foreign(tmp_path / "new", 0)
    assert path.exists()


def test_outputs_in_one_folder_do_not_block_each_other_and_links_are_followed(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with held(tmp_path / "a"), held(tmp_path / "b"), pytest.raises(UserError, match="link is being written by"):
        held(tmp_path / "link").__enter__()


def test_nothing_is_left_of_a_lock(tmp_path):
    with held(tmp_path / "some" / "where" / "new"):
        assert (tmp_path / "some" / "where").is_dir()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError), held(tmp_path / "new"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_read_does_not_count_the_lock_in_it(tmp_path):
    (tmp_path / "POSCAR").write_text("Si\n1\n3.8 0 0\n1.9 3.3 0\n1.9 1.1 3.1\nSi\n2\nDirect\n0 0 0\n.25 .25 .25\n")
    with held(tmp_path / "new"):
        assert [is_lock(path) for path in sorted(tmp_path.iterdir())] == [True, False]
        found = read(tmp_path)
    assert len(found.rows) == 1 and not found.unread


def test_a_lock_lies_in_a_folder_whose_parent_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with held(tmp_path / "mounted"):
        assert [path.name for path in (tmp_path / "mounted").iterdir()] == [".lock"]


def test_where_nothing_can_be_written_who_writes_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with held(tmp_path / "file" / "new"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def open_files(_: int) -> list[str]:
    links = Path("/proc/self/fd").iterdir()
    return [os.readlink(path) for path in links if path.is_symlink() and path.exists()]


def test_worker_processes_do_not_inherit_it(tmp_path):
    with held(tmp_path / "new"), local(1) as workers:
        (found,) = each(open_files, [0], workers, label="", lost=lambda item, why: [])
        assert found and not any(name.endswith(".lock") for name in found)
        assert any(name.endswith(".lock") for name in open_files(0))


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    path, flock, times = place(tmp_path / "new"), locks._flock, []

    def late(file: int) -> bool:
        if not times:
            path.unlink()  # its former holder ends between our opening and locking it
        times.append(1)
        return flock(file)

    monkeypatch.setattr(locks, "_flock", late)
    with held(tmp_path / "new"), pytest.raises(UserError, match="is being written by"):
        held(tmp_path / "new").__enter__()
    assert len(times) == 3


def test_many_at_once_are_one_at_a_time(tmp_path):
    inside, most, refused = [], [], []

    def work() -> None:
        for _ in range(50):
            try:
                with held(tmp_path / "new"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except UserError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) + len(refused) == 400
    assert not list(tmp_path.iterdir())
