"""Whatever a terminal can show and whatever a file is called: a command ends as it says, without a traceback."""

import json
import os
import subprocess
import sys

import pytest

from jaxcrystal.cli import VERBS
from jaxcrystal.crystals.prototypes import embedded

NAMES = [module.__name__.rpartition(".")[2].replace("_", "-") for module in VERBS]
CIF = next(e.crystal.to_cif() for e in embedded() if e.formula == "NaCl")
#: No text in UTF-8: é as Latin-1 writes it.
LATIN = b"caf\xe9"
ENCODINGS = [{"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}]
#: No UTF-8 even where Python would choose it by itself.
ENCODINGS += [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


def typed(*words, environment=None, folder=None):
    """Types a command; words may be bytes, as file names are."""
    command = [sys.executable, "-m", "jaxcrystal.cli", *words]
    done = subprocess.run(command, capture_output=True, env=os.environ | (environment or {}), cwd=folder)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode("latin-1")
    return done


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_help_is_shown_in_any_encoding(environment):
    script = f"""
import contextlib
from jaxcrystal.cli import main
for verb in {[None, *NAMES]}:
    with contextlib.suppress(SystemExit):
        main([*filter(None, [verb]), "--help"])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, env=os.environ | environment, check=True)
    assert done.stderr == b"" and done.stdout.count(b"usage: jaxcrystal") == len(NAMES) + 1
    assert b"forces are below, eV/" in done.stdout  # and Å, or how this encoding has it


@pytest.mark.parametrize("environment", ENCODINGS, ids=str)
def test_an_evaluation_is_told_in_any_encoding(environment, tmp_path):
    """`doctor` has Å, `evaluate` the names of files; what is written to files is UTF-8 whatever the terminal has."""
    samples = tmp_path / "kΩ.cif"
    samples.write_text(CIF, encoding="utf-8")
    done = typed("evaluate", samples, "--workers", "0", "--out", tmp_path / "α", environment=environment)
    assert done.returncode == 0 and b"1 attempts" in done.stdout and b"structures.parquet" in done.stdout
    assert json.loads((tmp_path / "α" / "metrics.json").read_text("utf-8"))["versions"]["samples"].startswith("kΩ.cif")
    done = typed("report", tmp_path / "α", environment=environment)
    assert done.returncode == 0 and b"report.html" in done.stdout
    assert "<h1>kΩ.cif</h1>" in (tmp_path / "α" / "report.html").read_text(encoding="utf-8")
    refused = typed("evaluate", tmp_path / "β.cif", "--out", tmp_path / "α", environment=environment)
    assert refused.returncode == 1 and b".cif does not exist" in refused.stderr and refused.stderr.count(b"\n") == 1


@pytest.mark.parametrize("where", ["file", "folder"])
def test_names_that_are_no_text(where, tmp_path):
    root = os.fsencode(tmp_path)
    place = os.path.join(root, LATIN + b".cif" if where == "file" else LATIN)
    if where == "folder":
        os.mkdir(place)
    with open(place if where == "file" else os.path.join(place, LATIN + b".cif"), "w") as file:
        file.write(CIF)
    report, data = os.path.join(root, b"report" + LATIN), os.path.join(root, b"data" + LATIN)
    done = typed("evaluate", place, "--out", report, "--workers", "0")
    assert done.returncode == 0, done.stderr.decode("latin-1")
    again = typed("report", report)
    assert again.returncode == 0 and b"caf\\udce9" not in again.stderr and b"report.html" in again.stdout
    compared = typed("compare", report, b"nowhere" + LATIN)
    assert compared.returncode == 1 and b"compare: cannot read nowherecaf" in compared.stderr
    with open(os.path.join(root, b"bad" + LATIN + b".cif"), "w") as file:
        file.write("no CIF")
    done = typed("prepare", place, os.path.join(root, b"bad" + LATIN + b".cif"), "--out", data)
    assert done.returncode == 1 and b"1 rows read, 1 kept" in done.stdout and b"0 kept" in done.stdout
    assert sorted(os.listdir(data)) == sorted(
        [f"{name}caf\N{REPLACEMENT CHARACTER}.parquet".encode() for name in ("", "bad")]
        + [b"report.json", b"left_out.csv", b"doubts.csv", b"notes.csv"]
    )


@pytest.mark.parametrize("verb", [v for v in NAMES if v not in ("doctor", "demo")])
def test_an_input_whose_name_is_no_text_is_refused_in_one_line(verb, tmp_path):
    """Nothing is there; what says so must not stumble over the name."""
    nowhere, out = b"nowhere" + LATIN, os.path.join(os.fsencode(tmp_path), b"out")
    words = {
        "prepare": [nowhere, "--out", out],
        "convert": [nowhere, "--out", out],
        "export": ["--model", nowhere, "--format", "hf", "--out", out],
        "train": [nowhere],
        "sample": ["--model", nowhere, "--num", "1", "--out", out + b".csv"],
        "predict": [nowhere + b".csv", "--model", "mini", "--out", out + b".csv"],
        "edit": [nowhere, "--model", "mini", "--num", "1", "--out", out + b".csv", "--keep-cell"],
        "infill": ["x.cif", "--model", nowhere, "--mask", "Fe", "--out", out],
        "mutate": ["mp20-test", "--model", nowhere, "--out", out],
        "templates": [nowhere, "--num", "1", "--out", out + b".csv"],
        "improve": [nowhere],
        "score": ["x.cif", "--model", nowhere, "--out", out + b".csv"],
        "ipt": ["x.cif", "--model", nowhere, "--out", out + b".csv"],
        "write": [nowhere, "--out", out, "--workers", "0"],
        "evaluate": [nowhere, "--out", out, "--workers", "0"],
        "report": [nowhere],
        "compare": [nowhere, out],
        "dft-inputs": [nowhere, "--out", out],
        "hull": ["build", nowhere, "--out", out + b".parquet"],
    }
    done = typed(verb, *words[verb], environment={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and done.stdout == b""
    assert done.stderr.startswith(b"jaxcrystal " + verb.encode() + b": ") and done.stderr.count(b"\n") == 1, done.stderr
    assert b"nowherecaf" in done.stderr


@pytest.mark.parametrize(
    ("words", "code"), [(["--help"], 141), (["evaluate", "--help"], 141), (["--version"], 141), (["dream"], 2)]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_command_quietly(words, code, unbuffered):
    """As in `jaxcrystal --help | head -1`: the pipe's other end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "jaxcrystal.cli", *words]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=environment)
    os.close(writing)
    assert done.stderr == b"" or code == 2
    assert done.returncode == code or (unbuffered and done.returncode == 0)  # argparse then takes no notice


def test_a_reader_that_leaves_while_a_verb_prints(tmp_path):
    """Standard error too is a pipe that nobody reads, as with `2>&1 | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    (tmp_path / "s.cif").write_text(CIF)
    command = [sys.executable, "-m", "jaxcrystal.cli", "evaluate", tmp_path / "s.cif", "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--workers", "0"], stdout=writing, stderr=subprocess.PIPE)
    assert done.returncode == 141 and b"Error" not in done.stderr and (tmp_path / "out" / "report.html").exists()
    done = subprocess.run([*command, "--workers", "0"], stdout=writing, stderr=writing)
    os.close(writing)
    assert done.returncode == 141


def test_a_broken_pipe_that_is_not_the_terminals_is_an_error_of_ours(tmp_path):
    script = """
import jaxcrystal.cli
def gone(*_):
    raise BrokenPipeError("of something else")
jaxcrystal.cli.report.run = gone
jaxcrystal.cli.main(["report", "x"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == 1 and b"BrokenPipeError: of something else" in done.stderr
