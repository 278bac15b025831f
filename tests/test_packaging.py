"""What is built for others: the wheel and the source archive, made without torch, and what is inside."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import vst

ROOT = Path(__file__).parents[1]
BUILD = """
import json, sys
sys.modules["torch"] = None  # importing it fails, as on a machine that only builds
from setuptools import build_meta
print(json.dumps([build_meta.build_wheel("built"), build_meta.build_sdist("built")]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and source archive, built from a copy: setuptools leaves folders where it builds."""
    source = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
        elif path.name in ("vst", "llava_integration", "configs", "docs", "eval", "train", "tools"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "built").mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel, archive = json.loads(done.stdout.splitlines()[-1])
    return source / "built" / wheel, source / "built" / archive


def test_the_wheel_holds_the_packages_whole(built):
    with zipfile.ZipFile(built[0]) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (licences,) = {name.rpartition("/")[0] for name in wheel.namelist() if name.endswith("/LICENSE")}
        assert f"{licences}/NOTICE" in wheel.namelist()
    sources = {
        str(path.relative_to(ROOT))
        for package in ("vst", "llava_integration")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"vst/py.typed", "llava_integration/py.typed"} <= sources
    assert any(name.startswith("llava_integration/evaluate/tasks/") and name.endswith(".yaml") for name in sources)
    assert inside == sources


def test_the_version_is_told_once(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Version"] == vst.__version__
    assert f"-{vst.__version__}-" in built[0].name
    assert '\nversion = "' not in (ROOT / "pyproject.toml").read_text()
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_source_archive_holds_what_the_scripts_need(built):
    with tarfile.open(built[1]) as archive:
        names = {file.name.partition("/")[2] for file in archive.getmembers() if file.isfile()}
    wanted = {"pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "NOTICE", "train/stitch.py"}
    assert wanted | {"configs/demo/short.yaml", "docs/demo.md", "vst/py.typed"} <= names
    assert all(name.endswith(".md") for name in names if name.startswith("docs/"))  # no results: megabytes of pictures
    assert not any(name.endswith(".pyc") for name in names)


def test_pre_commit_runs_the_ruff_that_ci_runs():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    hook = re.search(r"ruff-pre-commit\n\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())[1]
    assert hook == pinned
