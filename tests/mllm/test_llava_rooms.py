"""The packages of llava_integration: arrows point down, and what is imported early is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "llava_integration"
BELOW = {
    "hosts": set(),
    "models": {"hosts"},
    "train": {"models", "hosts"},
    "answer": {"models", "hosts"},
    "evaluate": {"answer", "train", "models", "hosts"},
    "demo": {"answer", "train", "models", "hosts"},
}
HEAVY = ("transformers.trainer", "datasets", "peft", "lmms_eval", "matplotlib", "llava_integration.demo.job")


def imported(file):
    """Modules of the library that a file names in an import, inside functions as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_all_rooms_are_known():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(BELOW)


@pytest.mark.parametrize("room", BELOW)
def test_arrows_point_down(room):
    """A room imports itself, what is below it and vst; the package itself only for what it makes known."""
    for file in (ROOT / room).rglob("*.py"):
        for name in imported(file):
            parts = name.split(".")
            if parts[0] == "llava_integration" and len(parts) > 1:
                assert parts[1] in BELOW[room] | {room}, f"{file.relative_to(ROOT)} imports {name}"


def test_there_is_no_circle():
    done = []
    while left := [room for room in BELOW if room not in done]:
        ready = [room for room in left if BELOW[room] <= set(done)]
        assert ready, f"a circle among {left}"
        done += ready


@pytest.mark.parametrize("module", ["llava_integration.train.config", "llava_integration.commands"])
def test_options_are_read_without_what_runs_them(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() == "[]"
