"""Is this installation sound? Each line is a check that was run just now, with what it found."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import jax
import numpy as np

from jaxcrystal import __version__, box
from jaxcrystal.config import Augment, LlamaConfig, TextFormat
from jaxcrystal.crystals import packed
from jaxcrystal.crystals.dataset import CrystalSet
from jaxcrystal.errors import UserError
from jaxcrystal.model import attention_kernels
from jaxcrystal.model.attention import View, attend
from jaxcrystal.texts import prompts
from jaxcrystal.texts.tokenizer import load_tokenizer
from jaxcrystal.texts.writer import Examples, Writer, sentence_tokens
from jaxcrystal.training.speed import peak_flops

PACKAGES = (
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "pymatgen",
    "torch",
    "matgl",
    "chgnet",
    "smact",
    "moyopy",
    "spglib",
)
CRYSTALS = 400  #: that are written


def doctor(potential: str = "chgnet") -> bool:
    """Prints a line for every check; True if none failed."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("versions", _versions),
        ("devices", _devices),
        ("products", _products),
        ("attention", _attention),
        ("tokens", _tokens),
        ("box", lambda: f"{box.check()} parts of it are those that shipped"),
        ("potential", lambda: _potential(potential)),
    ]
    sound = True
    for name, check in checks:
        try:
            print(f"ok      {name}: {check()}")
        except UserError as error:
            sound = False
            print(f"FAILED  {name}: {error}")
    return sound


def _versions() -> str:
    found = [f"jaxcrystal {__version__}", f"Python {platform.python_version()}"]
    missing = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        found.append(f"not installed: {', '.join(missing)} (install jaxcrystal[evaluate] to judge crystals here)")
    return ", ".join(found)


def _devices() -> str:
    devices = jax.devices()
    total = float(jax.jit(lambda x: (x @ x).sum())(np.ones((64, 64), np.float32)))
    if total != 64**3:
        raise UserError(f"{devices[0].device_kind} multiplies wrongly: {total} instead of {64**3}")
    return f"{len(devices)} x {devices[0].device_kind} ({jax.default_backend()})"


def _products() -> str:
    """How fast the first device multiplies matrices in either `model.dtype`."""
    (wide, origin), (half, _) = (peak_flops(jax.devices()[0], dtype) for dtype in ("float32", "bfloat16"))
    if origin.startswith("data sheet"):
        return f"{half / 1e12:.0f} TFLOP/s ({origin})"
    faster = "bfloat16" if half > wide else "float32"
    told = f"{wide / 1e9:.0f} GFLOP/s in float32, {half / 1e9:.0f} in bfloat16"
    return f"{told}: train float weights with model.dtype={faster}"


def _attention() -> str:
    """The kernel that `auto` takes on this platform, against the reference."""
    config = LlamaConfig(dtype="bfloat16")
    kernel, why = attention_kernels.choose(config, 2, 256)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (2, 256, 4, config.head_dim), config.dtype) for key in keys]
    segments = np.repeat([[1, 2], [1, 0]], [100, 156], axis=1).astype(np.int32)
    try:
        found, expected = (
            np.asarray(attend(*inputs, View.of(name, 256, segments)), np.float32) for name in (kernel, "xla")
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{kernel} ({why}) does not run: {reason}; set model.attention to xla") from error
    error = np.abs(found - expected).max() / np.abs(expected).max()
    if not error < 0.02:
        raise UserError(f"{kernel} is wrong by {error:.3f} of the largest value; set model.attention to xla")
    return f"{kernel} ({why}), within {error:.4f} of the reference in bfloat16"


def _tokens() -> str:
    """The device's tokens of crystals that come with the package against the tokenizer's."""
    tokenizer, stored = load_tokenizer("compact"), packed.read(box.crystals("mp20-val"))[:CRYSTALS]
    found = [packed.unpacked(row).to_crystal(niggli=True) for row in stored]
    crystals = CrystalSet.from_crystals([row["material_id"] for row in stored], found, [{}] * len(stored))
    writer = Writer.of(tokenizer, TextFormat(), Augment(translate=False, infill=0, attributes=()))
    examples = Examples(
        writer.form.arrays(crystals), sentence_tokens(tokenizer, [{}] * len(stored)), np.arange(len(stored))
    )
    row = jax.tree.map(lambda x: x[:, None], examples)
    length = int(writer.bounds(examples)[1].max())
    rows = jax.jit(lambda e: writer.write(e, writer.draw(jax.random.key(0), e), length))(row)
    for i, tokens in enumerate(np.asarray(rows.tokens)):
        text = prompts.generation(writer.form, crystals.crystal(i), {})
        expected = [*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id]
        if tokens[: len(expected)].tolist() != expected:
            raise UserError(f"{crystals.ids[i]} is written otherwise on the device than by the tokenizer: report this")
    return f"{len(crystals)} crystals written on the device as the tokenizer writes them"


def _potential(name: str) -> str:
    from jaxcrystal.relaxation.potentials import load_potential

    potential = load_potential(name)
    note = f", {potential.note}" if potential.note else ""
    if potential.check.unchecked:
        note += f", not checked for {', '.join(potential.check.unchecked)}"
    return (
        f"{potential.name} passes its self-check (worst error {potential.check.worst:.3f} eV/atom{note}), "
        f"{len(potential.elements)} elements, energies on the scale {potential.reference}"
    )
