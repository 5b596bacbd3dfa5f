"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "kvstack"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Lowest first. A room (a module or a package right under kvstack) imports only from itself and from floors below its own.
FLOORS = [
    {"errors"},
    {"artefact", "checks", "fingerprint", "grammar", "rope"},
    {"environment", "codecs", "scorers"},
    {"allocators", "recipe", "kernels", "profile"},
    {"presets", "cache", "calibrate", "attention"},
    {"hf", "vllm"},
    {"lab"},
    {"eval", "bench"},
    {"cli"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
ROOMS = {p.stem if p.suffix == ".py" else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or any(p.glob("*.py"))}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> Iterator[str]:
    """The rooms of kvstack that a module imports anywhere, also inside functions; `__init__` for the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "use absolute imports"
            paths = [f"{node.module}.{a.name}" for a in node.names]
        else:
            continue
        for parts in (p.split(".") for p in paths):
            if parts[0] == "kvstack":
                yield parts[1] if len(parts) > 1 and parts[1] in ROOMS else "__init__"


def undocumented(tree: ast.Module, path: str) -> Iterator[str]:
    """Public classes, functions and methods without a docstring."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield f"{path}:{node.lineno} {node.name}"
            if isinstance(node, ast.ClassDef):
                yield from undocumented(ast.Module(node.body, []), path)


def test_every_room_has_a_floor() -> None:
    assert ROOMS - {"__init__"} == set(FLOOR), "add the new room to FLOORS, or drop the old one"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_go_downward(path: Path) -> None:
    own = room(path)
    for other in imported_rooms(ast.parse(path.read_text("utf-8"))):
        if own != "__init__":
            assert other == own or FLOOR.get(other, len(FLOORS)) < FLOOR[own], f"{own} must not import {other}"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text("utf-8")
    limit = 600 if room_or_tests(path) == "kernels" else 400
    assert len(text.splitlines()) <= limit, f"more than {limit} lines: one idea a file"
    assert ast.get_docstring(ast.parse(text)), "a module says what it is, its layout, and what it is not"


def room_or_tests(path: Path) -> str:
    return room(path) if path.is_relative_to(PACKAGE) else "tests"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_public_things_have_docstrings(path: Path) -> None:
    assert not list(undocumented(ast.parse(path.read_text("utf-8")), name(path)))


def test_the_rules_can_fail() -> None:
    tree = ast.parse("import kvstack\nfrom kvstack.cli import main\nfrom kvstack import errors\nclass A:\n    def f(self): ...")
    assert list(imported_rooms(tree)) == ["__init__", "cli", "errors"]
    assert [u.split()[1] for u in undocumented(tree, "x")] == ["A", "f"]
