"""The frozen models that teach a tree's stitches, the loss that compares, and the sums that start them.

Per picture the trunk runs once and each target runs once, whatever the number of depths; only tails differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vst.data.images import ImageTransform
from vst.fit.objectives import OBJECTIVES, Objective
from vst.models import checkpoints
from vst.models.vfm import VFM
from vst.tree.config import BranchConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.modules import ModuleMap
from vst.tree.ridge import ChannelSums
from vst.tree.stitches import STITCHES, Calibration, Stitch

TRUNK_PIXELS = "trunk"
_SAMPLE = 64  # values of a tensor


def target_pixels(branch: str) -> str:
    """Under which name the pixels of a branch's target come."""
    return f"target_{branch}"


def transforms(tree: VSTEncoder) -> dict[str, ImageTransform]:
    """How one picture becomes the pixels of the trunk and of every target: cut once, same grid, own normalisation."""
    config = tree.config
    out = {TRUNK_PIXELS: tree.transform()}
    for b in config.branches:
        out[target_pixels(b.name)] = ImageTransform(
            size=config.grid * b.spec.patch, mean=b.spec.mean, std=b.spec.std, cut=config.cut
        )
    return out


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

    def fingerprint(self) -> str:
        """Of the frozen weights, by a few values of every tensor: another checkpoint differs in nearly all of them."""
        held = {f"tree.{n}": p for n, p in self.tree.state_dict().items() if ".stitches." not in n}
        held |= {f"{name}.{n}": p for name, head in self.heads.items() for n, p in head.state_dict().items()}
        sha = hashlib.sha256()
        for name, value in sorted(held.items()):
            some = value.detach().flatten()
            some = some[:: max(1, some.numel() // _SAMPLE)].cpu().contiguous()
            sha.update(f"{name} {list(value.shape)} {value.dtype}".encode() + some.view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:24]

    def _cast(self, pixels: Tensor) -> Tensor:
        return pixels.to(next(self.tree.trunk.parameters()).dtype)

    @torch.no_grad()
    def taps(self, pixels: Tensor, keys: Iterable[tuple[str, int]] | None = None) -> dict[int, Tensor]:
        """The trunk's tokens at every depth that a stitch reads, of all or of those named by branch and split."""
        by_name = {b.name: b for b in self.tree.config.branches}
        chosen = [(b.name, s) for b in by_name.values() for s in b.splits] if keys is None else keys
        return self.tree.trunk.taps(self._cast(pixels), {by_name[name].reads(split) for name, split in chosen})

    @torch.no_grad()
    def target(self, name: str, pixels: Tensor, depths: Iterable[int] | None = None) -> dict[int, Tensor]:
        """The target's own tokens ``[B, T, D]`` by its depth, for pictures in its own size and normalisation.

        Args:
            name: of the branch.
            pixels: ``[B, 3, S, S]``.
            depths: of the target, none before the tail's first block; default: all that are entered, and the last.
        """
        head, branch = self.heads[name], self.tree.branches[name]
        wanted = sorted({*branch.config.enters, branch.config.stop} if depths is None else set(depths))
        at = branch.tail.start
        x, out = head.taps(self._cast(pixels), [at])[at], {}
        for depth in wanted:
            x = branch.tail.run(x, at, depth)
            at, out[depth] = depth, x
        return out

    def targets(
        self, pixels: Mapping[str, Tensor], depths: Mapping[str, Iterable[int]] | None = None
    ) -> dict[str, dict[int, Tensor]]:
        """:meth:`target` of every branch, from pixels by the names of :func:`transforms`."""
        return {
            n: self.target(n, pixels[target_pixels(n)], None if depths is None else depths[n])
            for n in self.tree.branches
        }


def load_heads(tree: VSTEncoder) -> dict[str, VFM]:
    """Each branch's target up to the tail's first block, from its source (or the tree's seed, if it is random)."""
    heads = {}
    for i, b in enumerate(tree.config.branches):
        heads[b.name] = checkpoints.load_vfm(
            b.spec,
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


def stitch_loss(given: Tensor, wanted: Tensor, std: Tensor, stitch: nn.Module) -> Tensor:
    """Mean squared difference in units of ``std [D]``: the loss of one stitch, a scalar in fp32.

    Args:
        given: the stitched model's tokens ``[B, T, D]``. wanted: the target's own.
        std: what a difference of one is, by channel.
        stitch: whose parameters take part in the step even where a tail ignores what they give (prefix tokens).

    Raises:
        ValueError: tokens that do not pair up.
    """
    if given.shape != wanted.shape:
        raise ValueError(
            f"Tokens {list(given.shape)} were given to match {list(wanted.shape)}; expected the same shape."
        )
    off = (given.float() - wanted.float()) / std
    return off.square().mean() + idle(stitch)


def idle(stitch: nn.Module) -> Tensor | float:
    """Zero, with every parameter of a stitch in its graph."""
    return 0.0 * sum(p.sum() for p in stitch.parameters() if p.requires_grad)


class Matcher(nn.Module):
    """All stitches of a tree and the loss that trains them; its parameters are the stitches' alone.

    Args:
        teacher: the frozen models.
        objective: one of :data:`vst.fit.objectives.OBJECTIVES` that is trained without labels.
        match: in which units features are compared; see :class:`vst.fit.objectives.Objective`.
        splits: only the stitches at these; default: all.

    Raises:
        ValueError: an objective that has no such loss, or units that do not suit it.
    """

    def __init__(
        self, teacher: Teacher, objective: str = "ffm", match: str = "channel", splits: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        trained = {n: o for n, o in OBJECTIVES.items() if not o.closed_form and not o.labels}
        if objective not in trained or match not in trained[objective].units:
            known = "; ".join(f"{n} with {', '.join(o.units)}" for n, o in trained.items())
            raise ValueError(f"objective {objective!r} with match {match!r} was given; expected {known}.")
        self.objective, self.match = trained[objective], match
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
            b, stitch = branch.config, self.stitches[f"{name}_{split}"]
            enter = b.enter(split)
            given = self.objective.reached(branch.tail, stitch(taps[b.reads(split)], teacher.tree.trunk), enter, b.stop)
            wanted = targets[name][self.objective.depth(enter, b.stop)]
            if self.match == "norm":
                given, wanted = self._normed(name, given), self._normed(name, wanted)
            losses.append(stitch_loss(given, wanted, getattr(self, f"std_{name}_{split}"), stitch))
        return torch.stack(losses)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm = self._teacher[0].heads[name].norm
        if norm is None:
            raise ValueError(f"match='norm' needs the final norm of the target of branch {name!r}: load it with norm.")
        return norm(x)

    def depths(self, name: str) -> list[int]:
        """The target's own depths that the objective compares with, of one branch."""
        return compared_depths(self.objective, self._teacher[0].tree.branches[name].config)

    def wanted(self, name: str, target: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What the objective compares with, by the target's own depth: all that a cache has to hold."""
        tail = self._teacher[0].tree.branches[name].tail
        return {depth: self.objective.picked(tail, target[depth]) for depth in self.depths(name)}

    def shapes(self, name: str) -> dict[int, tuple[int, int]]:
        """(tokens, width) of what :meth:`wanted` gives of one picture, by depth."""
        tree = self._teacher[0].tree
        spec = tree.branches[name].config.spec
        tokens = tree.config.grid**2 + (spec.prefix if self.objective.prefix else 0)
        return dict.fromkeys(self.depths(name), (tokens, spec.width))


def compared_depths(objective: Objective, branch: BranchConfig) -> list[int]:
    """The target's own depths at which an objective compares, ascending."""
    return sorted({objective.depth(enter, branch.stop) for enter in branch.enters})


class Calibrations:
    """Streams what the closed-form starts and the loss scales need, over a few hundred pictures.

    Args:
        tree: whose stitches are to be fitted.
        objective: what they are to be trained for after the start; None: nothing.
    """

    def __init__(self, tree: VSTEncoder, objective: str | None = None) -> None:
        self.tree = tree
        self.seams = {(b.name, s): Calibration() for b in tree.config.branches for s in b.splits}
        trained = [] if objective is None else [OBJECTIVES[objective]]
        self._features = {
            (b.name, depth): ChannelSums()
            for b in tree.config.branches
            for o in trained
            for depth in compared_depths(o, b)
            if depth not in b.enters
        }

    def observe(self, teacher: Teacher, pixels: Mapping[str, Tensor]) -> None:
        """Add one batch of pictures: pixels by the names of :func:`transforms`."""
        depths = {
            b.name: {*b.enters, *(depth for name, depth in self._features if name == b.name)}
            for b in self.tree.config.branches
        }
        self.update(teacher.taps(pixels[TRUNK_PIXELS]), teacher.targets(pixels, depths))

    def update(self, taps: Mapping[int, Tensor], targets: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Add one batch of the trunk's tokens by depth, and every target's by its own."""
        for b in self.tree.config.branches:
            for split in b.splits:
                y = targets[b.name][b.enter(split)]
                self.seams[b.name, split].update(self.tree.config.trunk, b.spec, taps[b.reads(split)], y)
        for (name, depth), sums in self._features.items():
            sums.update(self.tree.branches[name].tail.patches(targets[name][depth]).flatten(0, 1))

    def scale(self, objective: Objective, name: str, split: int) -> Tensor:
        """Standard deviation ``[D]`` by channel of what an objective compares with at one stitch (patch tokens)."""
        b = self.tree.branches[name].config
        depth = objective.depth(b.enter(split), b.stop)
        if depth in b.enters:
            return next(self.seams[name, s].patches.y_std() for s in b.splits if b.enter(s) == depth)
        return self._features[name, depth].std()

    def start(self, form: str | None = "ridge", *, penalty: float) -> dict[tuple[str, int], float | None]:
        """Start every stitch; returns the share of the seam's variance that each closed form explains.

        Args:
            form: one of :data:`vst.tree.ridge.CLOSED_FORMS`; None: random maps between the right statistics.
            penalty: of ridge regression, in standardised units.
        """
        return {
            key: self.tree.branches[key[0]].stitches[str(key[1])].start(calibration, form, penalty=penalty)
            for key, calibration in self.seams.items()
        }

    def set_scales(self, matcher: Matcher) -> None:
        """Give a matcher the units of its losses."""
        for name, split in matcher.keys:
            std = self.scale(matcher.objective, name, split)
            matcher.set_scale(name, split, std.to(next(matcher.parameters()).device))


def check_closed_form(families: Iterable[str], form: str) -> None:
    """Make sure that a closed form asked for by name is had.

    Raises:
        ValueError: a family that has none.
    """
    lacking = sorted({family for family in families if not STITCHES[family].closed_form})
    if lacking:
        raise ValueError(
            f"Stitches of family {', '.join(lacking)} have no closed form, and {form!r} is nothing else: train them "
            "with ffm or lfm, or use a family that has one, such as linear."
        )
