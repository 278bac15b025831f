"""Fashion-MNIST (MIT) out of its Debian package, fetched by apt-get and unpacked without being installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from vst.demo.assets import Package, Recipe, make_ready

FASHION = Package(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "debian",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    30_900_652,
)


def _make(archives: Sequence[Path], folder: Path) -> None:
    tool = shutil.which("dpkg-deb")
    if tool is None:
        raise RuntimeError("dpkg-deb was not found, expected for unpacking Fashion-MNIST: give the task a folder.")
    unpacked = folder.parent / "unpacked"
    subprocess.run([tool, "-x", str(archives[0]), str(unpacked)], check=True)
    for file in sorted((unpacked / "usr/share/datasets/fashion-mnist").glob("*.gz")):
        shutil.copyfile(file, folder / file.name)


def recipes() -> tuple[Recipe, ...]:
    """How its folder is made."""
    return (Recipe("fashion-mnist", (FASHION,), 1, _make),)


def prepare_fashion(quiet: bool = False) -> Path:
    """Folder of the four IDX files; 31 MB are fetched once.

    Raises:
        RuntimeError: apt-get or dpkg-deb is missing or fails, or the archive is not the pinned one.
    """
    return make_ready(recipes(), quiet)[0]
