"""What stitches are trained to match, for many depths in one pass.

LFM (layer feature matching)  the stitch's output to the target's own tokens at the depth that is entered
FFM (final feature matching)  the branch's features to the target's own, through the frozen tail; patch tokens only

Per picture the trunk runs once and each target runs once, whatever the number of depths; only tails differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vst.models import checkpoints
from vst.models.vfm import VFM
from vst.tree.encoder import VSTEncoder
from vst.tree.modules import ModuleMap
from vst.tree.stitch import Calibration, Stitch

OBJECTIVES = ("ffm", "lfm", "ridge")
MATCHES = ("channel", "raw", "norm")


@dataclass(frozen=True)
class Target:
    """A target's own tokens ``[B, T, D]``: at each depth that is entered, and at the depth that the tree reads."""

    seams: dict[int, Tensor]
    final: Tensor


class Teacher:
    """The frozen models: a tree's trunk and each branch's whole target.

    A target is its head (loaded here) followed by the tree's own tail, so the two cannot disagree.

    Args:
        tree: whose branches are to be matched.
        targets: by branch name, models that hold at least the stem and the blocks before the tail; default: loaded
            from their sources.

    Raises:
        ValueError: a target that is not the model the branch's tail was taken from.
    """

    def __init__(self, tree: VSTEncoder, targets: Mapping[str, VFM] | None = None) -> None:
        self.tree = tree
        self.heads = dict(targets) if targets is not None else load_heads(tree)
        if set(self.heads) != set(tree.branches):
            raise ValueError(f"Targets were given for {sorted(self.heads)}; the branches are {sorted(tree.branches)}.")
        dtype = next(tree.trunk.parameters()).dtype
        for name, head in self.heads.items():
            head.requires_grad_(False).to(dtype)
            _check_head(name, head, tree)

    def to(self, device: torch.device) -> Teacher:
        """Move tree and targets; returns self."""
        self.tree.to(device)
        for head in self.heads.values():
            head.to(device)
        return self

    def _cast(self, pixels: Tensor) -> Tensor:
        return pixels.to(next(self.tree.trunk.parameters()).dtype)

    @torch.no_grad()
    def taps(self, pixels: Tensor, keys: Iterable[tuple[str, int]] | None = None) -> dict[int, Tensor]:
        """The trunk's tokens at every depth that a stitch reads, of all or of those named by branch and split."""
        by_name = {b.name: b for b in self.tree.config.branches}
        chosen = [(b.name, s) for b in by_name.values() for s in b.splits] if keys is None else keys
        return self.tree.trunk.taps(self._cast(pixels), {by_name[name].reads(split) for name, split in chosen})

    @torch.no_grad()
    def target(self, name: str, pixels: Tensor) -> Target:
        """The target's own tokens for pictures in its own size and normalisation."""
        head, branch = self.heads[name], self.tree.branches[name]
        enters = sorted(set(branch.config.enters))
        at, x, seams = enters[0], head.taps(self._cast(pixels), [enters[0]])[enters[0]], {}
        for enter in enters:
            x = branch.tail.run(x, at, enter)
            at, seams[enter] = enter, x
        return Target(seams, branch.tail.run(x, at, branch.config.stop))


def load_heads(tree: VSTEncoder) -> dict[str, VFM]:
    """Each branch's target up to the tail's first block, from its source (or the tree's seed, if it is random)."""
    heads = {}
    for i, b in enumerate(tree.config.branches):
        heads[b.name] = checkpoints.load_vfm(
            b.spec.source,
            grid=tree.config.grid,
            pretrained=tree.random_seed is None,
            seed=0 if tree.random_seed is None else tree.random_seed + i + 1,
            stop=min(min(b.enters) + 1, b.spec.depth),
        )
    return heads


def _check_head(name: str, head: VFM, tree: VSTEncoder) -> None:
    tail = tree.branches[name].tail
    if head.grid != tree.config.grid or not head.has_stem or head.stop < tail.start:
        raise ValueError(
            f"The target of branch {name!r} has grid {head.grid} and blocks to {head.stop}, stem {head.has_stem}; "
            f"expected grid {tree.config.grid}, its stem and blocks to {tail.start} at least."
        )
    for key in sorted(set(head.blocks) & set(tail.blocks), key=int):
        for part, value in head.blocks[key].state_dict().items():
            if not torch.equal(value.cpu().float(), tail.blocks[key].state_dict()[part].cpu().float()):
                raise ValueError(
                    f"The target of branch {name!r} ({head.spec.source}) differs from the tree's own tail in block "
                    f"{int(key) + 1} ({part}): it is another checkpoint; pass targets={{{name!r}: the right model}}."
                )


class Matcher(nn.Module):
    """All stitches of a tree and the loss that trains them; its parameters are the stitches' alone.

    Args:
        teacher: the frozen models.
        objective: ``ffm`` or ``lfm``.
        match: how features are compared. ``channel``: every channel in units of its own standard deviation (a few
            outlier channels rule CLIP's last blocks otherwise). ``raw``: as they are, over their mean variance.
            ``norm``: after the target's final norm (FFM only).
        splits: only the stitches at these; default: all.
    """

    def __init__(
        self, teacher: Teacher, objective: str = "ffm", match: str = "channel", splits: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if objective not in ("ffm", "lfm") or match not in MATCHES or (match == "norm" and objective != "ffm"):
            raise ValueError(
                f"objective {objective!r} with match {match!r}; expected ffm with channel, raw or norm, or lfm with "
                "channel or raw."
            )
        self.objective, self.match = objective, match
        self._teacher = (teacher,)  # in a tuple: frozen models are no submodules and must not be wrapped or moved
        branches = teacher.tree.config.branches
        self.keys = [(b.name, s) for b in branches for s in b.splits if splits is None or s in splits]
        self.stitches: ModuleMap[Stitch] = ModuleMap(
            {f"{name}_{split}": teacher.tree.branches[name].stitches[str(split)] for name, split in self.keys}
        )
        for name, split in self.keys:
            self.register_buffer(f"std_{name}_{split}", torch.ones(teacher.tree.branches[name].config.spec.width))

    @torch.no_grad()
    def set_scale(self, name: str, split: int, std: Tensor) -> None:
        """Units of the loss at one stitch: the target's standard deviation by channel ``[D]`` (none after a norm)."""
        if self.match == "norm":
            return
        std = std if self.match == "channel" else (std**2).mean().sqrt().expand_as(std)
        getattr(self, f"std_{name}_{split}").copy_(std)

    def forward(self, taps: Mapping[int, Tensor], targets: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        """Losses ``[stitches]``, in the order of ``keys``.

        Args:
            taps: the trunk's tokens by depth.
            targets: by branch, what :meth:`wanted` picks of its target.
        """
        (teacher,) = self._teacher
        losses = []
        for name, split in self.keys:
            branch = teacher.tree.branches[name]
            stitch = self.stitches[f"{name}_{split}"]
            y1 = stitch(taps[branch.config.reads(split)], teacher.tree.trunk)
            if self.objective == "ffm":
                y1 = branch.tail.patches(branch.run_tail(y1, split))
                y = targets[name][branch.config.stop]
                if self.match == "norm":
                    y1, y = self._normed(name, y1), self._normed(name, y)
            else:
                y = targets[name][branch.config.enter(split)]
            off = (y1.float() - y.float()) / getattr(self, f"std_{name}_{split}")
            untouched = sum(p.sum() for p in stitch.parameters() if p.requires_grad)  # a tail may ignore the prefix
            losses.append(off.square().mean() + 0.0 * untouched)
        return torch.stack(losses)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm = self._teacher[0].heads[name].norm
        if norm is None:
            raise ValueError(f"match='norm' needs the final norm of the target of branch {name!r}: load it with norm.")
        return norm(x)

    def wanted(self, name: str, target: Target) -> dict[int, Tensor]:
        """What the objective compares with, by the target's own depth: all that a cache has to hold."""
        branch = self._teacher[0].tree.branches[name]
        if self.objective == "ffm":
            return {branch.config.stop: branch.tail.patches(target.final)}
        return dict(target.seams)


class Calibrations:
    """Streams what the closed-form starts and the loss scales need, over a few hundred pictures."""

    def __init__(self, tree: VSTEncoder) -> None:
        self.tree = tree
        self.seams = {(b.name, s): Calibration() for b in tree.config.branches for s in b.splits}
        self._final: dict[str, list[Tensor]] = {b.name: [torch.zeros(())] * 3 for b in tree.config.branches}

    def update(self, taps: Mapping[int, Tensor], targets: Mapping[str, Target]) -> None:
        """Add one batch."""
        for b in self.tree.config.branches:
            target = targets[b.name]
            for split in b.splits:
                calibration = self.seams[b.name, split]
                calibration.update(self.tree.config.trunk, b.spec, taps[b.reads(split)], target.seams[b.enter(split)])
            y = target.final[:, b.spec.prefix :].flatten(0, 1).double()
            parts = torch.tensor(float(len(y)), dtype=torch.double, device=y.device), y.sum(0), (y * y).sum(0)
            for i, part in enumerate(parts):
                self._final[b.name][i] = self._final[b.name][i].to(part) + part

    def final_std(self, name: str) -> Tensor:
        """Standard deviation ``[D]`` of a target's features by channel."""
        n, total, squares = self._final[name]
        variance = torch.as_tensor(squares / n - (total / n) ** 2).clamp_min(0)
        std = variance.sqrt()
        return std.clamp_min(float(std.mean()) * 1e-4 + 1e-12).float()

    def start(self, *, ridge: bool, penalty: float) -> dict[tuple[str, int], float | None]:
        """Start every stitch; returns the share of the seam's variance that each closed form explains."""
        return {
            key: self.tree.branches[key[0]].stitches[str(key[1])].start(calibration, ridge=ridge, penalty=penalty)
            for key, calibration in self.seams.items()
        }

    def set_scales(self, matcher: Matcher) -> None:
        """Give a matcher the units of its losses."""
        for name, split in matcher.keys:
            std = self.final_std(name) if matcher.objective == "ffm" else self.seams[name, split].patches.y_std()
            matcher.set_scale(name, split, std.to(next(matcher.parameters()).device))
