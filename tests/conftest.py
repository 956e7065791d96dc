"""Every test sees 8 virtual CPU devices, so that sharding is exercised and never skipped.

Most of a test's time is compilation, and many tests compile the same: for the length of one run of the tests, compiled
programs are kept in a folder that pytest's workers and the processes that tests start all share. A process finds there
only what was compiled for as many devices as it has. And LLVM does not optimize (-O0), nor does XLA emit fusions by
MLIR: the programs are the same, their code is made in a quarter of the time and runs about as fast at these sizes.
`XLA_FLAGS=--xla_backend_optimization_level=3 pytest` tests the code that users run.
"""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

OURS = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OURS:  # before JAX is imported, which reads these; workers inherit them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxcrystal-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    # What is kept for a user (fingerprints, compiled programs) is not kept for who runs the tests.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="jaxcrystal-tests-")
# pytest's workers are one a core: threads of torch's would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # a later XLA has no such flag, and stops at it
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# No test is a stopwatch: a machine that is busy is not wrong.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")


def pytest_unconfigure() -> None:
    if OURS:
        for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
            shutil.rmtree(os.environ[name], ignore_errors=True)


SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project; a public clone has none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and weights of {SHARED}, which a public clone does not have")
    return SHARED


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty object store (object_store.py) and working directory, in which `gs://` must never become a folder."""
    from object_store import served

    monkeypatch.chdir(tmp_path)
    with served() as objects:
        yield objects
    assert not objects.refused and not Path("gs:").exists()
