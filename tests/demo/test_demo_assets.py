"""The offline default: fetching, checking, and what stands in the folders afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress

from vst.demo import assets, unchanged

SILENT = Progress(disable=True)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def package_of(content: bytes, registry: str = "npm", filename: str = "toy-1.0.tgz") -> assets.Package:
    return assets.Package("toy", "1.0", registry, filename, hashlib.sha256(content).hexdigest(), len(content))


def fake_npm(folder: Path, monkeypatch, script: str) -> None:
    """An ``npm`` on PATH that runs ``script`` in the folder it is called in."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_home(monkeypatch):
    monkeypatch.setenv("VST_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert assets.home() == Path("/a")
    monkeypatch.delenv("VST_HOME")
    assert assets.home() == Path("/b/vst")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert assets.home() == Path("/c/.cache/vst")


class TestFetch:
    def test_downloads_once(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, 'echo "$@" >> ../../calls; printf good > toy-1.0.tgz')
        for _ in range(2):
            path = assets.fetch(package_of(b"good"), SILENT)
            assert path == root / "archives/toy-1.0.tgz"
            assert path.read_bytes() == b"good"
        assert (root / "calls").read_text().splitlines() == ["pack --silent toy@1.0"]
        assert sorted(p.name for p in (root / "archives").iterdir()) == ["toy-1.0.tgz"]

    def test_pypi_command(self, root, monkeypatch):
        commands = []

        def run(command, cwd, **_):
            commands.append(command)
            (cwd / "toy-1.0.whl").write_bytes(b"good")
            return assets.subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(assets.subprocess, "run", run)
        assets.fetch(package_of(b"good", "pypi", "toy-1.0.whl"), SILENT)
        (command,) = commands
        assert command[:4] == [assets.sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary", ":all:", "toy==1.0"} <= set(command)

    def test_wrong_bytes_downloaded(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, "printf evil > toy-1.0.tgz")
        package = package_of(b"good")
        with pytest.raises(RuntimeError) as error:
            assets.fetch(package, SILENT)
        given = hashlib.sha256(b"evil").hexdigest()
        assert given in str(error.value)
        assert package.sha256 in str(error.value)
        assert "mirror" in str(error.value)
        assert list((root / "archives").iterdir()) == []

    def test_wrong_bytes_on_disk(self, root):
        (root / "archives").mkdir(parents=True)
        (root / "archives/toy-1.0.tgz").write_bytes(b"goo")
        with pytest.raises(
            RuntimeError, match=r"\(3 bytes\); expected .* \(4 bytes\) for toy 1.0: delete .*toy-1.0.tgz"
        ):
            assets.fetch(package_of(b"good"), SILENT)

    def test_other_file_downloaded(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, "printf good > other.tgz")
        with pytest.raises(RuntimeError, match=r"npm brought \['other.tgz'\] .* expected toy-1.0.tgz"):
            assets.fetch(package_of(b"good"), SILENT)

    def test_npm_fails(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, "echo no such host >&2; exit 7")
        with pytest.raises(RuntimeError, match=r"(?s)status 7; expected 0.*no such host"):
            assets.fetch(package_of(b"good"), SILENT)

    def test_npm_missing(self, root, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match=r"npm was not found.*install Node.js.*toy-1.0.tgz"):
            assets.fetch(package_of(b"good"), SILENT)

    def test_pip_missing(self, root, monkeypatch):
        monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"has no pip.*-m ensurepip"):
            assets.fetch(package_of(b"good", "pypi"), SILENT)


class TestPrepare:
    """With toy recipes, whose archives are put in place by hand."""

    @pytest.fixture
    def made(self, root, monkeypatch):
        made = []

        def make(archives, folder):
            made.append(archives[0].stem)
            time.sleep(0.05)
            (folder / "content").write_bytes(archives[0].read_bytes())

        recipes = tuple(
            assets.Recipe(n, (package_of(n.encode(), filename=f"{n}.tgz"),), 1, make) for n in ("dino", "clip", "moji")
        )
        monkeypatch.setattr(assets, "_RECIPES", recipes)
        return made

    @staticmethod
    def place_archives(root):
        (root / "archives").mkdir(parents=True, exist_ok=True)
        for name in ("dino", "clip", "moji"):
            (root / "archives" / f"{name}.tgz").write_bytes(name.encode())

    def test_twice(self, root, made):
        self.place_archives(root)
        ready = assets.prepare(quiet=True)
        assert ready == assets.Assets(dinov2=root / "dino", clip=root / "clip", emoji=root / "moji")
        assert (ready.emoji / "content").read_bytes() == b"moji"
        assert sorted(p.name for p in root.iterdir()) == ["clip", "digests.json", "dino", "lock", "moji", "ready.json"]
        assert assets.prepare(quiet=True) == ready
        assert made == ["dino", "clip", "moji"]

    @pytest.mark.parametrize(
        "change", ["version", "archive", "cut", "gone", "same size", "foreign", "a file", "ready.json"]
    )
    def test_made_anew(self, root, made, monkeypatch, change, capsys):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        self.place_archives(root)
        dino, clip, moji = assets._RECIPES
        expected = ["clip"]
        if change == "version":
            clip = replace(clip, version=2)
        elif change == "archive":
            clip = replace(clip, packages=(package_of(b"new", filename="clip.tgz"),))
            (root / "archives/clip.tgz").write_bytes(b"new")
        elif change == "cut":
            (root / "clip/content").write_bytes(b"cl")
        elif change == "gone":
            (root / "clip/content").unlink()
        elif change == "same size":
            (root / "clip/content").write_bytes(b"clap")
        elif change == "foreign":
            (root / "clip/other").write_bytes(b"")
        elif change == "a file":
            (root / "clip/content").unlink()
            (root / "clip").rmdir()
            (root / "clip").write_bytes(b"clip")
        else:
            (root / "ready.json").write_text("{")
            expected = ["dino", "clip", "moji"]
        monkeypatch.setattr(assets, "_RECIPES", (dino, clip, moji))
        capsys.readouterr()
        assets.prepare()
        told = " ".join(capsys.readouterr().err.split())
        changed_here = change in ("cut", "gone", "same size", "foreign", "a file")
        assert ("clip is not what was made any more" in told) == changed_here
        assert made == expected
        assert [path.name for path in (root / "clip").iterdir()] == ["content"]
        assert (root / "clip/content").read_bytes() == (b"new" if change == "archive" else b"clip")

    def test_an_edit_that_keeps_size_and_time_is_seen(self, root, made):
        self.place_archives(root)
        assets.prepare(quiet=True)
        self.place_archives(root)
        content = root / "clip/content"
        before = content.stat()
        content.write_bytes(b"clap")
        os.utime(content, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert content.stat().st_mtime_ns == before.st_mtime_ns
        assets.prepare(quiet=True)
        assert content.read_bytes() == b"clip"

    def test_bytes_are_read_once_where_times_moved(self, root, made, monkeypatch):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        reads, digest = [], unchanged._digest
        monkeypatch.setattr(unchanged, "_digest", lambda folder: reads.append(folder.name) or digest(folder))
        assets.prepare(quiet=True)
        assert reads == []
        os.utime(root / "clip/content")
        assets.prepare(quiet=True)
        assert set(reads) == {"clip"}
        reads.clear()
        assets.prepare(quiet=True)
        assert (reads, made) == ([], [])

    def test_a_home_of_a_version_that_kept_no_digests(self, root, made):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        ready = (root / "ready.json").read_bytes()
        (root / "digests.json").unlink()
        assets.prepare(quiet=True)
        assert made == []
        assert (root / "ready.json").read_bytes() == ready  # that version compares it as a whole
        self.place_archives(root)
        (root / "clip/content").write_bytes(b"clap")
        assets.prepare(quiet=True)
        assert made == ["clip"]

    @pytest.mark.parametrize("name", ["ready.json", "digests.json"])
    @pytest.mark.parametrize("text", ["", "[]", "3", '{"clip": 3}', '{"clip": {"sha256": 3}}', "\udcff"])
    def test_notes_that_are_damaged(self, root, made, name, text):
        self.place_archives(root)
        assets.prepare(quiet=True)
        self.place_archives(root)
        (root / name).write_bytes(text.encode(errors="surrogateescape"))
        assets.prepare(quiet=True)
        assert [(root / folder / "content").read_bytes() for folder in ("dino", "clip", "moji")] == [
            b"dino", b"clip", b"moji",
        ]  # fmt: skip
        assert assets._unseen(assets._RECIPES, root) == []

    def test_a_home_that_cannot_be_written_to(self, root, made, monkeypatch):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        monkeypatch.setattr(assets.os, "access", lambda *_: False)
        os.utime(root / "clip/content")
        assert assets.prepare(quiet=True).clip == root / "clip"
        (root / "clip/content").write_bytes(b"clap")
        with pytest.raises(RuntimeError, match=r"^clip in .*home is missing, or not what was made.*VST_HOME\.$"):
            assets.prepare(quiet=True)
        assert made == []

    def test_a_home_that_is_a_file(self, root, made):
        root.write_bytes(b"mine")
        with pytest.raises(RuntimeError, match=r"home is a file.*VST_HOME\.$"):
            assets.prepare(quiet=True)
        assert root.read_bytes() == b"mine"

    def test_two_at_once(self, root, made):
        self.place_archives(root)
        results = []
        threads = [threading.Thread(target=lambda: results.append(assets.prepare(quiet=True))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 3
        assert made == ["dino", "clip", "moji"]

    def test_failure_leaves_the_old_and_no_rubbish(self, root, made, monkeypatch):
        self.place_archives(root)
        assets.prepare(quiet=True)
        self.place_archives(root)

        def fail(archives, folder):
            (folder / "content").write_bytes(b"half")
            raise RuntimeError("converter broke")

        dino, clip, moji = assets._RECIPES
        monkeypatch.setattr(assets, "_RECIPES", (dino, replace(clip, version=2, make=fail), moji))
        with pytest.raises(RuntimeError, match="converter broke"):
            assets.prepare(quiet=True)
        assert (root / "clip/content").read_bytes() == b"clip"
        assert list(root.glob("making-*")) == []
        assert [r.folder for r in assets._unseen(assets._RECIPES, root)] == ["clip"]

    def test_recipes_of_others_stay_ready(self, root, made):
        """Whoever makes another folder in the same place must not have ours made anew, nor the other way round."""
        self.place_archives(root)
        (root / "archives/other.tgz").write_bytes(b"other")
        other = replace(assets._RECIPES[0], folder="other", packages=(package_of(b"other", filename="other.tgz"),))
        assert assets.make_ready([other], quiet=True) == [root / "other"]
        assets.prepare(quiet=True)
        assert assets.make_ready([other, assets._RECIPES[2]], quiet=True) == [root / "other", root / "moji"]
        assets.prepare(quiet=True)
        assert made == ["other", "dino", "clip", "moji"]
        assert sorted(json.loads((root / "ready.json").read_text())) == ["clip", "dino", "moji", "other"]

    def test_rubbish_of_a_killed_process_goes(self, root, made):
        self.place_archives(root)
        (root / "making-x/new").mkdir(parents=True)
        assets.prepare(quiet=True)
        assert not (root / "making-x").exists()
