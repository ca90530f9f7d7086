"""Imports of the package point one way, and stand at the top of a file (raydistill/README.md has the map of the rooms).

Files, classes and constructors stay short enough to be read at once. The page of the tests names every file of tests.
"""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "raydistill"
TESTS = PACKAGE.parent / "tests"
ROOT = {
    "__init__",
    "errors",
    "background",
    "precision",
    "imports",
    "transfer",
    "device_memory",
}  # small tools, which know nothing above them
LAYERS = (  # rooms of one line do not know each other; a room knows those of the lines above it
    {"diffusion", "shapes"},
    {"config"},
    {"storage"},
    {"tracking", "pictures", "spaces"},
    {"teachers"},
    {"data"},
    {"bridge"},
    {"distillation", "export"},
    {"evaluation", "planning", "build_shapes"},
    {"workers"},
    {"driver"},
    {"benchmark"},
    {"commands"},
    {"library"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
STORY = (  # read top to bottom
    "driver/job.py",
    "driver/pipeline.py",
    "driver/stages.py",
    "workers/distill.py",
    "distillation/schedule.py",
    "distillation/updates.py",
)
MAY_IMPORT_RAY = {"teachers", "data", "workers", "driver", "benchmark"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    """The room, or the module's own name where it stands at the package's root."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(node: ast.AST) -> list[str]:
    """Full names of the modules that a statement imports."""
    assert not getattr(node, "level", 0), f"line {node.lineno}: a relative import"
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [f"{node.module}.{alias.name}" if node.module == "raydistill" else node.module for alias in node.names]
    return []


def imports(file: Path) -> list[tuple[ast.AST, str]]:
    tree = ast.parse(file.read_text())
    return [(node, name) for node in ast.walk(tree) for name in imported(node)]


def test_the_root_holds_at_most_six_modules():
    found = {file.stem for file in PACKAGE.glob("*.py")}
    assert found == ROOT, "six are the most"
    assert {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")} == set(LEVEL)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_knows_its_own_room_and_those_below(file):
    room = room_of(file)
    for node, name in imports(file):
        if not name.startswith("raydistill."):
            continue
        other = name.split(".")[1]
        if other in ROOT or other == room:
            assert room not in ROOT or other in ROOT, f"line {node.lineno}: {name}"
            continue
        if room == "__init__":  # for type checkers alone: test_library.py sees that it loads nothing
            continue
        assert room in LEVEL, f"line {node.lineno}: a module of the root imports {name}"
        assert LEVEL[other] < LEVEL[room], f"line {node.lineno}: {room} imports {name}"


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_ray_is_imported_where_processes_are_started_alone(file):
    if room_of(file) in MAY_IMPORT_RAY:
        return
    names = [name for _, name in imports(file) if name.split(".")[0] == "ray"]
    assert set(names) <= {"ray.exceptions"}, names  # errors of Ray's that others tell apart


def commented(lines: list[str], node: ast.stmt) -> bool:
    """Whether a comment stands in the import's lines, or above it and the imports around it."""
    if any("#" in line and "noqa" not in line for line in lines[node.lineno - 1 : node.end_lineno]):
        return True
    above = node.lineno - 2
    while lines[above].strip().startswith(("import ", "from ")):
        if "#" in lines[above]:
            return True
        above -= 1
    return lines[above].strip().startswith("#")


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_an_import_inside_a_function_says_why(file):
    """Beside it, or once for the whole module: its docstring says "imported inside functions"."""
    text = file.read_text()
    tree, lines = ast.parse(text), text.splitlines()
    if "imported inside functions" in " ".join((ast.get_docstring(tree) or "").split()):
        return
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inner = {
        node.lineno: node for f in functions for node in ast.walk(f) if isinstance(node, ast.Import | ast.ImportFrom)
    }
    silent = [f"line {line}: {', '.join(imported(node))}" for line, node in inner.items() if not commented(lines, node)]
    assert not silent


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_classes_and_constructors_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= (300 if str(file.relative_to(PACKAGE)) in STORY else 450)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 200, node.name
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            assert len(node.args.args) - 1 <= 6, f"line {node.lineno}: positional parameters of a constructor"


@pytest.mark.parametrize("file", sorted(TESTS.rglob("*.py")), ids=lambda file: file.name)
def test_files_of_tests_are_short(file):
    assert len(file.read_text().splitlines()) <= 450


def test_the_page_of_the_tests_names_every_file_of_tests_and_no_other():
    patterns = re.findall(r"`(?:\w+/)?(test_\w[\w*]*\.py)`", (TESTS / "README.md").read_text())
    files = [file.name for file in TESTS.rglob("test_*.py")]
    assert not [file for file in files if not any(fnmatch(file, pattern) for pattern in patterns)]
    assert not [pattern for pattern in patterns if not any(fnmatch(file, pattern) for file in files)]
