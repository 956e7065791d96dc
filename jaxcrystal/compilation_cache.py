"""Compiled programs are kept in the user's cache folder: the next process that needs the same ones only reads them.

    $XDG_CACHE_HOME or ~/.cache / jaxcrystal / xla / <JAX's version and the processor>

JAX finds an entry by the program, its options and the devices. What runs on a CPU is made for its instructions besides,
and homes are shared by unlike machines: each kind of processor has a folder of its own. All may be removed at any time.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxcrystal.errors import UserError

SWITCH = "JAXCRYSTAL_COMPILATION_CACHE"  #: environment variable; `off` for no cache
LEAST_SECONDS = 0.2  #: programs that are compiled faster are not kept; JAX's default is 1


def enable() -> Path | None:
    """Has JAX keep compiled programs, unless the user has chosen a folder (`JAX_COMPILATION_CACHE_DIR`) or none.

    Returns the folder in use; None where there is none: a folder that cannot be written is noted on standard error.
    Asks JAX for its devices: on many hosts, after `hosts.start`. Raises UserError if `SWITCH` is neither on nor off.
    """
    chosen = os.environ.get(SWITCH, "on").lower()
    if chosen not in ("on", "off"):
        raise UserError(f"{SWITCH} is {chosen!r}; it must be on or off")
    if jax.config.jax_compilation_cache_dir is not None:
        return Path(jax.config.jax_compilation_cache_dir)
    if chosen == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (
            (Path(home) if home else Path.home() / ".cache") / "jaxcrystal" / "xla" / f"jax{jax.__version__}-{kind()}"
        )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        reason = getattr(error, "strerror", None) or error
        _note(
            f"note: compiled programs cannot be kept in {home or '~/.cache'} ({reason}); set XDG_CACHE_HOME to another "
            f"folder, or {SWITCH}=off"
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    compilation_cache.reset_cache()  # without a folder until now, JAX would go on without one
    return folder


@cache
def _note(line: str) -> None:
    """Once a process."""
    print(line, file=sys.stderr)


def kind() -> str:
    """The processors that programs are compiled for, as the name of a folder."""
    (*_, device) = jax.local_devices()
    if device.platform == "cpu":
        model = hashlib.sha256(_cpu().encode()).hexdigest()[:12]
        return f"cpu-{platform.machine()}-{model}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.platform}-{device.device_kind}")


def _cpu() -> str:
    """Model and instructions of this machine's processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    first = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    names = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(f"{name}: {first[name]}" for name in names if name in first)
