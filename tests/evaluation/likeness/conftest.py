"""matminer's fingerprint is what the benchmarks time against, and what the tests prove against."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="session")
def peer():
    """The mean over the atoms of matminer's site fingerprint, of a structure."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import featurizer
    finally:
        sys.path.remove(str(BENCHMARKS))
    return featurizer.by_pymatgen
