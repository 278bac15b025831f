"""Unbundling where packages or the network are missing: by its path, as a module, and the demo after it."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bundle_kit import MADE, ROOT, bundle, toy

from vst import cli
from vst.bundle.unbundle import options
from vst.demo import assets

__all__ = ["toy"]
LACKING = """
import sys
class Lacking:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jsonargparse", "docstring_parser", "rich", "timm", "PIL", "safetensors",
                                      "huggingface_hub", "onnx", "transformers", "accelerate", "sklearn", "pip"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Lacking())
"""
OFFLINE = """
import socket
def no_network(*args, **options):
    raise OSError("this machine has no network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = no_network
"""


def run(words, folder, custom, **more):
    """A Python with something changed at its start, and no program of a registry on its path."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site/sitecustomize.py").write_text(custom)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VST_", "HF_", "XDG_"))}
    env |= {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", "PATH": str(folder / "empty"), "HOME": str(folder / "home")}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=False, **more)


def test_by_its_path_torch_and_numpy_are_enough(toy, tmp_path):
    bundle(tmp_path / "out", "--for", "toy", "--made")
    words = [str(ROOT / "vst/bundle"), str(tmp_path / "out"), "--home", str(tmp_path / "there")]
    done = run(words, tmp_path, LACKING, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"in place: {tmp_path / 'there/grows'}" in done.stdout
    assert (tmp_path / "there/grows/deep/content").read_bytes() == MADE["grows"]
    done = run(words, tmp_path, LACKING, timeout=120)
    assert "there already: " in done.stdout
    (tmp_path / "out/part-0002").unlink()
    done = run(words, tmp_path, LACKING, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("FileNotFoundError: ")
    assert "lacks part-0002" in done.stderr
    assert done.stderr.count("\n") == 1


def test_as_a_module_without_the_command_lines_packages(toy, tmp_path):
    bundle(tmp_path / "out", "--for", "toy", "--made")
    lacking = re.sub(r"in \{.*?\}", 'in {"jsonargparse", "docstring_parser"}', LACKING, flags=re.S)
    done = run(["-m", "vst.bundle", str(tmp_path / "out")], tmp_path, lacking, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home/.cache/vst/shrinks/deep/content").read_bytes() == MADE["shrinks"]
    done = run(["-m", "vst", "unbundle", str(tmp_path / "out")], tmp_path, lacking, timeout=120)
    assert "needs jsonargparse" in done.stderr


def test_its_options_are_those_of_the_command():
    told = {name: p.default for name, p in inspect.signature(cli.unbundle).parameters.items() if name != "path"}
    own = vars(options().parse_args(["FOLDER"]))
    assert {**own, "overwrite": own["overwrite"] == "true"} == {"path": "FOLDER", **told}
    assert options().parse_args(["FOLDER", "--overwrite"]).overwrite == "true"


def test_archives_that_cannot_be_made_are_told(tmp_path, toy):
    toy.needs = ("onnx>=1.16",)
    bundle(tmp_path / "out", "--for", "toy")
    words = [str(ROOT / "vst/bundle"), str(tmp_path / "out"), "--home", str(tmp_path / "there")]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["requirements"] == ["torch", "onnx>=1.16"]
    hide = "import importlib.metadata as m\nown = m.distribution\ndef d(n):\n    if n == 'onnx':\n"
    hide += "        raise m.PackageNotFoundError(n)\n    return own(n)\nm.distribution = d\n"
    done = run(words, tmp_path, LACKING + hide, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: grows came as archives and cannot be made here without onnx>=1.16: install")
    assert (tmp_path / "there/archives/grows-1.0.whl").exists()
    assert "missing in this Python, and not among the wheels: onnx>=1.16" in done.stdout


@pytest.mark.assets
@pytest.mark.slow
def test_the_demo_runs_on_an_empty_machine_without_a_network(tmp_path):
    """From what is made here, so that nothing is fetched for the test either."""
    assets.prepare(quiet=True)
    out = tmp_path / "out"
    cli.main(["bundle", str(out), "--for", "demo", "--made", "--part-size", "60MB"])
    assert sorted(p.name for p in out.iterdir())[0] == "manifest.json"
    assert max(p.stat().st_size for p in out.iterdir()) == 60_000_000
    done = run(["-m", "vst", "unbundle", str(out)], tmp_path, OFFLINE, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "next:\n  vst demo\n" in done.stdout
    shutil.rmtree(out)
    there = tmp_path / "home/.cache/vst"
    assert {"clip-vit-base-patch16", "dinov2-small-saliency", "emoji"} <= {p.name for p in there.iterdir()}
    small = {"objectives": "[ridge]", "splits": "[10]", "pictures": 10, "probe_train": 40, "probe_test": 8}
    small |= {"heldout": 2, "repeats": 1}
    options = [word for name, value in small.items() for word in (f"--demo.{name}", str(value))]
    config = ["--config", str(ROOT / "configs/demo/short.yaml"), "--out", str(tmp_path / "run")]
    done = run(["-m", "vst", "demo", *config, *options], tmp_path, OFFLINE, timeout=250)
    assert done.returncode == 0, done.stderr
    results = json.loads(Path(tmp_path / "run/results.json").read_text())["results"]
    assert "VST-10" in {tower["name"] for tower in results["towers"]}
    shutil.rmtree(tmp_path / "home")
