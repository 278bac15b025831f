"""Write a bundle: one stored tar, cut in parts, and its manifest last of all."""

from __future__ import annotations

import errno
import hashlib
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from vst.bundle.contents import Contents, Member
from vst.bundle.manifest import FORMAT, MANIFEST, Entry, Manifest, Part
from vst.bundle.parts import UNFINISHED, Megabytes, PartsWriter, is_ours, told
from vst.results.folders import read_json, write_json
from vst.results.locks import held
from vst.results.progress import progress
from vst.results.room import NoRoom

_RECORD = 10_240  # the stream of a tar ends at a multiple of it


@contextmanager
def folder_for(out: Path, asked: Sequence[str], overwrite: bool) -> Iterator[None]:
    """Hold the folder that a bundle is written to, for as long as that takes.

    What a stopped call left there is taken away; a whole bundle only once all that goes in is at hand, by
    :func:`write_bundle`.

    Raises:
        FileExistsError: a bundle is there and ``overwrite`` is False.
        ValueError: something else is there.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file, but a bundle needs a folder; give another name.")
    there = list(out.iterdir()) if out.exists() else []
    if there and (foreign := [path.name for path in there if not is_ours(path)] or _strange(out)):
        raise ValueError(
            f"{out} holds something else than a bundle ({', '.join(sorted(foreign)[:3])}), so it is left as it is; "
            "give another folder."
        )
    if (out / MANIFEST).exists() and not (out / UNFINISHED).exists() and not overwrite:
        raise FileExistsError(f"{out} holds a bundle already; give --overwrite to write it again, or another folder.")
    with held(out):
        yield


def _strange(out: Path) -> list[str]:
    """Names in a folder that holds neither a bundle nor what a stopped call left."""
    names = [path.name for path in out.iterdir()]
    if (out / MANIFEST).exists():
        stored = read_json(out / MANIFEST, "move it away, or give another folder")
        return [] if isinstance(stored, dict) and stored.get("format") == FORMAT else [MANIFEST]
    parts = [name for name in names if name.startswith("part-")]
    return parts if parts and not (out / UNFINISHED).exists() else []


def write_bundle(
    out: Path, contents: Contents, asked: Sequence[str], size: int, version: str, *, show: bool = True
) -> Manifest:
    """Write the parts, then the manifest.

    Args:
        out: the folder, held by :func:`folder_for`.
        contents: what goes in. asked: what was asked for, as it was written. version: of this library.
        size: the most bytes a part.
        show: show progress.

    Raises:
        NoRoom: the disk holds less than the bundle takes.
        RuntimeError: a file is not what it was when it was looked at.
    """
    total = sum(-(-m.size // 512) * 512 + 1024 for m in contents.members) + 2 * _RECORD
    old = sum(path.stat().st_size for path in out.iterdir() if is_ours(path))
    if (free := shutil.disk_usage(out).free + old) < total:
        raise NoRoom(errno.ENOSPC, f"{out} has room for {told(free)} and the bundle takes {told(total)}; make room.")
    write_json(out / UNFINISHED, {"for": list(asked)})
    (out / MANIFEST).unlink(missing_ok=True)  # first, so that no manifest ever stands beside parts of another bundle
    for path in out.iterdir():
        if is_ours(path) and path.name.lstrip(".").startswith("part-"):
            path.unlink()
    with progress("bundle", Megabytes.total(sum(m.size for m in contents.members)), show) as bar:
        parts, entries = write_parts(out, contents.members, size, Megabytes(bar))
    manifest = Manifest(
        asked=tuple(asked),
        written_by=version,
        parts=parts,
        members=entries,
        whole=tuple(contents.whole),
        assets=tuple(contents.assets),
        trees=tuple(contents.trees),
        sources=tuple(contents.sources),
        requirements=tuple(contents.requirements),
    )
    manifest.write(out)
    (out / UNFINISHED).unlink()
    return manifest


def write_parts(
    out: Path, members: Sequence[Member], size: int, counted: Megabytes
) -> tuple[tuple[Part, ...], tuple[Entry, ...]]:
    """Write files as one stream in parts; parts and entries as they stand in a manifest."""
    entries = []
    with PartsWriter(out, size, lambda _: None) as writer:
        with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
            for member in members:
                header = tarfile.TarInfo(member.path)  # of no time, owner or rights: equal files are equal parts
                header.size = member.size
                with member.file.open("rb") as file:
                    read = _Hashed(file, counted)
                    try:
                        tar.addfile(header, read)
                    except OSError as error:
                        if error.errno is not None:  # else tarfile's own: it ended early
                            raise
                        raise _changed(member) from error
                    if file.read(1):
                        raise _changed(member)
                digest = read.digest.hexdigest()
                if member.sha256 not in (None, digest):
                    raise RuntimeError(
                        f"{member.file} is damaged (its SHA-256 is {digest}; expected {member.sha256}): delete it and "
                        "call again, which fetches it anew."
                    )
                entries.append(Entry(member.path, member.size, digest))
        counted.end()
        return writer.finish(), tuple(entries)


def _changed(member: Member) -> RuntimeError:
    return RuntimeError(f"{member.file} changed while it was read: let what writes to it end, and call again.")


class _Hashed:
    """Reads a file, and keeps the digest of what was read."""

    def __init__(self, file: BinaryIO, counted: Megabytes) -> None:
        self._file, self._counted, self.digest = file, counted, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._file.read(size)
        self.digest.update(block)
        self._counted.add(len(block))
        return block
