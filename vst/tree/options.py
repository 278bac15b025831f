"""Which tree to build, as it is asked for: sources, splits and options; and the config that they mean."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from vst.models import checkpoints
from vst.models.fields import SEEDS, checked, shown, whole
from vst.models.spec import VFMSpec
from vst.tree.config import BranchConfig, TreeOptions, VSTConfig, feature_depth, relative_enter
from vst.tree.splits import as_splits
from vst.tree.stitches import StitchSpec


@dataclass(frozen=True)
class TreeArgs(TreeOptions):
    """Which tree to build.

    Attributes:
        trunk: source of the model that sees the pixels: timm:NAME, hf:ID-or-folder, open_clip:ARCH/TAG or a ready name.
        branches: sources of the other models, or a mapping from names to sources.
        splits: trunk depths to hold stitches for, for all branches or by branch name.
        image_size: side of the pictures in pixels, a multiple of the trunk's patch; default: the trunk's own.
        enters: a branch's own depth for each of its splits, for all branches or by branch name; default: the same
            relative depth.
        stitch: family, or {family: ..., option: ...}; default: the library's.
        pretrained: false for random weights (timing, tests).
        seed: of random weights and new stitches.
    """

    trunk: str
    branches: Sequence[str] | Mapping[str, str]
    splits: int | Sequence[int] | Mapping[str, int | Sequence[int]]
    image_size: int | None = None
    enters: int | Sequence[int] | Mapping[str, int | Sequence[int]] | None = None
    stitch: StitchSpec | str | Mapping[str, Any] | None = None
    pretrained: bool = True
    seed: int = 0

    def plan(self) -> VSTConfig:
        """The tree's config; nothing is built or loaded.

        Raises:
            ValueError: unknown models, splits out of range, widths that cannot be bridged or fused, a bad image size.
        """
        self._check()
        given = dict(self.branches) if isinstance(self.branches, Mapping) else None
        sources = list(given.values()) if given is not None else list(self.branches)
        trunk, *specs = [checkpoints.describe(source) for source in (self.trunk, *sources)]
        trunk_name, *names = _names([trunk, *specs], list(given) if given is not None else None)
        for value, what in ((self.splits, "splits"), (self.enters, "enters")):
            if isinstance(value, Mapping) and set(value) - set(names):
                raise ValueError(f"{what} name the branches {sorted(map(str, value))}; the branches are {names}.")
        splits = as_splits(self.splits, names, "splits") if names else {}
        enters: dict[str, list[int]] = {}
        if self.enters is not None:  # by branch, some may be left to the default
            enters = as_splits(self.enters, list(self.enters) if isinstance(self.enters, Mapping) else names, "enters")
        options = {f.name: getattr(self, f.name) for f in fields(TreeOptions)}
        branches = [
            self._branch(name, spec, trunk, splits[name], enters.get(name))
            for name, spec in zip(names, specs, strict=True)
        ]
        config = VSTConfig(
            trunk=trunk,
            branches=tuple(branches),
            grid=trunk.grid(trunk.image_size if self.image_size is None else _side(self.image_size)),
            trunk_name=trunk_name,
            **options,
        )
        for branch in config.branches:
            _tell_empty(branch, self.feature_layer)
        return config

    def _check(self) -> None:
        """What can be told before any model is described, and so before anything is fetched."""
        if isinstance(self.branches, (str, os.PathLike)):
            raise ValueError(
                f"branches is the string {str(self.branches)!r}; expected a list of sources: use "
                f"[{str(self.branches)!r}]."
            )
        if not isinstance(self.branches, Collection) or isinstance(self.branches, bytes):
            raise ValueError(
                f"branches is {shown(self.branches)}; expected a list of sources, or a mapping from names to sources "
                "([] for the trunk alone)."
            )
        for value, what in ((self.splits, "splits"), (self.enters, "enters")):
            if value is None and what == "enters":
                continue
            if isinstance(value, Iterator):  # it can be read but once
                object.__setattr__(self, what, value := list(value))
            as_splits(value, list(value) if isinstance(value, Mapping) else ["all"], what)
        if self.image_size is not None:
            _side(self.image_size)
        whole(self.seed, "seed", SEEDS)
        checked(self.pretrained, bool, "pretrained")
        self.check_options()
        if self.stitch is not None:
            StitchSpec.parse(self.stitch)

    def _branch(
        self, name: str, spec: VFMSpec, trunk: VFMSpec, splits: list[int], enters: list[int] | None
    ) -> BranchConfig:
        stop = feature_depth(spec, self.feature_layer)
        family = StitchSpec() if self.stitch is None else StitchSpec.parse(self.stitch)
        if enters is None:
            pairs = [(split, relative_enter(split, trunk, spec, stop)) for split in set(splits)]
        else:
            pairs = _pairs(name, splits, enters)
        pairs.sort()
        return BranchConfig(name, spec, tuple(s for s, _ in pairs), tuple(e for _, e in pairs), stop, family)


def _tell_empty(branch: BranchConfig, layer: int) -> None:
    """Refuse a branch without any block, and warn of splits at which none of its blocks is left."""
    if not branch.stop:
        raise ValueError(
            f"Branch {branch.name!r} would keep none of the {branch.spec.depth} blocks of {branch.spec.source}: "
            f"feature_layer {layer} is its stem's output, which a tree does not have; read a later one."
        )
    empty = [split for split, enter in zip(branch.splits, branch.enters, strict=True) if enter == branch.stop]
    if empty:
        warnings.warn(
            f"Branch {branch.name!r} keeps no block of {branch.spec.source} at split {', '.join(map(str, empty))}: it "
            f"is entered at its depth {branch.stop}, where feature_layer {layer} is read, so that its features are the "
            "stitch's output; a shallower split keeps some.",
            stacklevel=4,
        )


def _side(image_size: Any) -> int:
    """The side of square pictures, from a number, its digits, or (side, side)."""
    given = image_size
    if isinstance(given, str) and given.strip().isdecimal() and len(given) < 9:
        given = int(given)
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) and len(given) == 2:
        width, height = given
        if width != height:
            raise ValueError(
                f"image_size is {shown(image_size)}; a tree's pictures are square: give one side, such as "
                f"{shown(min(width, height) if all(isinstance(v, int) for v in given) else width)}."
            )
        given = width
    return whole(given, "image_size", (1, None))


def _pairs(name: str, splits: list[int], enters: list[int]) -> list[tuple[int, int]]:
    """Splits with the depths that they enter, as they were given side by side; deeper splits enter no earlier."""
    if len(splits) != len(enters) or len(set(splits)) < len(splits):
        raise ValueError(
            f"Branch {name!r}: enters {enters} were given for splits {splits}; expected one for each split, and every "
            "split once."
        )
    pairs = sorted(zip(splits, enters, strict=True))
    if any(a[1] > b[1] for a, b in pairwise(pairs)):
        told = ", ".join(f"{s} enters {e}" for s, e in pairs)
        raise ValueError(f"Branch {name!r}: {told}; expected deeper splits to enter no earlier: pair them in order.")
    return pairs


def _names(specs: Sequence[VFMSpec], given: list[str] | None) -> list[str]:
    """Names of trunk and branches: the family, numbered where several are of one.

    Several plain ViTs have nothing but a training recipe in common: each is then named as the model that it is.
    """
    plain = [spec.family == "vit" for spec in specs]
    if given is not None:
        plain[1:] = [False] * len(given)
    own = _plain_names(specs) if sum(plain) > 1 else {}
    families = [own.get(spec.source, spec.family) for spec in specs]
    families = families[:1] + (given if given is not None else families[1:])
    names: list[str] = []
    for family in families:
        taken = [family] + [f"{family}_{i}" for i in range(2, math.prod((len(families), 2)) + 1)]
        names.append(next(n for n in taken if n not in names))
    if given is not None and names[1:] != given:  # a branch may be named as the trunk's family is
        return [f"{names[0]}_trunk", *given]
    return names


def _plain_names(specs: Sequence[VFMSpec]) -> dict[str, str]:
    """By source of a plain ViT, its model's name: without the tag of its weights where that tells them apart."""
    sources = dict.fromkeys(spec.source for spec in specs if spec.family == "vit")
    models = {s: s.partition(":")[2].rstrip("/").rpartition("/")[2] for s in sources}
    short = {s: model.partition(".")[0] for s, model in models.items()}
    names = short if len(set(short.values())) == len(short) else models
    plain = {s: re.sub(r"\W+", "_", n) for s, n in names.items()}
    return {s: n if n.isidentifier() else f"vit_{n}" for s, n in plain.items()}
