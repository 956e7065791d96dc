"""The house has one direction: what each part may import, read off the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxcrystal"
GROUND = {
    "jaxcrystal",
    "box",
    "compilation_cache",
    "config",
    "errors",
    "hosts",
    "locks",
    "mesh",
    "paths",
    "workers",
    "worker_process",
    "yardstick",
}
#: What each room may import beside the ground and itself.
ROOMS = {
    "crystals": set(),
    "texts": {"crystals"},
    "reader": {"crystals"},
    "model": {"crystals"},
    "weights": {"crystals", "texts", "model"},
    "training": {"crystals", "texts", "model", "weights"},
    "sampling": {"crystals", "texts", "model", "weights"},
    "scoring": {"crystals", "texts", "model", "weights", "sampling"},
    "aot": {"crystals", "texts", "model", "weights", "training", "sampling"},
    "relaxation": {"crystals", "reader"},
    "hull": {"crystals", "reader", "relaxation"},
    "evaluation/likeness": {"crystals"},
    "evaluation": {"crystals", "reader", "relaxation", "hull", "evaluation/likeness"},
    "report": {"crystals", "reader", "evaluation"},
    "improvement": {"crystals", "reader", "weights", "sampling", "relaxation", "evaluation", "report", "interface"},
    "interface": {"crystals", "reader", "training", "sampling", "scoring", "relaxation", "evaluation", "report"},
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


def room_of(module: str) -> str:
    """The room of a module such as jaxcrystal.evaluation.likeness.magpie; a file of the ground is its own."""
    parts = module.split(".")[1:]
    longest = next((n for n in (2, 1) if "/".join(parts[:n]) in ROOMS), 1)
    return "/".join(parts[:longest]) or "jaxcrystal"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(module_of(path))
    allowed = ROOMS[room] | {room} | GROUND if room in ROOMS else GROUND
    if room in ROOMS or room in GROUND - {"jaxcrystal"}:
        for name in imports(path, top_level_only=False):
            if name.split(".")[0] == "jaxcrystal":
                assert room_of(name) in allowed | {"__version__"}, f"{room} must not import {name}"


def test_one_file_knows_which_text_formats_there_are():
    """Whoever writes or reads texts asks `form_of`; the compact tokenizer has pieces for the words of the paper's."""
    chooses, forms = "jaxcrystal.texts.forms", {"texts/p1"}
    for path in FILES:
        if not any(path.is_relative_to(PACKAGE / form) for form in forms):
            known = {name for name in imports(path, False) for form in forms if f"{form.replace('/', '.')}." in name}
            words = {"jaxcrystal.texts.p1.text.REQUEST"} if path.name == "sentence_pieces.py" else set()
            assert module_of(path) == chooses or known == words, f"{path} must not import {known}"


def test_the_package_itself_imports_the_interface_alone():
    """What `import jaxcrystal` runs is on the way to every module: it must be light, and need no room."""
    found = imports(PACKAGE / "__init__.py", top_level_only=True)
    assert {name for name in found if name.startswith("jaxcrystal")} == {
        "jaxcrystal.errors.UserError",
        *(
            f"jaxcrystal.interface.functions.{name}"
            for name in ("evaluate", "load", "prepare", "read", "relax", "templates", "train")
        ),
    }
    found = imports(PACKAGE / "interface" / "functions.py", top_level_only=True)
    assert {name.split(".")[0] for name in found} <= {
        "__future__",
        "collections",
        "contextlib",
        "os",
        "pathlib",
        "sys",
        "typing",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_do_not_reach_up_to_the_interface(path):
    """`jaxcrystal.evaluate(...)` is for what stands above the rooms: the command line, the demo."""
    if room_of(module_of(path)) in ROOMS:
        used = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxcrystal"
        }
        assert used <= {"__version__"}


def test_no_two_files_import_each_other():
    """No circle between files, however long; what is imported inside a function counts too."""
    modules = {module_of(path): path for path in FILES}
    needs = {}
    for module, path in modules.items():
        found = imports(path, top_level_only=False)
        needs[module] = {m for name in found for m in (name, name.rpartition(".")[0]) if m in modules} - {module}
        needs[module] = {m for m in needs[module] if modules[m].name != "__init__.py"}
    while free := [module for module, others in needs.items() if not others & needs.keys()]:
        for module in free:
            del needs[module]
    assert not needs, f"these import each other: {needs}"


def test_no_room_is_larger_than_a_fifth():
    lines = {}
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".js", ".css", ".html"):
            room = path.relative_to(PACKAGE).parts[0]
            lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    assert max(lines.values()) <= sum(lines.values()) / 5, lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_before_it_is_needed(path):
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HOST_ONLY
    assert not heavy, f"{path.name} imports {heavy} at its top"


def test_torch_stays_where_potentials_are():
    for path in FILES:
        if "relaxation" not in path.parts:
            assert "torch" not in {name.split(".")[0] for name in imports(path, top_level_only=False)}, path
