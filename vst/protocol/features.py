"""Features of frozen models, computed once for each picture and depth and kept on disk.

Tokens are fp16 rows in :class:`vst.fit.cache.TargetCache` files, one for each model, pool of pictures and depth, named
by a digest of all that a row depends on. So seeds, tasks and runs that draw the same picture share its features, and a
new depth adds a file without touching the others. Two counts are kept by model: pictures pushed through it, and
pictures that the same rows would have pushed with nothing kept.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vst.data.images import PICTURE_MB, ImageTransform
from vst.data.pictures import ImageSet, collate
from vst.fit.cache import TargetCache, cache_bytes, cached_bytes, digest
from vst.models.checkpoints import describe, load_vfm
from vst.models.fields import checked
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.results.finished import as_written
from vst.results.folders import read_json, write_json
from vst.results.progress import progress


class Models:
    """The frozen models of a grid, each loaded whole when it is first needed.

    Args:
        sources: by name. grid: patches a side. device: where they live.
        pretrained: false gives random weights, each name its own; no source is asked for weights.
    """

    def __init__(self, sources: Mapping[str, str], grid: int, device: torch.device, *, pretrained: bool = True) -> None:
        from vst.demo.assets import exact_source

        self.sources = {name: exact_source(source) for name, source in sources.items()}
        self.specs: dict[str, VFMSpec] = {name: describe(source) for name, source in self.sources.items()}
        self.grid, self.device, self.pretrained = grid, device, pretrained
        self._loaded: dict[str, VFM] = {}
        self._digests: dict[str, str] = {}

    def __getitem__(self, name: str) -> VFM:
        if name not in self._loaded:
            source = self.sources[name] if self.pretrained else self.specs[name]
            seed = zlib.crc32(name.encode())
            model = load_vfm(source, grid=self.grid, pretrained=self.pretrained, seed=seed).requires_grad_(False)
            self._loaded[name] = model.to(self.device)
        return self._loaded[name]

    def digest(self, name: str) -> str:
        """Of a model's architecture and weights at this grid, wherever they came from."""
        if name not in self._digests:
            facts = {k: v for k, v in self.specs[name].to_dict().items() if k != "source"}
            self._digests[name] = digest({"grid": self.grid, "spec": facts}, self[name].state_dict())
        return self._digests[name]


_COUNTED = "restore it, or move it away, and pictures are counted from now on"


class Counts:
    """Pictures by model: pushed, and what a grid without a cache would have pushed. Kept in a file of the run.

    Args:
        path: of the JSON file; counts go on from what it holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pushed: dict[str, int] = {}
        if path.exists():
            with as_written(path, "vst protocol", _COUNTED):
                self.pushed = checked(read_json(path, _COUNTED), dict[str, int], "the whole")
        self.naive: dict[str, int] = {}

    def push(self, model: str, pictures: int) -> None:
        """Count pictures that were run through a model, on disk at once: an interrupted run adds up."""
        self.pushed[model] = self.pushed.get(model, 0) + pictures
        write_json(self.path, self.pushed)

    def would_push(self, model: str, pictures: int) -> None:
        """Count pictures that would have been run through a model with nothing kept."""
        self.naive[model] = self.naive.get(model, 0) + pictures

    def take(self) -> dict[str, int]:
        """The naive counts since the last call."""
        out, self.naive = self.naive, {}
        return out


class FeatureStore:
    """Features of one pool of pictures.

    Args:
        root: folder of all caches.
        models: frozen.
        pictures: the pool, as :class:`vst.data.pictures.ImageSet` takes it.
        cut: how a picture becomes square.
        counts: of the run.
        bf16: whether models run under bf16 autocast.
        limit_gb: refuse to let ``root`` grow beyond it.
        picture_mb: MiB that a picture may take to decode.
        show: progress.
    """

    def __init__(
        self,
        root: Path,
        models: Models,
        pictures: Any,
        cut: str,
        counts: Counts,
        *,
        bf16: bool = False,
        limit_gb: float = 50.0,
        picture_mb: int = PICTURE_MB,
        show: bool = True,
    ) -> None:
        transforms = {
            name: ImageTransform(size=models.grid * s.patch, mean=s.mean, std=s.std, cut=cut)
            for name, s in models.specs.items()
        }
        self.root, self.models, self.counts, self.bf16, self.show = root, models, counts, bf16, show
        self.limit_gb = limit_gb
        self._own = {} if picture_mb == PICTURE_MB else {"picture_mb": picture_mb}  # it says which rows there are
        self.images = ImageSet(pictures, transforms, picture_mb=picture_mb)
        self.fingerprint = self.images.fingerprint()
        self.unreadable: dict[int, str] = {}
        self._caches: dict[tuple[str, int], TargetCache] = {}

    def cache(self, model: str, depth: int) -> TargetCache:
        """Where a model's tokens at a depth are kept."""
        if (model, depth) not in self._caches:
            self._caches[model, depth] = TargetCache(
                self.root, self._key(model, depth), len(self.images), {depth: self._shape(model)}
            )
        return self._caches[model, depth]

    def _shape(self, model: str) -> tuple[int, int]:
        spec = self.models.specs[model]
        return spec.prefix + self.models.grid**2, spec.width

    def _key(self, model: str, depth: int) -> str:
        facts = {
            "pictures": self.fingerprint,
            "transform": repr(self.images.transforms[model]),
            "weights": self.models.digest(model),
            "depth": depth,
            "bf16": self.bf16,
            **self._own,
        }
        return digest(facts)

    @torch.no_grad()
    def ensure(self, rows: Sequence[int], wanted: Mapping[str, Sequence[int]], title: str = "features") -> None:
        """Compute what is missing of ``rows`` at the ``wanted`` depths by model, each picture once a model.

        A picture that cannot be read is noted in ``unreadable`` with the reason.

        Raises:
            ValueError: the features would be larger than the limit.
        """
        missing: dict[str, dict[int, set[int]]] = {}
        for model, depths in wanted.items():
            missing[model] = {}
            for depth in sorted(set(depths)):
                lacking = set(self.cache(model, depth).missing(row for row in rows if row not in self.unreadable))
                if lacking:
                    missing[model][depth] = lacking
        todo = sorted(set().union(*(lacking for parts in missing.values() for lacking in parts.values())))
        if not todo:
            return
        size = sum(
            cache_bytes(len(lacking), {0: self._shape(model)})
            for model, parts in missing.items()
            for lacking in parts.values()
        )
        free, held = shutil.disk_usage(self.root).free, cached_bytes(self.root)
        if held + size > self.limit_gb * 1e9 or size > 0.9 * free:
            raise ValueError(
                f"Features of {len(todo):,} pictures need {size / 1e9:,.1f} GB more, and {self.root} holds "
                f"{held / 1e9:,.1f} GB; the limit is {self.limit_gb:g} GB and {free / 1e9:,.1f} GB are free: raise "
                "cache_limit_gb, delete that folder if other runs filled it, or use fewer pictures, seeds or depths."
            )
        with progress(title, len(todo), self.show) as bar:
            for at in range(0, len(todo), 16):
                part = todo[at : at + 16]
                pixels, kept, _ = collate(items := [self.images[row] for row in part])
                for place in set(range(len(part))) - set(kept):
                    self.unreadable[part[place]] = getattr(items[place], "reason", "")
                for model, parts in missing.items() if kept else ():
                    places = [i for i, k in enumerate(kept) if any(part[k] in lacking for lacking in parts.values())]
                    if places:
                        self._push(model, list(parts), [part[kept[i]] for i in places], pixels[model][places])
                bar.step(steps=len(part))

    def _push(self, model: str, depths: Sequence[int], rows: list[int], pixels: Tensor) -> None:
        device = self.models.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            taps = self.models[model].taps(pixels.to(device), depths)
        for depth, tokens in taps.items():
            self.cache(model, depth).write(rows, {depth: tokens})
        self.counts.push(model, len(rows))

    def batch(
        self, rows: Sequence[int], wanted: Mapping[str, Sequence[int]], *, counted: bool = True
    ) -> dict[tuple[str, int], Tensor]:
        """Tokens ``[rows, T, D]`` fp32 by model and depth; counted as one naive pass of each model.

        Raises:
            LookupError: a row that was never made sure of, or that was damaged since and whose picture is gone.
        """
        out = {}
        for model, depths in wanted.items():
            for depth in set(depths):
                cache = self.cache(model, depth)
                found = cache.find(rows, self.models.device)
                if found is None:  # damaged since it was written, or on disk already when it was made sure of
                    self.ensure(rows, {model: [depth]})
                    found = cache.read(rows, self.models.device)
                out[model, depth] = found[depth]
            if counted:
                self.counts.would_push(model, len(rows))
        return out
