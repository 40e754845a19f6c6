"""The package is a house with floors: what a module imports is on a lower floor, or in its own room."""

import ast
from pathlib import Path

import pytest

import keras_optkit

PACKAGE = Path(keras_optkit.__file__).parent

#: From the ground up.
FLOORS = [
    {
        "arguments",
        "calls",
        "direction",
        "files",
        "kernels",
        "meaning",
        "precision",
        "private",
        "registry",
        "saving",
        "tables",
    },
    {"backend", "space"},
    {"initializers", "layers", "regularizers", "schedules"},
    {"optimizers"},
    {"fit"},
    {"advice", "averaging", "data"},
    {"callbacks"},
    {"finding", "inspection"},
    {"tuning"},
    {"testing"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

#: Of the ground floor, what others of it stand on, the lowest first.
GROUND = [
    "calls",
    "direction",
    "kernels",
    "tables",
    "arguments",
    "precision",
    "private",
    "files",
    "saving",
    "meaning",
    "registry",
]


def imports(path):
    """The rooms of the package that a file imports from, but for what only type checkers see."""
    tree = ast.parse(path.read_text())
    unseen = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in unseen or not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        top, *room = node.module.split(".")
        if top == "keras_optkit":
            yield from room[:1] or [alias.name for alias in node.names]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} has no floor: add it to FLOORS"
    for room in set(imports(path)) - {own}:
        assert room in LEVEL, room
        if LEVEL[own] == LEVEL[room] == 0:
            assert GROUND.index(room) < GROUND.index(own), f"{own} imports {room}"
        else:
            assert LEVEL[room] < LEVEL[own], f"{own} imports {room}, which is not below it"


def test_engine_does_not_know_the_optimizer():
    """Its files are pure functions of a state and a plan; what hosts them is above."""
    for path in (PACKAGE / "optimizers" / "engine").glob("*.py"):
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not modules & {f"keras_optkit.optimizers.{name}" for name in ("optimizer", "building", "keywords")}, path


def test_no_file_is_longer_than_500_lines():
    lengths = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > 500} == {}
