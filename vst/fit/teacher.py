"""The frozen models that teach a tree's stitches: its trunk, and every branch's model as it was published.

Per picture the trunk runs once and each target runs once, whatever the number of depths; only tails differ.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from vst.data.images import ImageTransform
from vst.models import checkpoints
from vst.models.vfm import VFM
from vst.tree.changes import tuned_weights
from vst.tree.encoder import VSTEncoder

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

    A target is its head (loaded here) followed by the tree's own tail, so the two cannot disagree. Where the tree's
    models were tuned, targets are whole models of their own; so they are once :meth:`hold` was called, as a fit that
    is to tune them does.

    Args:
        tree: whose branches are to be matched.
        targets: by branch name, models that hold at least the stem and the blocks before the tail, of a tuned tail all
            blocks up to the features; of a tuned trunk, by its name, the published one may be given too. Default:
            loaded from their sources.
        beyond: hold the targets' blocks after the features as well.

    Attributes:
        heads: whole models, or the part before the tail, by branch. tails: what continues them. after: what follows
            the features, by branch, with ``beyond``.

    Raises:
        ValueError: a target that is not the model the branch's tail was taken from.
    """

    def __init__(self, tree: VSTEncoder, targets: Mapping[str, VFM] | None = None, *, beyond: bool = False) -> None:
        self.tree = tree
        given = dict(load_heads(tree) if targets is None else targets)
        self._trunk = given.pop(tree.config.trunk_name, None) if self._lacks_trunk() else None
        self.heads = given
        if set(self.heads) != set(tree.branches):
            raise ValueError(f"Targets were given for {sorted(self.heads)}; the branches are {sorted(tree.branches)}.")
        dtype = next(tree.trunk.parameters()).dtype
        for branch, head in self.heads.items():
            _check_head(branch, head.to(dtype), tree)
        if self._trunk is not None:
            _check_trunk(self._trunk, tree)
        self.tails = dict(self.heads) if tails_tuned(tree) else {n: b.tail for n, b in tree.branches.items()}
        self.after: dict[str, VFM] = {}
        for b in tree.config.branches if beyond else ():
            head = self.heads[b.name]
            self.after[b.name] = head if head.stop == b.spec.depth else load_after(tree, b.name)
        for model in self.models():
            model.requires_grad_(False).to(dtype)

    def models(self) -> list[VFM]:
        """All models that are held here and not in the tree."""
        own = {id(b.tail) for b in self.tree.branches.values()}
        held = [*self.heads.values(), *self.tails.values(), *self.after.values()]
        held += [] if self._trunk is None else [self._trunk]
        return [m for m in {id(m): m for m in held}.values() if id(m) not in own]

    @property
    def trunk_name(self) -> str | None:
        """Under which name the trunk is a target, for its own features; None: the tree does not keep them."""
        return self.tree.config.trunk_name if self.tree.config.keep_trunk else None

    def _lacks_trunk(self) -> bool:
        """Whether the tree's trunk is not the published one, by which its own features are judged."""
        tuned = self.tree.config.tuned
        return tuned is not None and tuned.trunk_blocks > 0 and self.tree.config.keep_trunk

    def published_trunk(self) -> VFM:
        """The trunk as it was published: the tree's own, a copy that is held, or loaded now where neither is."""
        if self._trunk is None and not self._lacks_trunk():
            return self.tree.trunk
        if self._trunk is None:
            like = next(self.tree.trunk.parameters())
            self._trunk = load_trunk(self.tree).requires_grad_(False).to(like.device, like.dtype)
        return self._trunk

    def hold(self, *, trunk: bool, tails: bool) -> int:
        """Keep copies of the tree's models as they are, as what is matched: the tree's own are about to change.

        Args:
            trunk: the trunk, for its own features. tails: those of the branches.

        Returns:
            What the copies take, in bytes.
        """
        made = []
        if trunk:
            self._trunk = copy.deepcopy(self.tree.trunk)
            made.append(self._trunk)
        if tails:
            self.tails = {name: copy.deepcopy(tail) for name, tail in self.tails.items()}
            made += self.tails.values()
        return sum(p.numel() * p.element_size() for model in made for p in model.parameters())

    def to(self, device: torch.device) -> Teacher:
        """Move tree and targets; returns self."""
        self.tree.to(device)
        for model in self.models():
            model.to(device)
        return self

    def fingerprint(self) -> str:
        """Of the frozen weights, by a few values of every tensor: another checkpoint differs in nearly all of them."""
        held = {f"tree.{n}": p for n, p in self.tree.state_dict().items() if ".stitches." not in n}
        held |= {f"{name}.{n}": p for name, head in self.heads.items() for n, p in head.state_dict().items()}
        held |= {f"{name}.after.{n}": p for name, part in self.after.items() for n, p in part.state_dict().items()}
        sha = hashlib.sha256()
        for name, value in sorted(held.items()):
            some = value.detach().flatten()
            some = some[:: max(1, some.numel() // _SAMPLE)].cpu().contiguous()
            sha.update(f"{name} {list(value.shape)} {value.dtype}".encode() + some.view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:24]

    def weights(self, name: str) -> dict[str, Tensor]:
        """All that a target's features depend on, by the branch's name, or the trunk's."""
        if name == self.trunk_name:
            return {f"trunk.{k}": v for k, v in self.published_trunk().state_dict().items()}
        parts = [("head", self.heads), ("tail", self.tails), ("after", self.after)]
        return {f"{at}.{k}": v for at, held in parts if name in held for k, v in held[name].state_dict().items()}

    def pixels_of(self, name: str) -> str:
        """Under which name the pixels of a branch's target come, or of the trunk as a target of its own."""
        return TRUNK_PIXELS if name == self.trunk_name else target_pixels(name)

    def cast(self, pixels: Tensor) -> Tensor:
        """Pixels in the dtype of the models."""
        return pixels.to(next(self.tree.trunk.parameters()).dtype)

    @torch.no_grad()
    def taps(self, pixels: Tensor, keys: Iterable[tuple[str, int]] | None = None) -> dict[int, Tensor]:
        """The trunk's tokens at every depth that a stitch reads, of all or of those named by branch and split."""
        by_name = {b.name: b for b in self.tree.config.branches}
        chosen = [(b.name, s) for b in by_name.values() for s in b.splits] if keys is None else keys
        depths = {depth for name, split in chosen for depth in by_name[name].reads(split)}
        return self.tree.trunk.taps(self.cast(pixels), depths)

    @torch.no_grad()
    def target(self, name: str, pixels: Tensor, depths: Iterable[int] | None = None) -> dict[int, Tensor]:
        """The target's own tokens ``[B, T, D]`` by its depth, for pictures in its own size and normalisation.

        Args:
            name: of the branch; or of the trunk, for its own features as it was published.
            pixels: ``[B, 3, S, S]``.
            depths: of the target, none before the tail's first block; default: all that are entered, and the last.
        """
        if name == self.trunk_name:
            stop = self.tree.config.trunk_stop
            return self.published_trunk().taps(self.cast(pixels), [stop] if depths is None else depths)
        head, branch, tail = self.heads[name], self.tree.branches[name], self.tails[name]
        wanted = sorted({*branch.config.enters, branch.config.stop} if depths is None else set(depths))
        at = branch.tail.start
        x, out = head.taps(self.cast(pixels), [at])[at], {}
        for depth in wanted:
            if depth > branch.config.stop:
                x = tail.run(x, at, branch.config.stop)
                at, tail = branch.config.stop, self.after[name]
            x = tail.run(x, at, depth)
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


def tails_tuned(tree: VSTEncoder) -> bool:
    """Whether a tree's tails are no longer the published models'."""
    return tree.config.tuned is not None and tree.config.tuned.tails != "none"


def load_heads(tree: VSTEncoder) -> dict[str, VFM]:
    """Each branch's target up to the tail's first block, from its source (or the tree's seed, if it is random).

    Of a tuned tail up to the features.
    """
    heads = {}
    for i, b in enumerate(tree.config.branches):
        stop = b.stop if tails_tuned(tree) else min(min(b.enters) + 1, b.spec.depth)
        heads[b.name] = checkpoints.load_vfm(b.spec, grid=tree.config.grid, stop=stop, **_weights(tree, i + 1))
    return heads


def load_trunk(tree: VSTEncoder) -> VFM:
    """The published trunk up to its own features."""
    config = tree.config
    return checkpoints.load_vfm(config.trunk, grid=config.grid, stop=config.trunk_stop, norm=False, **_weights(tree, 0))


def load_after(tree: VSTEncoder, name: str) -> VFM:
    """The blocks of a branch's model after its features."""
    i, b = next((i, b) for i, b in enumerate(tree.config.branches) if b.name == name)
    return checkpoints.load_vfm(
        b.spec, grid=tree.config.grid, start=b.stop, stem=False, norm=False, **_weights(tree, i + 1)
    )


def _weights(tree: VSTEncoder, i: int) -> dict[str, Any]:
    """Of the source, or those that a tree of random weights was given: the trunk's (0) or a branch's."""
    if tree.random_seed is None:
        return {"pretrained": True}
    return {"pretrained": False, "seed": tree.random_seed + i}


def _check_head(name: str, head: VFM, tree: VSTEncoder) -> None:
    tail, tuned = tree.branches[name].tail, tails_tuned(tree)
    needed = tail.stop if tuned else tail.start
    if head.grid != tree.config.grid or not head.has_stem or head.stop < needed:
        raise ValueError(
            f"The target of branch {name!r} has grid {head.grid} and blocks to {head.stop}, stem {head.has_stem}; "
            f"expected grid {tree.config.grid}, its stem and blocks to {needed} at least."
        )
    # Of a tuned tail, the tensors that were left alone are compared.
    changed = () if tree.config.tuned is None else tuned_weights(tree, tree.config.tuned)
    for key in sorted(set(head.blocks) & set(tail.blocks), key=int):
        for part, value in head.blocks[key].state_dict().items():
            own = tail.blocks[key].state_dict()[part]
            if f"branches.{name}.tail.blocks.{key}.{part}" in changed:
                continue
            if not torch.equal(value.cpu().float(), own.cpu().float()):
                raise ValueError(
                    f"The target of branch {name!r} ({head.spec.source}) differs from the tree's own tail in block "
                    f"{int(key) + 1} ({part}): it is another checkpoint; pass targets={{{name!r}: the right model}}."
                )


def _check_trunk(trunk: VFM, tree: VSTEncoder) -> None:
    config = tree.config
    if trunk.grid != config.grid or not trunk.has_stem or trunk.stop < config.trunk_stop or trunk.spec != config.trunk:
        raise ValueError(
            f"The published trunk that was given is {trunk.spec.source}, grid {trunk.grid}, blocks to {trunk.stop}, "
            f"stem {trunk.has_stem}; expected {config.trunk.source}, grid {config.grid}, its stem and blocks to "
            f"{config.trunk_stop} at least."
        )
