"""Paths of folders and of a store, and what is done there with models; the store is the stand-in of object_store.py."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_llama import checkpoint, pieces  # noqa: F401  (fixtures)

from jaxcrystal import locks, paths
from jaxcrystal.cli import main
from jaxcrystal.config import TextFormat
from jaxcrystal.errors import UserError
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.weights.convert import convert
from jaxcrystal.weights.export import export
from jaxcrystal.weights.saved import describe, load_model, read_description


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("gs://bucket/models/llama", "gs://bucket/runs/a", "../../models/llama"),
        ("gs://bucket/models/llama", "gs://other/runs/a", "gs://bucket/models/llama"),
        ("gs://bucket/models/llama", "/work/runs/a", "gs://bucket/models/llama"),
        ("/work/models/llama", "gs://bucket/runs/a", "/work/models/llama"),
        ("/work/models/llama", "/work/runs/a", "../../models/llama"),
    ],
)
def test_a_path_is_found_again_from_a_folder(path, folder, expected, store):
    assert paths.relative(path, folder) == expected
    assert str(paths.joined(paths.as_path(folder), expected)) == path


def test_what_pathlib_made_of_a_path_in_a_store_is_mended(store):
    assert str(Path("gs://bucket/a")) == "gs:/bucket/a" and paths.is_remote(Path("gs://bucket/a"))
    assert str(paths.as_path(Path("gs://bucket/a"))) == str(paths.as_path("gs://bucket//a/")) == "gs://bucket/a"
    assert paths.on_disk("gs://bucket/a") == Path("runs/bucket/a") and paths.on_disk("a") == Path("a")


def test_a_folder_is_moved_as_copies(store):
    for name in ("x", "deep/y", "deep/deeper/z", "old/gone"):
        store.put(f"bucket/{name}" if "old" in name else f"bucket/a/{name}", name.encode())
    store.put("bucket/a/", b"")  # as other programs mark a folder
    paths.move(paths.as_path("gs://bucket/a"), paths.as_path("gs://bucket/old"))
    assert store.names() == [f"bucket/old/{name}" for name in ("deep/deeper/z", "deep/y", "x")]


def test_without_its_client_a_store_is_refused(monkeypatch):
    import fsspec

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        UserError, match=r"gs://bucket/a needs gcsfs; install it with `pip install 'jaxcrystal\[gcs\]'`"
    ):
        read_description("gs://bucket/a")


def test_the_command_line_starts_without_a_client_of_stores():
    """None of it is loaded where nothing lies in a store: it takes as long as the rest of `--help`."""
    code = "import sys, jaxcrystal.cli; jaxcrystal.cli._parser(); sys.exit('etils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == 0


def test_what_a_stores_client_raises_is_one_line(store, monkeypatch):
    class HttpError(Exception):
        """As gcsfs and Google's client raise: of classes of their own."""

    def denied(*_: object, **__: object) -> None:
        raise HttpError("no rights:\nstorage.objects.get")

    monkeypatch.setattr(type(paths.as_path("gs://bucket/a")), "read_text", denied)
    with pytest.raises(UserError, match=r"gs://bucket/a is not .*: HttpError: no rights: storage.objects.get; `jaxc"):
        read_description("gs://bucket/a")
    with pytest.raises(UserError, match=r"gs://bucket/b is not a model directory: model.json: No such file"):
        monkeypatch.undo()
        read_description("gs://bucket/b")


@pytest.mark.parametrize(
    "command",
    [
        "prepare crystals.csv --out gs://bucket/new",
        "sample --model gs://bucket/run --num 3 --out gs://bucket/new.parquet",
        "evaluate samples.parquet --out gs://bucket/new",
        "export --model gs://bucket/run --format hf --out gs://bucket/new",
        "hull build entries.json --out gs://bucket/new.parquet",
        "convert gs://bucket/hf --out gs://bucket/new",
    ],
)
def test_what_needs_a_disk_is_refused_in_one_line(command, store, capsys):
    assert main(command.split()) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "only model directories can lie in a store" in said and "gcloud storage cp" in said
    assert not store.names() and not list(Path().iterdir())


def test_data_in_a_store_are_refused_in_one_line(store, capsys):
    assert main(["train", "tiny_cpu", "--set", "data.train=gs://bucket/train.parquet"]) == 1
    assert "gs://bucket/train.parquet: only model directories" in capsys.readouterr().err


def test_a_lock_is_never_a_folder_in_place_of_a_store(store):
    with pytest.raises(UserError, match="only model directories"), locks.held("gs://bucket/a"):
        pass
    with locks.held(paths.on_disk("gs://bucket/a")):
        assert [path.name for path in Path("runs/bucket").iterdir()] == [".a.lock"]
    assert not Path("runs").exists()


def test_models_are_converted_to_a_store_and_exported_from_it(store, checkpoint):  # noqa: F811
    _, source = checkpoint()
    assert main(["convert", str(source), "--out", "gs://bucket/models/llama"]) == 0
    convert(source, "llama")
    there, here = load_model("gs://bucket/models/llama"), load_model("llama")
    assert replace(there, params=None, tokenizer=None) == replace(here, params=None, tokenizer=None)
    assert there.tokenizer.file == here.tokenizer.file
    assert main(["export", "--model", "gs://bucket/models/llama", "--format", "hf", "--out", "there"]) == 0
    export("llama", "here", "hf")
    names = sorted(path.name for path in Path("here").iterdir())
    assert names == sorted(path.name for path in Path("there").iterdir())
    assert all(Path("here", name).read_bytes() == Path("there", name).read_bytes() for name in names)
    with pytest.raises(UserError, match="gs://bucket/models/llama exists and is not an empty directory"):
        convert(source, "gs://bucket/models/llama")


def test_a_conversion_to_a_store_is_a_model_with_its_last_object(store, checkpoint, monkeypatch):  # noqa: F811
    """Whenever it stops, what is there is no model; a failure takes its objects away."""
    _, source = checkpoint()
    order, put = [], store.put
    monkeypatch.setattr(store, "put", lambda name, *rest: order.append(name) or put(name, *rest))
    convert(source, "gs://bucket/llama")
    assert order[-1] == "bucket/llama/model.json" and order.count("bucket/llama/model.json") == 1

    def full(name: str, *rest: object) -> int | None:
        if name.endswith("model.json"):
            raise RuntimeError("no more")
        return put(name, *rest)

    monkeypatch.setattr(store, "put", full)
    with pytest.raises(UserError, match="cannot write the directory gs://bucket/other: RuntimeError: no more"):
        convert(source, "gs://bucket/other")
    assert not store.names("bucket/other")


def test_a_store_with_something_else_is_no_place_for_a_model(store, checkpoint):  # noqa: F811
    _, source = checkpoint()
    config = convert(source, "llama")
    store.put("bucket/thesis/thesis.tex", b"years of work")
    with pytest.raises(UserError, match=r"gs://bucket/thesis holds 'thesis.tex' and no model.json"):
        describe("gs://bucket/thesis", config, None, TextFormat(), load_tokenizer("llama/tokenizer.model"))
    assert store.names() == ["bucket/thesis/thesis.tex"]
