"""The pictures below a folder: links followed, every real folder and file once."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from vst.data.images import SUFFIXES


def picture_names(folder: Path, *, repeated: bool = False) -> list[str]:
    """Pictures below a folder, by relative path, sorted; hidden files and folders are left out.

    Links are followed, and every real folder and every real file counts once: under its own path where that lies below
    the folder, else under the link that is reached by the fewest links, first by name. A folder that may not be read
    brings a warning.

    Args:
        folder: where to look.
        repeated: list the links to a file beside it; folders count once all the same.
    """
    names: dict[str, str] = {}  # by the real path
    seen: set[str] = set()
    linked: list[Path] = []
    waiting = [folder]
    while waiting:
        further: list[Path] = []
        for top in waiting:
            for place, subfolders, files in os.walk(top, onerror=_told):
                real, here = os.path.realpath(place), Path(place)
                if real in seen:
                    subfolders.clear()
                    continue
                seen.add(real)
                subfolders[:] = [name for name in subfolders if not _hidden(name)]
                further += [here / n for n in subfolders if (here / n).is_symlink() and not _leads_back(here, n)]
                for name in files:
                    if _hidden(name) or not name.lower().endswith(SUFFIXES):
                        continue
                    if os.path.islink(path := here / name):
                        linked.append(path)
                    else:
                        names[os.path.join(real, name)] = path.relative_to(folder).as_posix()
        waiting = sorted(further)
    for path in sorted(linked):
        real = str(path) if repeated else os.path.realpath(path)
        names.setdefault(real, path.relative_to(folder).as_posix())
    return sorted(names.values())


def _told(error: OSError) -> None:
    warnings.warn(
        f"The folder {error.filename} cannot be read ({error.strerror}), so pictures in it are left out: make it "
        "readable, or move it elsewhere.",
        stacklevel=4,
    )


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _leads_back(folder: Path, name: str) -> bool:
    """Whether a subfolder is a link to a folder that it is in itself; following it would never end."""
    return folder.resolve().is_relative_to((folder / name).resolve())
