"""On what a figure was measured: the machine in words, versions, commit, date. The one place that knows.

Every result is a JSON file with these facts under `measured`, named after the benchmark and the machine.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "sentencepiece",
    "numpy",
    "scipy",
    "pymatgen-core",
    "matminer",
)


def cores() -> int:
    """CPU cores that this process may use: the threads that every engine is given."""
    return len(os.sched_getaffinity(0))


def accelerators() -> list[str]:
    """Names of the GPUs, by their driver's own tool, so that no library takes hold of one to be asked."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]


def facts(uses_accelerator: bool) -> dict[str, Any]:
    """What a reader must know to believe a figure, or to measure it again."""
    processor = _processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    words = f"{processor}, {cores()} cores, {memory / 2**30:.0f} GiB"
    found = accelerators() if uses_accelerator else []
    return {
        "machine": f"{len(found)} x {found[0]}; host {words}" if found else words,
        "accelerators": found,
        "cores": cores(),
        "memory_bytes": memory,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "load_before": os.getloadavg()[0],  #: a machine that was busy gives figures that mean little
        "nice": os.nice(0),
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def place(name: str, measured: dict[str, Any], directory: Path) -> Path:
    """Where the result `name` lies: `<name>_<machine>.json`; `measured` is `facts`."""
    described = measured["accelerators"][0] if measured["accelerators"] else f"{_processor()} {measured['cores']} cores"
    described = re.sub(r",.*", "", described)  # a GPU's memory is no part of its name
    return directory / f"{name}_{re.sub(r'[^a-z0-9]+', '-', described.lower()).strip('-')}.json"


def write(name: str, result: dict[str, Any], directory: Path) -> Path:
    """The result at its `place`; `result["measured"]` must be `facts`."""
    return write_to(place(name, result["measured"], directory), result)


def write_to(path: Path, result: dict[str, Any]) -> Path:
    """The result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def best_of(run: Any, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that does not count."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    return match[1].strip() if match else platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of this checkout, `+changes` behind it where files differ from it; `unknown` outside of git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
