"""What goes into a bundle: files with their places on the other machine, gathered from what was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vst.bundle.manifest import Asset, is_safe


@dataclass(frozen=True)
class Member:
    """A file that goes into a bundle.

    Attributes:
        path: in the bundle, ``PLACE/path``. file: where it lies here. size: its bytes.
        sha256: in hex, where it is known beforehand; the file is held to it.
    """

    path: str
    file: Path
    size: int
    sha256: str | None = None


@dataclass
class Contents:
    """All that goes into a bundle.

    Attributes:
        members: the files. whole, assets, trees, sources, requirements: as in the manifest.
        rows: what is shown of each thing that was asked for: what, form, bytes (None where not known), place.
        notes: what the user should know.
        fetched: archives that were fetched for the bundle alone, and are taken away once it is written.
    """

    members: list[Member] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    assets: list[Asset] = field(default_factory=list)
    trees: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    requirements: list[str] = field(default_factory=list)
    rows: list[tuple[str, str, int | None, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fetched: list[Path] = field(default_factory=list)

    def require(self, requirements: Iterable[str]) -> None:
        """Add requirements, each once."""
        self.requirements += [r for r in dict.fromkeys(requirements) if r not in self.requirements]

    def add_folder(self, place: str, name: str, files: Sequence[Path], root: Path) -> int:
        """Add a folder that is put in place as one; its bytes."""
        top = f"{place}/{name}"
        if top in self.whole:
            raise ValueError(f"{name} would be in the bundle twice: rename one of the folders, or bundle them apart.")
        self.whole.append(top)
        self.members += (new := [member(f"{top}/{path.relative_to(root).as_posix()}", path) for path in files])
        return sum(m.size for m in new)


def member(path: str, file: Path, sha256: str | None = None) -> Member:
    """A file as a member.

    Raises:
        ValueError: its name cannot be put in place elsewhere.
    """
    if not is_safe(path):
        raise ValueError(f"{file} has a name that is not carried ({path!r}): rename it, or take it out of its folder.")
    return Member(path, file, file.stat().st_size, sha256)


def files_in(folder: Path) -> list[Path]:
    """Files of a folder, hidden ones and what programs keep beside them (``__pycache__``) left out.

    Raises:
        ValueError: a link to nothing, or to a folder.
    """
    out = []
    for path in sorted(folder.rglob("*")):
        names = path.relative_to(folder).parts
        if any(name.startswith(".") or name == "__pycache__" for name in names):
            continue
        if path.is_symlink() and not path.is_file():
            raise ValueError(f"{path} is a link to a folder or to nothing, which is not carried: put files there.")
        if path.is_file():
            out.append(path)
    return out
