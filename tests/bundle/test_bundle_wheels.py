"""Wheels: files as they are, names through pip, and the line that installs them there."""

import subprocess
import sys
import zipfile

import pytest
from bundle_kit import bundle, refusal, toy, tree_of_files, unbundle

from vst.bundle import sets, wheels
from vst.bundle.unbundle import missing_of

__all__ = ["toy"]
TINY = ["--for", "toy", "--wheels"]


def wheel(folder, name, version="1.0"):
    """A wheel that pip installs: one module of one line."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "here = True\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def test_files_and_folders_come_and_their_line_installs_them(toy, tmp_path, monkeypatch, capsys):
    one, two = wheel(tmp_path / "a", "toy_one"), wheel(tmp_path / "b", "toy_two")
    monkeypatch.setitem(
        sets.SETS, "toy", sets.RecipeSet(("toy_recipes",), "demo", ("torch", "toy-one>=1.0", "toy.three"), "vst demo")
    )
    bundle(tmp_path / "out", *TINY, one, tmp_path / "b")
    assert "toy_one-1.0-py3-none-any.whl: wheel, " in capsys.readouterr().out
    unbundle(tmp_path / "out", tmp_path / "there")
    told = capsys.readouterr().out
    there = tmp_path / "there/wheels"
    assert tree_of_files(there) == {one.name: one.read_bytes(), two.name: two.read_bytes()}
    assert "missing in this Python, and not among the wheels: toy.three" in told
    (line,) = [line.strip() for line in told.splitlines() if "pip install" in line]
    assert line == f"{sys.executable} -m pip install --no-index --find-links {there} 'toy-one>=1.0'"
    subprocess.run(f"{line} --target {tmp_path / 'site'} --quiet", shell=True, check=True, timeout=120)
    assert (tmp_path / "site/toy_one.py").exists()
    unbundle(tmp_path / "out", tmp_path / "there", "--wheels", tmp_path / "elsewhere")
    assert tree_of_files(tmp_path / "elsewhere") == tree_of_files(there)


def test_names_go_through_pip_for_the_machine_that_was_named(toy, tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, **_):
        commands.append(command)
        wheel(type(tmp_path)(command[command.index("--dest") + 1]), "jsonargparse")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    machine = ["--wheels-python", "3.12", "--wheels-platform", "manylinux_2_28_x86_64", "manylinux2014_x86_64"]
    bundle(tmp_path / "out", *TINY, "jsonargparse==1.0", "onnx", *machine, "--wheels-dependencies", "false")
    (command,) = commands
    assert command[:6] == [sys.executable, "-m", "pip", "download", "--only-binary", ":all:"]
    text = " ".join(command)
    assert "--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --no-deps" in text
    assert command[-3:] == ["--", "jsonargparse==1.0", "onnx"]
    assert "jsonargparse-1.0-py3-none-any.whl: wheel" in capsys.readouterr().out
    bundle(tmp_path / "two", *TINY, "onnx")
    assert not {"--python-version", "--platform", "--no-deps"} & set(commands[1])


def test_what_pip_says_is_told_in_one_sentence(toy, tmp_path, monkeypatch):
    failed = "WARNING: retrying\nERROR: Could not find a version (from versions: none)\nERROR: No matching x==9\n"
    monkeypatch.setattr(wheels.subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", failed))
    said = refusal(bundle, tmp_path / "out", *TINY, "x==9")
    assert said == (
        "RuntimeError: pip could not download x==9 (status 1): Could not find a version (from versions: none) No "
        "matching x==9; check names, versions and the network, or give wheel files."
    )
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    assert "This Python has no pip" in refusal(bundle, tmp_path / "out", *TINY, "x==9")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--wheels", "{tmp}/none.whl"], "none.whl is no wheel, or there is no such file"),
        (["--wheels", "{tmp}"], "holds no wheels; expected a folder of .whl files"),
        (["--wheels", "onnx", "--wheels-python", "three"], "wheels_python is 'three'; expected a version such as 3.12"),
        (["--wheels-python", "3.12"], "give --wheels, too"),
    ],
)
def test_what_is_no_wheel_is_refused(toy, tmp_path, words, told):
    said = refusal(bundle, tmp_path / "out", "--for", "toy", *(w.format(tmp=tmp_path) for w in words))
    assert told in said


def test_requirements_that_this_python_meets():
    met = ["torch", "torch>=2.0", "jsonargparse[signatures]>=4.39", "huggingface_hub>=0.36", "Pillow>=1"]
    assert missing_of(met) == []
    lacks = ["no-such-package", "torch>=999", "torch>=2.0.0.0.x", "no.such[extra]>=1"]
    assert missing_of([*lacks, *met]) == lacks


def test_an_extra_whose_package_is_missing_is_missing(monkeypatch):
    import importlib.metadata

    own = importlib.metadata.distribution

    def distribution(name):
        if name.replace("_", "-") == "typeshed-client":
            raise importlib.metadata.PackageNotFoundError(name)
        return own(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert missing_of(["jsonargparse>=4.39", "jsonargparse[signatures]>=4.39"]) == ["jsonargparse[signatures]>=4.39"]


def test_requirements_are_those_that_the_package_declares():
    import re

    tomllib = pytest.importorskip("tomllib")
    from bundle_kit import ROOT

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"]

    def declared(*names):
        own = [r for name in names for r in extra[name]]
        return {r for r in own if not r.startswith("vfm-stitch-tree")}

    from llava_integration.demo import assets as language
    from vst.demo import assets

    needs = [r for recipe in (*assets.recipes(), *language.recipes()) for r in recipe.needs]
    demo, llava = sets.SETS["demo"].requirements, sets.SETS["llava-demo"].requirements
    onnx = {r for r in needs if re.match("onnx", r)}
    gguf = {r for r in needs if re.match("gguf", r)}
    assert set(demo) | onnx == set(project["dependencies"]) | declared("fit", "eval", "demo")
    assert set(llava) | onnx | gguf == set(project["dependencies"]) | declared(
        "fit", "eval", "demo", "llava", "llava-demo"
    )
    assert set(sets.OPEN_CLIP) <= declared("hub")
