"""The rooms of the two packages: arrows point down, without a circle, and what is imported early is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BELOW = {
    "vst": {
        "results": set(),
        "data": {"results"},
        "models": {"results"},
        "tree": {"models", "data", "results"},
        "fit": {"tree", "models", "data", "results"},
        "option_files": set(),
        "parsing": {"option_files", "fit", "models", "results"},
        "export": {"tree", "models", "results"},
        "measure": {"export", "fit", "tree", "models", "data", "results"},
        "demo": {"measure", "fit", "tree", "models", "data", "results"},
        "trunk": {"demo", "measure", "fit", "tree", "models", "data", "results"},
        "protocol": {"demo", "measure", "fit", "tree", "models", "data", "results"},
        "bundle": {"demo", "tree", "models", "results", "parsing"},
        "cli": {
            *("bundle", "protocol", "trunk", "export", "demo", "measure", "fit", "tree", "models", "results", "parsing")
        },
    },
    "llava_integration": {
        "hosts": set(),
        "models": {"hosts"},
        "train": {"models", "hosts"},
        "answer": {"models", "hosts"},
        "evaluate": {"answer", "train", "models", "hosts"},
        "demo": {"answer", "train", "models", "hosts"},
        "lmms": {"evaluate"},
        "commands": {"demo", "evaluate", "answer", "train", "models", "hosts"},
    },
}
ROOMS = [(package, room) for package, rooms in BELOW.items() for room in rooms]
HOSTS = {"transformers", "lmms_eval", "deepspeed", "llava_integration"}
HEAVY = ("transformers.trainer", "datasets", "peft", "lmms_eval", "matplotlib", "llava_integration.demo.job")


def imported(file):
    """All that a file names in an import, inside functions as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", BELOW)
def test_all_rooms_are_known(package):
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / package).glob("*.py") if not path.stem.startswith("__")}
    assert folders | files == set(BELOW[package])


@pytest.mark.parametrize(("package", "room"), ROOMS)
def test_arrows_point_down(package, room):
    """A room imports itself and what is below it; the package itself only for what that makes known."""
    file = ROOT / package / f"{room}.py"
    for path in [file] if file.exists() else (ROOT / package / room).rglob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1:
                assert parts[1] in BELOW[package][room] | {room}, f"{path.relative_to(ROOT)} imports {name}"
            assert package != "vst" or parts[0] not in HOSTS, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("package", BELOW)
def test_there_is_no_circle(package):
    below, done = BELOW[package], []
    while left := [room for room in below if room not in done]:
        ready = [room for room in left if below[room] <= set(done)]
        assert ready, f"a circle among {left}"
        done += ready


@pytest.mark.parametrize("module", ["llava_integration.train.config", "llava_integration.commands"])
def test_options_are_read_without_what_runs_them(module):
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() == "[]"
