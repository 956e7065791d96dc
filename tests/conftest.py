"""Every test sees 8 virtual CPU devices, so that sharding is exercised and never skipped."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the project; a public clone has none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data and weights of {SHARED}, which a public clone does not have")
    return SHARED
