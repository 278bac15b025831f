"""What stitches are compared with, batch by batch: run through the target models, or kept on disk for later epochs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vst.data.pictures import ImageSet
from vst.fit.cache import TargetCache, check_room, digest
from vst.fit.config import FitConfig
from vst.fit.matching import Matcher
from vst.fit.teacher import Teacher


class Targets:
    """Targets of all that a matcher compares, without a cache until :meth:`open_caches`.

    Args:
        teacher: the frozen models.
        matcher: which knows what is compared.
    """

    def __init__(self, teacher: Teacher, matcher: Matcher) -> None:
        self.teacher, self.matcher = teacher, matcher
        self._caches: dict[str, TargetCache] = {}

    @property
    def cache_bytes(self) -> int:
        """Size of the caches on disk when they are full; 0 without any."""
        return sum(cache.size for cache in self._caches.values())

    def computed(self, pixels: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """By name and depth what is compared, from pixels by the names of :func:`vst.fit.teacher.transforms`."""
        return {name: self._run(name, pixels) for name in self.matcher.names()}

    def of(
        self, pixels: Mapping[str, Tensor], rows: Sequence[int], device: torch.device
    ) -> dict[str, dict[int, Tensor]]:
        """The same of pictures that are ``rows`` of the data; with a cache each is computed once."""
        out = {}
        for name in self.matcher.names():
            cache = self._caches.get(name)
            if cache is None:
                out[name] = self._run(name, pixels)
                continue
            found = cache.find(rows, device)
            if found is None:
                cache.write(rows, self._run(name, pixels))
                found = cache.read(rows, device)  # also when just written: every epoch sees the same rounding
            out[name] = found
        return out

    def _run(self, name: str, pixels: Mapping[str, Tensor]) -> dict[int, Tensor]:
        target = self.teacher.target(name, pixels[self.teacher.pixels_of(name)], self.matcher.depths(name))
        return self.matcher.wanted(name, target)

    def open_caches(
        self, data: ImageSet, config: FitConfig, *, bf16: bool, main: bool, show: bool, wait: Callable[[], None]
    ) -> None:
        """Keep targets in ``config.cache`` from now on; every process calls this.

        Args:
            data: the pictures.
            config: with the folder and its limit.
            bf16: whether the models run under bf16 autocast.
            main: whether this process makes the files.
            show: tell how large they will be.
            wait: returns when every process has called it.

        Raises:
            ValueError: they would be larger than the limit, or than the disk has room for.
        """
        root, fingerprint = config.cache or "", data.fingerprint()
        wanted: dict[str, tuple[str, dict[int, tuple[int, int]]]] = {}
        tree = self.teacher.tree.config
        specs = {tree.trunk_name: tree.trunk, **{b.name: b.spec for b in tree.branches}}
        for name in self.matcher.names():
            shapes = self.matcher.shapes(name)
            facts = {
                "pictures": fingerprint,
                "transform": repr(data.transforms[self.teacher.pixels_of(name)]),
                "spec": specs[name].to_dict(),
                "shapes": shapes,
                "bf16": bf16,
            }
            wanted[name] = digest(facts, self.teacher.weights(name)), shapes
        if main:
            size = check_room(root, dict(wanted.values()), len(data), config.cache_limit_gb)
            if show:
                print(f"target cache: {size / 1e9:.2f} GB when full, in {root}", file=sys.stderr)
            for key, shapes in wanted.values():
                TargetCache(root, key, len(data), shapes)
        wait()
        self._caches = {n: TargetCache(root, key, len(data), shapes) for n, (key, shapes) in wanted.items()}
