"""docs/python.md is run as it stands, in one process, from an empty folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "python.md"


@pytest.mark.slow
def test_every_example_runs(tmp_path):
    text = DOCS.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```") // 2 >= 8  # every block is Python
    (tmp_path / "examples.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run([sys.executable, "examples.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "novelty.by_matching" in done.stdout and "eV/atom after" in done.stdout and "nats per token" in done.stdout
    assert (tmp_path / "kept" / "report.html").read_bytes()[:15] == b"<!doctype html>"
    # Importing is no surprise: the functions that the page names are those that there are.
    named = set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE))
    import jaxcrystal

    assert named == {name for name in jaxcrystal.__all__ if name[0].islower()}
