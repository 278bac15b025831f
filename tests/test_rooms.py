"""The rooms of vst: arrows point down, without a circle, and the library never imports its hosts."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "vst"
BELOW = {
    "results": set(),
    "data": {"results"},
    "models": {"results"},
    "tree": {"models", "data", "results"},
    "fit": {"tree", "models", "data", "results"},
    "parsing": {"fit"},
    "measure": {"fit", "tree", "models", "data", "results"},
    "demo": {"measure", "fit", "tree", "models", "data", "results"},
    "trunk": {"demo", "measure", "fit", "tree", "models", "data", "results"},
    "protocol": {"demo", "measure", "fit", "tree", "models", "data", "results"},
    "cli": {"protocol", "trunk", "demo", "measure", "fit", "tree", "models", "data", "results", "parsing"},
}
FORBIDDEN = {"transformers", "lmms_eval", "deepspeed", "llava_integration"}


def imported(file):
    """All that a file names in an import, inside functions as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room):
    return [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else list((ROOT / room).rglob("*.py"))


def test_all_rooms_are_known():
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms | {path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("__")} == set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_arrows_point_down(room):
    for file in files(room):
        for name in imported(file):
            parts = name.split(".")
            assert parts[0] not in FORBIDDEN, f"{file.relative_to(ROOT)} imports {name}"
            if parts[0] == "vst":
                assert parts[1] in BELOW[room] | {room}, f"{file.relative_to(ROOT)} imports {name}"


def test_there_is_no_circle():
    done = []
    while left := [room for room in BELOW if room not in done]:
        ready = [room for room in left if BELOW[room] <= set(done)]
        assert ready, f"a circle among {left}"
        done += ready
