"""Executes notebooks/*.py (percent format, as Jupyter opens them with jupytext) and writes pages that read on the web.

    python launch/notebooks.py [notebooks/01_quick_start.py ...]

A page is Markdown, its pictures are files beside it. Bars and notes (stderr) are left out: they are of the run, not of
what it found. A cell that fails ends the program, and its page stays as it was.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"


def executed(script: Path) -> NotebookNode:
    """The notebook with its outputs, but of stderr."""
    notebook = jupytext.read(script)
    NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def write(notebook: NotebookNode, page: Path) -> None:
    files = page.with_name(f"{page.stem}_files")
    text, resources = MarkdownExporter().from_notebook_node(
        notebook, {"unique_key": page.stem, "output_files_dir": files.name}
    )
    shutil.rmtree(files, ignore_errors=True)
    for name, content in resources["outputs"].items():
        place = page.parent / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    page.write_text(text.strip() + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", type=Path, nargs="*", default=sorted(FOLDER.glob("*.py")))
    for script in parser.parse_args(arguments).scripts:
        print(f"{script.name} ...", flush=True)
        page = FOLDER / "pages" / f"{script.stem}.md"
        page.parent.mkdir(exist_ok=True)
        write(executed(script), page)
        print(f"  written to {page.relative_to(FOLDER.parent)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
