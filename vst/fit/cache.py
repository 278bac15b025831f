"""Targets on disk, so that an epoch after the first does not run the target models.

Rows are fp16 in one flat file a branch, beside a file with a checksum for each row that is written, so that a row which
was cut, emptied or changed later is never taken for what was computed. The folder's name is a digest of all that a row
depends on, so a change of pictures, weights, grid, cut or depth makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vst.results.folders import read_json, write_json

_FORMAT = 1  # of what a digest covers
_ROWS, _SUMS, _FACTS = "rows.f16", "sums.u64", "cache.json"
_WRITTEN = 1 << 32  # above a row's checksum, so that the mark of a row that is written is never 0


def digest(parts: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """Hex digest of JSON-able facts and of tensors' names, shapes and bytes."""
    sha = hashlib.sha256(json.dumps({"format": _FORMAT, **parts}, sort_keys=True, default=str).encode())
    for name in sorted(tensors or {}):
        value = (tensors or {})[name].detach().cpu().contiguous()
        sha.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:24]


def cache_bytes(images: int, shapes: Mapping[int, tuple[int, int]]) -> int:
    """Size of a branch's cache: ``images`` rows of fp16, ``shapes`` giving (tokens, width) by depth."""
    return images * (8 + 2 * sum(tokens * width for tokens, width in shapes.values()))


def cached_bytes(root: str | Path) -> int:
    """Bytes on disk of all caches in a folder (their files are sparse)."""
    return sum(512 * file.stat().st_blocks for file in Path(root).glob(f"*/{_ROWS}"))


def check_room(
    root: str | Path, wanted: Mapping[str, Mapping[int, tuple[int, int]]], images: int, limit_gb: float
) -> int:
    """Size in bytes of all branches' caches together, checked before anything is written.

    Args:
        root: folder that holds all caches.
        wanted: shapes, (tokens, width) by depth, by key.
        images: rows of each.
        limit_gb: in gigabytes (1e9 bytes).

    Raises:
        ValueError: they would be larger than the limit, or than 90 % of the disk's free space; the folder is a file.
    """
    if (file := next((p for p in (Path(root), *Path(root).absolute().parents) if p.is_file()), None)) is not None:
        raise ValueError(f"The folder for cached features is {root}, and {file} is a file; give another folder.")
    needed = sum(cache_bytes(images, shapes) for shapes in wanted.values())
    files = [Path(root) / key / _ROWS for key in wanted]
    written = sum(512 * file.stat().st_blocks for file in files if file.exists())
    home = next(p for p in (Path(root), *Path(root).absolute().parents) if p.exists())
    free = shutil.disk_usage(home).free
    if needed > limit_gb * 1e9 or needed - written > 0.9 * free:
        raise ValueError(
            f"Caching targets of {images:,} pictures needs {needed / 1e9:,.1f} GB; the limit is {limit_gb:g} GB and "
            f"{free / 1e9:,.1f} GB are free: raise cache_limit_gb, use fewer pictures, or leave the cache off (targets "
            "are then computed each epoch)."
        )
    return needed


class TargetCache:
    """Rows of one branch's targets, in a folder named by their key.

    A folder whose files are missing, or not of the sizes that its description asks for, is named in a warning and made
    anew; a row whose bytes are not those that were written is named and counts as not written.

    Args:
        root: folder that holds all caches.
        key: of :func:`digest`.
        images: number of rows.
        shapes: (tokens, width) by the target's own depth.
    """

    def __init__(self, root: str | Path, key: str, images: int, shapes: Mapping[int, tuple[int, int]]) -> None:
        self.folder, self.images, self.shapes = Path(root) / key, images, dict(sorted(shapes.items()))
        self.size = cache_bytes(images, shapes)
        self._width = sum(t * w for t, w in self.shapes.values())
        self._prepare()

    def has(self, rows: Sequence[int]) -> bool:
        """Whether all these rows are written; their bytes are looked at by :meth:`find`."""
        return not self.missing(rows)

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Those of ``rows`` that are not written."""
        if not (self.folder / _SUMS).is_file():
            return list(rows)
        with (self.folder / _SUMS).open("rb") as file:
            return [row for row in rows if not _mark(file.fileno(), row)]

    def find(self, rows: Sequence[int], device: torch.device | str = "cpu") -> dict[int, Tensor] | None:
        """Rows by depth, each ``[rows, tokens, width]`` fp32; None unless all of them are there and whole."""
        if self.missing(rows) or not (self.folder / _ROWS).is_file():
            return None
        flat = np.zeros((len(rows), self._width), "<f2")
        damaged, size = [], self._width * flat.itemsize
        with (self.folder / _SUMS).open("rb") as sums, (self.folder / _ROWS).open("rb") as kept:
            for place, row in enumerate(rows):
                data = os.pread(kept.fileno(), size, row * size)
                if len(data) != size or _mark(sums.fileno(), row) != self._sum(row, data):
                    damaged.append(row)
                else:
                    flat[place] = np.frombuffer(data, flat.dtype)
        if damaged:
            warnings.warn(
                f"{self.folder / _ROWS} does not hold what was written into it (row {damaged[0]}"
                f"{f' and {len(damaged) - 1} more' if damaged[1:] else ''}): this is computed anew.",
                stacklevel=2,
            )
            self._set_marks(dict.fromkeys(damaged, 0))
            return None
        values, out, at = torch.from_numpy(flat).to(device).float(), {}, 0
        for depth, (tokens, width) in self.shapes.items():
            out[depth] = values[:, at : at + tokens * width].unflatten(1, (tokens, width))
            at += tokens * width
        return out

    def read(self, rows: Sequence[int], device: torch.device | str = "cpu") -> dict[int, Tensor]:
        """What :meth:`find` gives.

        Raises:
            LookupError: a row that was never written, or not as it was written.
        """
        found = self.find(rows, device)
        if found is None:
            raise LookupError(f"Rows of {self.folder} were asked for that are not written yet.")
        return found

    def write(self, rows: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """Write rows; the checksum follows the data, so a row that a crash cut short is computed again.

        Raises:
            ValueError: values beyond fp16's range.
            OSError: the disk has no room for them.
        """
        # Joined in fp32: bf16 autocast, which may be on around this, refuses to join tensors of fp16.
        flat = torch.cat([values[d].flatten(1).float() for d in self.shapes], dim=1).half().cpu().numpy().astype("<f2")
        if not np.isfinite(flat).all():
            raise ValueError("Features are beyond fp16's range (65504), in which they are cached: do without a cache.")
        self._prepare()
        data = {row: value.tobytes() for row, value in zip(rows, flat, strict=True)}
        try:
            with (self.folder / _ROWS).open("r+b", buffering=0) as file:
                for row, part in data.items():
                    file.seek(row * len(part))
                    _write_all(file, part)
                os.fsync(file.fileno())
            self._set_marks({row: self._sum(row, part) for row, part in data.items()})
        except OSError as error:
            raise OSError(
                error.errno, f"Features cannot be kept in {self.folder} ({error.strerror}): make room, or do without it"
            ) from error

    def _sum(self, row: int, data: bytes) -> int:
        """The mark of a row that holds these bytes, in this place of this cache: rows and folders can be exchanged."""
        return _WRITTEN | zlib.crc32(data, zlib.crc32(f"{self.folder.name} {row}".encode()))

    def _set_marks(self, marks: Mapping[int, int]) -> None:
        with (self.folder / _SUMS).open("r+b", buffering=0) as file:
            for row, mark in marks.items():
                file.seek(8 * row)
                _write_all(file, mark.to_bytes(8, "little"))
            os.fsync(file.fileno())

    def _sizes(self) -> dict[str, int]:
        return {_ROWS: self.images * self._width * 2, _SUMS: self.images * 8}

    def _facts(self) -> dict[str, Any]:
        shapes = {str(depth): list(shape) for depth, shape in self.shapes.items()}
        return {"format": 3, "images": self.images, "shapes": shapes, "bytes": self.size}

    def _fault(self) -> str:
        """Why the folder cannot be used as it is; empty where it can."""
        try:
            facts = read_json(self.folder / _FACTS)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return f"it has no {_FACTS} that can be read"
        if facts != self._facts():
            old = isinstance(facts, dict) and facts.get("format", 1) in (1, 2)
            return (
                "an earlier version wrote it, which marked rows otherwise" if old else f"{_FACTS} describes other rows"
            )
        for name, size in self._sizes().items():
            file = self.folder / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                return f"{name} {'is missing' if found is None else f'has {found:,} bytes for {size:,}'}"
        return ""

    def _prepare(self) -> None:
        """Make the folder, empty, unless it is there and sound; whole at once, since other processes look for it."""
        there = self.folder.exists()
        if there and not (fault := self._fault()):
            return
        root = self.folder.parent
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            for name, size in self._sizes().items():
                with (new / name).open("wb") as file:  # sparse: it takes room as rows are written
                    file.truncate(size)
            write_json(new / _FACTS, self._facts())
            if there:
                warnings.warn(f"The cache {self.folder} is computed anew: {fault}.", stacklevel=3)
                os.replace(self.folder, Path(temporary) / "old")
            try:
                os.rename(new, self.folder)
            except OSError:
                if not self.folder.is_dir():  # else another process made it meanwhile
                    raise


def _mark(descriptor: int, row: int) -> int:
    return int.from_bytes(os.pread(descriptor, 8, 8 * row), "little")


def _write_all(file: Any, data: bytes) -> None:
    """All of ``data`` through an unbuffered file, which may take a part of it a call."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
