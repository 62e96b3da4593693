"""Imports run one way: programs and scripts → models, data → stl. Scripts find one another and the packages, but not
the programs, which stand in no package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "stl": set(),
    "models": {"stl"},
    "data": {"stl"},
    "scripts": {"stl", "models", "data"},
}


def imported(path: Path) -> set[str]:
    """First parts of the names of the modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_below_it(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    rooms = {*MAY_IMPORT, *(path.stem for path in ROOT.glob("*.py"))}
    assert {"train", "eval"} < rooms
    for path in files:
        assert imported(path) & rooms <= MAY_IMPORT[room] | {room}, path
