"""``manifest.json``: what a bundle holds, part by part and file by file, checked before any of it is believed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vst.results.folders import read_json, write_json

MANIFEST = "manifest.json"
FORMAT, VERSION = "vst bundle", 1
PLACES = ("home", "trees", "hub", "wheels")
"""First words of members' paths: the assets' folder, that of trees, the Hugging Face hub's cache, that of wheels."""


@dataclass(frozen=True)
class Part:
    """A part of the stream: its file's name, bytes and SHA-256 in hex."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A file in the bundle: ``PLACE/path`` with ``/`` between names, its bytes and SHA-256 in hex."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Asset:
    """A folder that a recipe makes.

    Attributes:
        folder: its name. kind: the name of the set of recipes that it is from.
        form: ``made`` (the folder itself is a member) or ``archives`` (what it is made from is).
        made_from: what it is made from, as in ``ready.json``. bytes: of the folder, about.
        needs: requirements of packages that making takes; none where it comes made.
        archives: names of its archives.
    """

    folder: str
    kind: str
    form: str
    made_from: dict[str, Any]
    bytes: int
    needs: tuple[str, ...]
    archives: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        asked: what it was written for, as it was asked for. written_by: the version of vst.
        parts, members: in the order of the stream.
        whole: paths of folders that are put in place as one, such as ``trees/demo``.
        assets: folders that recipes make. trees: those of ``whole`` that are saved trees, or models on one.
        sources: the model sources that it brings, as they are written on the other machine; ``{trees}`` in them stands
            for the folder of trees.
        requirements: of Python packages, as pip takes them.
    """

    asked: tuple[str, ...]
    written_by: str
    parts: tuple[Part, ...]
    members: tuple[Entry, ...]
    whole: tuple[str, ...]
    assets: tuple[Asset, ...]
    trees: tuple[str, ...]
    sources: tuple[str, ...]
    requirements: tuple[str, ...]

    @property
    def id(self) -> str:
        """Tells this bundle from any other."""
        return _digest(asdict(self))

    def write(self, folder: Path) -> None:
        """Write it, atomically."""
        values = asdict(self)
        write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **values, "sha256": self.id})


def read_manifest(folder: Path) -> Manifest:
    """Read and check a bundle's manifest.

    Raises:
        FileNotFoundError: there is no such folder, or no manifest in it.
        ValueError: it is damaged, of another format, or names a path that leaves its place.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected one that vst bundle wrote, with its {MANIFEST}.")
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: copy that file too, or, if vst bundle was stopped, let it end first."
        )
    again = "copy the file again from where the bundle was written"
    values = read_json(path, again)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path} is not the manifest of a bundle; expected a folder that vst bundle wrote.")
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path} is of format version {values.get('version')!r} and this vst reads {VERSION}: bring the same "
            "version of vst to both machines, or write the bundle anew with this one."
        )
    stated = {k: v for k, v in values.items() if k not in ("format", "version", "sha256")}
    if values.get("sha256") != _digest(stated):
        raise ValueError(f"{path} is damaged (its SHA-256 is not the one in it): {again}.")
    try:
        found = _manifest(stated)
        _check(found, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what vst bundle writes ({error}): {again}.") from error
    return found


def _manifest(values: Mapping[str, Any]) -> Manifest:
    assets = (Asset(**{**a, "needs": tuple(a["needs"]), "archives": tuple(a["archives"])}) for a in values["assets"])
    own: dict[str, Any] = {
        "written_by": str(values["written_by"]),
        "parts": tuple(Part(**part) for part in values["parts"]),
        "members": tuple(Entry(**member) for member in values["members"]),
        "assets": tuple(assets),
    }
    for name in ("asked", "whole", "trees", "sources", "requirements"):
        own[name] = tuple(str(value) for value in values[name])
    return Manifest(**own)


def _check(manifest: Manifest, path: Path) -> None:
    for name in (part.name for part in manifest.parts):
        if not is_part(name):
            raise ValueError(f"{path} names a part {name!r}; expected part-0001 and so on: get the bundle again.")
    names = [member.path for member in manifest.members]
    for name in (*names, *manifest.whole):
        if not is_safe(name):
            raise ValueError(
                f"{path} names a member {name!r}, which is no path below {', '.join(PLACES)}: nothing is put in "
                "place; get the bundle from whom you trust."
            )
    own = {asset.folder for asset in manifest.assets if isinstance(asset.made_from, dict)} | {"archives"}
    if odd := [name for name in names if name.startswith("home/") and name.split("/")[1] not in own]:
        raise ValueError(f"{path} names a member {odd[0]!r}, which is of no asset: get the bundle from whom you trust.")
    if any("/" in name or not is_safe(f"home/{name}") for name in own):
        raise ValueError(f"{path} names an asset that is no plain name: get the bundle from whom you trust.")
    above = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if len(set(names)) < len(names) or above & set(names):
        raise ValueError(f"{path} names a member twice, or as a file and a folder: write the bundle anew.")
    sizes = [part.size for part in manifest.parts] + [member.size for member in manifest.members]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{path} tells a size that is no number of bytes: write the bundle anew.")


def is_part(name: str) -> bool:
    """Whether a file's name is that of a part."""
    return re.fullmatch(r"part-\d{4,6}", name) is not None


def is_safe(path: str) -> bool:
    """Whether a member's path stays in its place: plain names, none of them hidden at the top, and no way up."""
    names = path.split("/")
    plain = all(name not in ("", ".", "..") and name.isprintable() and "\\" not in name for name in names)
    return plain and len(names) > 1 and names[0] in PLACES and not names[1].startswith(".")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
