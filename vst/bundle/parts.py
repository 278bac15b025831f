"""One stream cut in parts of at most a size, and read again from them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from vst.bundle.manifest import MANIFEST, Manifest, Part, is_part
from vst.results.locks import LOCK
from vst.results.progress import Progress

UNFINISHED = "unfinished.json"
"""Lies in a folder that a bundle is being written to."""
LEAST_PART = 1000
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_BLOCK = 1 << 20


def bytes_of(size: str | int) -> int:
    """Bytes of a size such as ``60MB``, ``1.5 GB``, ``64MiB`` or plain bytes.

    Raises:
        ValueError: it is no size, or below 1 kB.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    number = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if number < LEAST_PART:
        raise ValueError(f"part_size is {size!r}; expected a size such as 60MB, 1GB or bytes, of at least 1 kB.")
    return number


def told(count: float) -> str:
    """A number of bytes in words."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count:.0f} bytes"


class Megabytes:
    """Counts bytes into a progress display that counts megabytes."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._bytes = bar, 0

    @staticmethod
    def total(count: int) -> int:
        """What the display is made with, for so many bytes."""
        return max(1, -(-count // 10**6))

    def add(self, count: int) -> None:
        """Count bytes."""
        self._bytes += count
        if (steps := self._bytes // 10**6 - self._bar.done) > 0:
            self._bar.step("MB", min(steps, self._bar.total - self._bar.done))

    def end(self) -> None:
        """Count what is left, a part of a megabyte."""
        if left := self._bar.total - self._bar.done:
            self._bar.step("MB", left)


class PartsWriter(io.RawIOBase):
    """A file to write to whose content becomes ``part-0001`` and so on, each written whole or not at all.

    Args:
        folder: that they are written to.
        size: the most bytes a part.
        count: is called with the number of bytes of each write.
    """

    def __init__(self, folder: Path, size: int, count: Callable[[int], None]) -> None:
        super().__init__()
        self.parts: list[Part] = []
        self._folder, self._size, self._count = folder, size, count
        self._file: BinaryIO | None = None
        self._written, self._digest = 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = memoryview(data)
        while view:
            if self._file is None:
                self._file = self._path(temporary=True).open("wb")
                self._written, self._digest = 0, hashlib.sha256()
            piece = view[: self._size - self._written]
            self._file.write(piece)
            self._digest.update(piece)
            self._written += len(piece)
            view = view[len(piece) :]
            if self._written == self._size:
                self._end_part()
        self._count(len(data))
        return len(data)

    def finish(self) -> tuple[Part, ...]:
        """End the last part; all of them."""
        if self._file is not None:
            self._end_part()
        return tuple(self.parts)

    def close(self) -> None:
        """Let go of the file; a part that was not ended stays under its temporary name."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _end_part(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        os.replace(self._path(temporary=True), path := self._path())
        self.parts.append(Part(path.name, self._written, self._digest.hexdigest()))

    def _path(self, temporary: bool = False) -> Path:
        name = f"part-{len(self.parts) + 1:04}"
        return self._folder / (f".{name}.tmp" if temporary else name)


class PartsReader(io.RawIOBase):
    """A file to read from, out of parts in their order; ``at`` is the name of the one that is read."""

    def __init__(self, paths: Sequence[Path]) -> None:
        super().__init__()
        self._left = list(paths)
        self._file: BinaryIO | None = None
        self.at = paths[0].name if paths else ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._file is None:
                if not self._left:
                    return 0
                path = self._left.pop(0)
                self._file, self.at = path.open("rb"), path.name
            if got := self._file.readinto(buffer):  # type: ignore[attr-defined]
                return int(got)
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        super().close()


def is_ours(path: Path) -> bool:
    """Whether a file in the folder of a bundle is one that writing it leaves there."""
    unended = path.name.startswith(".") and path.suffix == ".tmp" and is_part(path.stem[1:])
    written = path.name in (MANIFEST, UNFINISHED, LOCK) or path.name.startswith((".manifest.", ".unfinished."))
    return written or unended or is_part(path.name)


def find_parts(folder: Path, manifest: Manifest) -> list[Path]:
    """The parts' files in the stream's order, wherever below the folder they lie.

    Raises:
        FileNotFoundError: parts are missing.
        ValueError: a file that is none of the bundle's, or a part that was cut.
    """
    sizes = {part.name: part.size for part in manifest.parts}
    found: dict[str, Path] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink()):
        if path.name in sizes:
            if path.name not in found or found[path.name].stat().st_size != sizes[path.name]:
                found[path.name] = path
        elif path.name not in (MANIFEST, UNFINISHED, LOCK):
            other = "a part of another bundle" if is_part(path.name) else "no part of this bundle"
            raise ValueError(f"{path} is {other}, which has {len(sizes)} parts beside {MANIFEST}: take it away.")
    if missing := [name for name in sizes if name not in found]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''} ({len(missing)} of "
            f"{len(sizes)} parts): copy what is missing from where the bundle was written."
        )
    for name, path in found.items():
        if (size := path.stat().st_size) != sizes[name]:
            what = "it was cut on its way" if size < sizes[name] else "it is another"
            raise ValueError(
                f"{path} has {size} bytes; expected {sizes[name]}: {what}, or of another bundle; copy {name} again."
            )
    return [found[name] for name in sizes]


def check_parts(paths: Sequence[Path], manifest: Manifest, count: Callable[[int], None]) -> None:
    """See that every part is what was written.

    Raises:
        ValueError: a part is damaged, or another.
    """
    for part, path in zip(manifest.parts, paths, strict=True):
        if (given := digest_of(path, count)) == part.sha256:
            continue
        if other := next((p.name for p in manifest.parts if p.sha256 == given), None):
            raise ValueError(f"{path} holds what {other} should: give the parts their own names again, or copy both.")
        raise ValueError(
            f"{path} is damaged, or of another bundle (its SHA-256 is {given}; expected {part.sha256}): copy "
            f"{part.name} again from where the bundle was written."
        )


def digest_of(path: Path, count: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file in hex; ``count`` is called with the bytes that were read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            count(len(block))
    return digest.hexdigest()
