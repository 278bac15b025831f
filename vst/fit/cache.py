"""Targets on disk, so that an epoch after the first does not run the target models.

Rows are fp16 in one flat file a branch, beside a byte a picture that says whether its row is written. The folder's
name is a digest of all that a row depends on, so a change of pictures, weights, grid, cut or depth makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vst.results.folders import write_json

_FORMAT = 1


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
    return images * (1 + 2 * sum(tokens * width for tokens, width in shapes.values()))


def cached_bytes(root: str | Path) -> int:
    """Bytes on disk of all caches in a folder (their files are sparse)."""
    return sum(512 * file.stat().st_blocks for file in Path(root).glob("*/rows.f16"))


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
        ValueError: they would be larger than the limit, or than 90 % of the disk's free space.
    """
    needed = sum(cache_bytes(images, shapes) for shapes in wanted.values())
    files = [Path(root) / key / "rows.f16" for key in wanted]
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

    Args:
        root: folder that holds all caches.
        key: of :func:`digest`.
        images: number of rows.
        shapes: (tokens, width) by the target's own depth.
    """

    def __init__(self, root: str | Path, key: str, images: int, shapes: Mapping[int, tuple[int, int]]) -> None:
        self.folder, self.shapes = Path(root) / key, dict(sorted(shapes.items()))
        self.size = cache_bytes(images, shapes)
        if not (self.folder / "cache.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "cache.json", {"images": images, "shapes": self.shapes, "bytes": self.size})
        width = sum(t * w for t, w in self.shapes.values())
        self._rows = _map(self.folder / "rows.f16", np.float16, (images, width))
        self._done = _map(self.folder / "done.u8", np.uint8, (images,))

    def has(self, rows: Sequence[int]) -> bool:
        """Whether all these rows are written."""
        return bool(self._done[list(rows)].all())

    def read(self, rows: Sequence[int], device: torch.device | str = "cpu") -> dict[int, Tensor]:
        """Rows by depth, each ``[rows, tokens, width]`` fp32.

        Raises:
            LookupError: a row that was never written.
        """
        if not self.has(rows):
            raise LookupError(f"Rows of {self.folder} were asked for that are not written yet.")
        flat = torch.from_numpy(self._rows[list(rows)]).to(device).float()
        out, at = {}, 0
        for depth, (tokens, width) in self.shapes.items():
            out[depth] = flat[:, at : at + tokens * width].unflatten(1, (tokens, width))
            at += tokens * width
        return out

    def write(self, rows: Sequence[int], values: Mapping[int, Tensor]) -> None:
        """Write rows; the mark follows the data, so a row that a crash cut short is computed again.

        Raises:
            ValueError: values beyond fp16's range.
        """
        flat = torch.cat([values[d].flatten(1).half() for d in self.shapes], dim=1).cpu().numpy()
        if not np.isfinite(flat).all():
            raise ValueError("Features are beyond fp16's range (65504), in which they are cached: do without a cache.")
        self._rows[list(rows)] = flat
        self._rows.flush()
        self._done[list(rows)] = 1
        self._done.flush()


def _map(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    if not path.exists():
        with open(path, "ab") as file:  # sparse: pages come into being as they are written
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype=dtype, mode="r+", shape=shape)
