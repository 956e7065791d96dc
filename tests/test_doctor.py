"""The doctor says what it found, line by line; a fault in one place fails its line and hides no other."""

import re

import jax
import pytest

from jaxcrystal import doctor
from jaxcrystal.cli import main
from jaxcrystal.crystals.dataset import load
from jaxcrystal.doctor import _attention
from jaxcrystal.errors import UserError
from jaxcrystal.model import attention_kernels
from jaxcrystal.texts.writer import Writer


def lines(text: str) -> dict[str, tuple[str, str]]:
    """(ok or FAILED, what was found) by the name of the check."""
    found = [re.fullmatch(r"(ok|FAILED) +(\w+): (.+)", line) for line in text.splitlines()]
    assert all(found), text
    return {match[2]: (match[1], match[3]) for match in found}


@pytest.mark.parametrize(("half", "told"), [(4e11, "bfloat16"), (1e11, "float32")])
def test_the_faster_dtype_is_named(half, told, monkeypatch):
    speeds = {"float32": (2e11, "timed here"), "bfloat16": (half, "timed here")}
    monkeypatch.setattr(doctor, "peak_flops", lambda device, dtype: speeds[dtype])
    assert doctor._products() == (
        f"200 GFLOP/s in float32, {half / 1e9:.0f} in bfloat16: train float weights with model.dtype={told}"
    )
    monkeypatch.setattr(doctor, "peak_flops", lambda device, dtype: (989e12, "data sheet, H200, bfloat16"))
    assert doctor._products() == "989 TFLOP/s (data sheet, H200, bfloat16)"


@pytest.mark.slow
def test_a_sound_installation(capsys):
    assert main(["doctor"]) == 0
    told = lines(capsys.readouterr().out)
    assert list(told) == ["versions", "devices", "products", "attention", "tokens", "box", "potential"]
    assert {state for state, _ in told.values()} == {"ok"}
    assert re.search(r"jaxcrystal \S+, Python 3\.\d+\.\d+, jax \d.*, pymatgen \d", told["versions"][1])
    assert re.fullmatch(r"8 x .+ \(cpu\)", told["devices"][1])
    assert re.fullmatch(
        r"\d+ GFLOP/s in float32, \d+ in bfloat16: train float weights with model.dtype=\w+", told["products"][1]
    )
    assert told["attention"][1].startswith("blocks (cpu has no kernel of its own), within 0.0")
    assert told["tokens"][1].startswith("400 crystals written on the device")
    assert told["box"][1] == "5 parts of it are those that shipped"
    assert re.match(r"CHGNet \S+ passes its self-check \(worst error 0\.\d{3} eV/atom\)", told["potential"][1])


def test_what_is_wrong_fails_its_line(monkeypatch, tmp_path, capsys):
    """A writer that writes one token of one crystal wrongly, and a directory that is no potential."""
    write = Writer.write

    def tampered(self, examples, draws, length):
        rows = write(self, examples, draws, length)
        return rows.replace(tokens=rows.tokens.at[3, 30].add(1))

    assert main(["doctor", "--potential", str(tmp_path)]) == 1
    told = lines(capsys.readouterr().out)
    assert told["potential"][0] == "FAILED" and str(tmp_path / "model.json") in told["potential"][1]
    assert [told[name][0] for name in ("versions", "devices", "tokens")] == ["ok"] * 3

    monkeypatch.setattr(Writer, "write", tampered)
    assert main(["doctor", "--potential", str(tmp_path / "none")]) == 1
    told = lines(capsys.readouterr().out)
    assert told["tokens"][0] == "FAILED" and load("mp20-val").ids[3] in told["tokens"][1]
    assert told["potential"][0] == "FAILED" and f"{tmp_path / 'none'} is no potential" in told["potential"][1]


def test_a_kernel_is_held_against_the_reference(monkeypatch):
    """The TPU's, interpreted; then with a segment that it does not see."""
    monkeypatch.setattr(attention_kernels, "KERNELS", {jax.default_backend(): "splash"})
    assert re.fullmatch(r"splash \(the kernel of \w+\), within 0\.0[01]\d\d of the reference in bfloat16", _attention())
    splash = attention_kernels.splash
    monkeypatch.setattr(attention_kernels, "splash", lambda q, k, v, segments: splash(q, k, v, 0 * segments))
    with pytest.raises(UserError, match=r"splash is wrong by \d\.\d+ of the largest value; set model.attention to xla"):
        _attention()
