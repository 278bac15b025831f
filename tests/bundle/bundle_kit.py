"""Toy recipes, a bundle of them, and bundles that are forged."""

import hashlib
import io
import random
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from vst import cli
from vst.bundle import sets
from vst.bundle.manifest import Entry, Manifest
from vst.bundle.parts import PartsWriter
from vst.demo import assets

ROOT = Path(__file__).parents[2]
PACKED = {"grows": b"seed" * 500, "shrinks": b"many" * 5000}  # what the archives hold
MADE = {"grows": random.Random(0).randbytes(12_000), "shrinks": b"few" * 100}  # what the folders do


def sha(content):
    return hashlib.sha256(content).hexdigest()


def package(name):
    content = PACKED[name]
    return assets.Package(name, "1.0", "pypi", f"{name}-1.0.whl", sha(content), len(content))


class Toy:
    """Recipes ``grows`` (its folder is larger than its archive) and ``shrinks``, and the registry they are from."""

    def __init__(self):
        self.network, self.fetched, self.needs = True, [], ()

    def make(self, name):
        def made(archives, folder):
            assert archives[0].read_bytes() == PACKED[name]
            (folder / "deep").mkdir()
            (folder / "deep" / "content").write_bytes(MADE[name])
            (folder / "config.json").write_text("{}\n")

        return made

    def recipes(self):
        return tuple(
            assets.Recipe(n, (package(n),), 1, self.make(n), len(MADE[n]) + 3, self.needs if n == "grows" else ())
            for n in PACKED
        )

    def download(self, wanted, folder):
        if not self.network:
            raise RuntimeError("no registry can be reached")
        self.fetched.append(wanted.name)
        (folder / wanted.filename).write_bytes(PACKED[wanted.name])


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toys as what ``--for toy`` takes, with an empty folder of assets here."""
    toy, module = Toy(), ModuleType("toy_recipes")
    module.recipes = toy.recipes
    monkeypatch.setitem(sys.modules, "toy_recipes", module)
    monkeypatch.setitem(sets.SETS, "toy", sets.RecipeSet(("toy_recipes",), "demo", ("torch",), "vst demo"))
    monkeypatch.setattr(assets, "_download", toy.download)
    monkeypatch.setenv("VST_HOME", str(tmp_path / "here"))
    return toy


def bundle(out, *words):
    """``vst bundle``; what is in the folder afterwards."""
    cli.main(["bundle", str(out), "--part-size", "2kB", *map(str, words)])
    return sorted(path.name for path in Path(out).iterdir())


def unbundle(folder, there, *words):
    """``vst unbundle`` into a home."""
    cli.main(["unbundle", str(folder), "--home", str(there), *map(str, words)])


def refusal(call, *args):
    """The one sentence that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        call(*args)
    said = str(stop.value)
    assert "\n" not in said
    return said


def tree_of_files(folder):
    """Content of every file below a folder, by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def file_header(name, size, kind=tarfile.REGTYPE, to=""):
    header = tarfile.TarInfo(name)
    header.size, header.type, header.linkname = size, kind, to
    return header


def forge(out, stream, members, **values):
    """A bundle whose digests are right: ``stream`` is headers with contents, ``members`` paths with contents."""
    out.mkdir()
    with PartsWriter(out, 2000, lambda _: None) as writer:
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for header, content in stream:
                tar.addfile(header, io.BytesIO(content))
        parts = writer.finish()
    entries = tuple(Entry(path, len(content), sha(content)) for path, content in members)
    empty = dict.fromkeys(("asked", "whole", "assets", "trees", "sources", "requirements"), ())
    Manifest(**{"written_by": "0", "parts": parts, "members": entries, **empty, **values}).write(out)
    return out
