"""The house has one direction: what each part may import, read off the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxcrystal"
BASE = {"jaxcrystal", "config", "errors"}
ALLOWED = {
    "config": {"errors"},
    "errors": set(),
    "hosts": BASE,
    "mesh": BASE,
    "crystals": BASE | {"mesh", "crystals"},
    "model": BASE | {"mesh", "crystals", "model"},
    "train": BASE | {"hosts", "mesh", "crystals", "model", "train"},
    "sample": BASE | {"hosts", "mesh", "crystals", "model", "sample"},
    "aot": BASE | {"mesh", "crystals", "model", "train", "sample", "aot"},
    "evaluate": BASE | {"evaluate", "crystals.crystal", "crystals.text"},
}
#: An accelerator host has none of these; they are imported inside the functions that need them, on the host.
HOST_ONLY = {"torch", "matgl", "chgnet", "pymatgen", "ase", "smact", "matplotlib"}


def imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    if top_level_only:
        # Blocks under `if TYPE_CHECKING` are not run.
        nodes = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    else:
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ALLOWED:
        for name in imports(path, top_level_only=False):
            if name.startswith("jaxcrystal."):
                inner = name.removeprefix("jaxcrystal.")
                allowed = any(inner == a or inner.startswith(a + ".") for a in ALLOWED[part] - BASE)
                allowed |= inner.split(".")[0] in ALLOWED[part] | {"__version__"}
                assert allowed, f"{part} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_before_it_is_needed(path):
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HOST_ONLY
    assert not heavy, f"{path.name} imports {heavy} at its top"


def test_torch_stays_below_evaluate():
    for path in FILES:
        if "evaluate" not in path.parts:
            assert "torch" not in {name.split(".")[0] for name in imports(path, top_level_only=False)}, path
