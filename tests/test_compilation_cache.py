"""Compiled programs outlive their process, in the user's cache folder, unless the user says otherwise."""

import os
import subprocess
import sys

import jax
import pytest

from jaxcrystal import cli, compilation_cache
from jaxcrystal.errors import UserError

#: Compiles something; says which folder is in use and how often it was read.
SCRIPT = """
import jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(1)  # JAX has compiled before, as in a notebook
from jaxcrystal import compilation_cache
compilation_cache.LEAST_SECONDS = 0
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
folder = compilation_cache.enable()
assert compilation_cache.enable() == folder
def program(x):
    return jnp.sin(x) @ x
jax.jit(program)(jnp.ones((8, 8)))
print(folder, sum(hits))
"""


def run(home, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    kept |= {"XDG_CACHE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stderr
    folder, hits = done.stdout.split()
    return folder, int(hits), done.stderr


def test_the_second_process_reads_what_the_first_compiled(tmp_path):
    folder, hits, _ = run(tmp_path)
    assert folder == str(tmp_path / "jaxcrystal" / "xla" / f"jax{jax.__version__}-{compilation_cache.kind()}")
    assert hits == 0 and any("program" in name for name in os.listdir(folder))
    assert os.stat(folder).st_mode & 0o077 == 0  # what others could write, they could have us run
    again, hits, note = run(tmp_path)
    assert again == folder and hits >= 1 and note == ""


def test_the_users_own_folder_is_kept(tmp_path):
    folder, _, _ = run(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert folder == str(tmp_path / "own") and not (tmp_path / "home").exists()


def test_it_can_be_switched_off(tmp_path, monkeypatch):
    assert run(tmp_path, JAXCRYSTAL_COMPILATION_CACHE="off") == ("None", 0, "")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("JAXCRYSTAL_COMPILATION_CACHE", "maybe")
    with pytest.raises(UserError, match="JAXCRYSTAL_COMPILATION_CACHE is 'maybe'; it must be on or off"):
        compilation_cache.enable()


def test_a_folder_that_cannot_be_written_is_a_note(tmp_path):
    (tmp_path / "file").touch()
    folder, hits, note = run(tmp_path / "file")
    assert (folder, hits) == ("None", 0)
    assert note.startswith("note: compiled programs cannot be kept in ") and note.count("\n") == 1
    assert "JAXCRYSTAL_COMPILATION_CACHE=off" in note


@pytest.mark.parametrize(
    "typed",
    [
        ["convert", "hf", "--out", "llama"],
        ["train", "recipe.yaml"],
        ["sample", "--model", "run", "--num", "1", "--out", "s.csv"],
        ["export", "--model", "run", "--format", "hf", "--out", "x"],
    ],
)
def test_every_verb_that_compiles_keeps_its_programs(typed, tmp_path, monkeypatch):
    class Enabled(Exception):
        pass

    def enable():
        raise Enabled

    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("steps: 5\n")
    monkeypatch.setattr(compilation_cache, "enable", enable)
    with pytest.raises(Enabled):
        cli.main(typed)


def test_unlike_processors_have_folders_of_their_own(monkeypatch):
    kinds = {compilation_cache.kind()}
    monkeypatch.setattr(compilation_cache, "_cpu", lambda: "flags: sse2")
    kinds.add(compilation_cache.kind())

    class Device:
        platform, device_kind = "gpu", "NVIDIA H200/SXM"

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    kinds.add(compilation_cache.kind())
    assert len(kinds) == 3 and "gpu-NVIDIA-H200-SXM" in kinds
