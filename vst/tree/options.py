"""Which tree to build, as it is asked for: sources, splits and options; and the config that they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from vst.models import checkpoints
from vst.models.spec import VFMSpec
from vst.tree.config import BranchConfig, TreeOptions, VSTConfig, feature_depth, relative_enter
from vst.tree.stitches import StitchSpec


@dataclass(frozen=True)
class TreeArgs(TreeOptions):
    """Which tree to build.

    Attributes:
        trunk: source of the model that sees the pixels: timm:NAME, hf:ID-or-folder, open_clip:ARCH/TAG or a ready name.
        branches: sources of the other models, or a mapping from names to sources.
        splits: trunk depths to hold stitches for, for all branches or by branch name.
        image_size: side of the pictures in pixels, a multiple of the trunk's patch; default: the trunk's own.
        enters: by branch name, its own depth for each of its splits; default: the same relative depth.
        stitch: family, or {family: ..., option: ...}; default: the library's.
        pretrained: false for random weights (timing, tests).
        seed: of random weights and new stitches.
    """

    trunk: str
    branches: Sequence[str] | Mapping[str, str]
    splits: Sequence[int] | Mapping[str, Sequence[int]]
    image_size: int | None = None
    enters: Mapping[str, Sequence[int]] | None = None
    stitch: StitchSpec | str | Mapping[str, Any] | None = None
    pretrained: bool = True
    seed: int = 0

    def plan(self) -> VSTConfig:
        """The tree's config; nothing is built or loaded.

        Raises:
            ValueError: unknown models, splits out of range, widths that cannot be bridged or fused, a bad image size.
        """
        trunk = checkpoints.describe(self.trunk)
        if isinstance(self.branches, str):
            raise ValueError(
                f"branches is the string {self.branches!r}; expected a list of sources: use [{self.branches!r}]."
            )
        given = dict(self.branches) if isinstance(self.branches, Mapping) else None
        sources = list(given.values()) if given is not None else list(self.branches)
        specs = [checkpoints.describe(source) for source in sources]
        trunk_name, *names = _names([trunk, *specs], list(given) if given is not None else None)
        for value, what in ((self.splits, "splits"), (self.enters, "enters")):
            if isinstance(value, Mapping) and set(value) - set(names):
                raise ValueError(f"{what} name the branches {sorted(value)}; the branches are {names}.")
        options = {f.name: getattr(self, f.name) for f in fields(TreeOptions)}
        if self.fusion_weights is not None:
            options["fusion_weights"] = tuple(self.fusion_weights)
        return VSTConfig(
            trunk=trunk,
            branches=tuple(self._branch(name, spec, trunk) for name, spec in zip(names, specs, strict=True)),
            grid=trunk.grid(self.image_size or trunk.image_size),
            trunk_name=trunk_name,
            **options,
        )

    def _branch(self, name: str, spec: VFMSpec, trunk: VFMSpec) -> BranchConfig:
        splits = list(self.splits[name] if isinstance(self.splits, Mapping) else self.splits)
        stop = feature_depth(spec, self.feature_layer)
        family = StitchSpec() if self.stitch is None else StitchSpec.parse(self.stitch)
        if self.enters is None or name not in self.enters:
            pairs = [(split, relative_enter(split, trunk, spec, stop)) for split in set(splits)]
        else:
            pairs = _pairs(name, splits, list(self.enters[name]))
        pairs.sort()
        return BranchConfig(name, spec, tuple(s for s, _ in pairs), tuple(e for _, e in pairs), stop, family)


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
    """Names of trunk and branches: the family, numbered where several are of one."""
    families = [specs[0].family] + (given if given is not None else [s.family for s in specs[1:]])
    names: list[str] = []
    for family in families:
        taken = [family] + [f"{family}_{i}" for i in range(2, math.prod((len(families), 2)) + 1)]
        names.append(next(n for n in taken if n not in names))
    if given is not None and names[1:] != given:  # a branch may be named as the trunk's family is
        return [f"{names[0]}_trunk", *given]
    return names
