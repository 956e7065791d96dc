"""The notebooks run, with fewer crystals than on their pages, and say what their pages say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_runs(script, tmp_path):
    environment = os.environ | {"QUICK": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() and list(tmp_path.iterdir()) == []  # what it writes lies elsewhere


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_page_has_the_text_of_its_notebook(script):
    """Every line of every cell, in order: `bash launch/notebooks.sh` makes the pages anew."""
    page = (FOLDER / "pages" / f"{script.stem}.md").read_text(encoding="utf-8")
    _, body = script.read_text(encoding="utf-8").split("# ---\n\n", 1)
    at = 0
    for cell in re.split(r"^# %%", body, flags=re.M)[1:]:
        head, _, text = cell.partition("\n")
        words = re.sub(r"^# ?", "", text, flags=re.M) if head.strip() == "[markdown]" else text
        for line in filter(None, (line.rstrip() for line in words.strip().splitlines())):
            found = page.find(line, at)
            assert found >= 0, f"{script.name} has {line!r}, its page has not: run bash launch/notebooks.sh"
            at = found + len(line)
    for picture in re.findall(r"!\[\w+\]\(([^)]+)\)", page):
        assert (FOLDER / "pages" / picture).stat().st_size > 500
