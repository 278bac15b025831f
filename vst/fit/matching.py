"""The loss that compares a tree's stitched features with its teachers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vst.fit.objectives import OBJECTIVES, Compared, units_of
from vst.fit.teacher import Teacher
from vst.fit.tuning import Tuning
from vst.tree.modules import ModuleMap
from vst.tree.stitches import Stitch, joined

OWN = "own"
"""Name of the loss that holds a tuned trunk to its own features."""


def stitch_loss(given: Tensor, wanted: Tensor, std: Tensor, stitch: nn.Module | None = None) -> Tensor:
    """Mean squared difference in units of ``std [D]``: the loss of one stitch, a scalar in fp32.

    Args:
        given: the stitched model's tokens ``[B, T, D]``. wanted: the target's own.
        std: what a difference of one is, by channel.
        stitch: whose parameters, if it is given, take part in the step even where a tail ignores what they give
            (prefix tokens).

    Raises:
        ValueError: tokens that do not pair up.
    """
    if given.shape != wanted.shape:
        raise ValueError(
            f"Tokens {list(given.shape)} were given to match {list(wanted.shape)}; expected the same shape."
        )
    off = (given.float() - wanted.float()) / std
    return off.square().mean() + (0.0 if stitch is None else idle(stitch))


def idle(module: nn.Module) -> Tensor | float:
    """Zero, with every parameter of a module that is trained in its graph."""
    return 0.0 * sum(p.sum() for p in module.parameters() if p.requires_grad)


class Matcher(nn.Module):
    """All stitches of a tree, what is tuned with them, and the loss that trains them: its parameters are these alone.

    Args:
        teacher: the frozen models.
        objective: one of :data:`vst.fit.objectives.OBJECTIVES` that is trained without labels.
        match: in which units features are compared; see :class:`vst.fit.objectives.Objective`.
        splits: only the stitches at these; default: all.
        hints, beyond: see :class:`vst.fit.objectives.Compared`; a stitch's loss is then that of the objective's own
            depth and the mean of the others'.
        tuning: what is tuned of the tree's models; None: nothing.
        own: weight of the trunk's own features, where the trunk is tuned and keeps them; 1: as much as all stitches
            together.

    Attributes:
        keys: branch and split of every stitch, in the order of the losses.
        labels: names of all losses: ``branch@split``, and :data:`OWN`.

    Raises:
        ValueError: an objective that has no such loss, units that do not suit it, or hints and beyond where no
            stitch has such a depth.
    """

    std_own: Tensor

    def __init__(
        self,
        teacher: Teacher,
        objective: str = "ffm",
        match: str = "channel",
        splits: Sequence[int] | None = None,
        *,
        hints: int = 0,
        beyond: bool = False,
        tuning: Tuning | None = None,
        own: float = 1.0,
    ) -> None:
        super().__init__()
        trained = {n: o for n, o in OBJECTIVES.items() if not o.closed_form and not o.labels}
        if objective not in trained or match not in trained[objective].units:
            known = "; ".join(f"{n} with {', '.join(o.units)}" for n, o in trained.items())
            raise ValueError(f"objective {objective!r} with match {match!r} was given; expected {known}.")
        self.objective, self.match = trained[objective], match
        self.compared = Compared(self.objective, hints, beyond)
        self._teacher = (teacher,)  # in a tuple: frozen models are no submodules and must not be wrapped or moved
        config = teacher.tree.config
        self.keys = [(b.name, s) for b in config.branches for s in b.splits if splits is None or s in splits]
        self.stitches: ModuleMap[Stitch] = ModuleMap(
            {f"{name}_{split}": teacher.tree.branches[name].stitches[str(split)] for name, split in self.keys}
        )
        self.tuning = tuning
        trunk = tuning is not None and tuning.config.trunk != "none"
        self.own = own if trunk and config.keep_trunk else 0.0
        self.tunes_trunk = trunk
        self.labels = [f"{name}@{split}" for name, split in self.keys] + ([OWN] if self.own else [])
        for name, split in self.keys:
            b = teacher.tree.branches[name].config
            for depth in self.compared.depths(b, b.enter(split)):
                self.register_buffer(self._units(name, split, depth), torch.ones(b.spec.width))
        self._check_extra()
        if self.own:
            self.register_buffer("std_own", torch.ones(config.trunk.width))

    def _check_extra(self) -> None:
        """See that what is to be compared besides the objective's own depth is there, at one stitch at least."""
        branches = self._teacher[0].tree.branches
        ends = [(b := branches[name].config, b.enter(split)) for name, split in self.keys]
        room = max(self.objective.depth(enter, b.stop) - enter - 1 for b, enter in ends)
        if self.compared.hints > max(room, 0):
            raise ValueError(
                f"hints is {self.compared.hints}, and the longest tail here has {max(room, 0)} depths between the one "
                "entered and its end: ask for as many at the most, or choose other splits."
            )
        if self.compared.beyond and all(b.stop == b.spec.depth for b, _ in ends):
            raise ValueError(
                "beyond is True, but every branch is read at its last block: leave it out, or read features before it "
                "(feature_layer)."
            )

    @property
    def trunk_name(self) -> str | None:
        """Of the trunk as a target of its own, where its own features are held."""
        return self._teacher[0].trunk_name if self.own else None

    def names(self) -> list[str]:
        """All that has targets: the branches, and the trunk where its own features are held."""
        own = [] if self.trunk_name is None else [self.trunk_name]
        return [*dict.fromkeys(name for name, _ in self.keys), *own]

    def _units(self, name: str, split: int, depth: int) -> str:
        """Under which name the units of a stitch's loss at a depth are kept, with its state."""
        b = self._teacher[0].tree.branches[name].config
        own = depth == self.objective.depth(b.enter(split), b.stop)
        return f"std_{name}_{split}" if own else f"std_{name}_{split}_at{depth}"

    @torch.no_grad()
    def set_units(self, scale: Callable[[str, int], Tensor]) -> None:
        """Units of the losses, from the standard deviation by channel ``[D]`` of each target, by name, at a depth."""
        config = self._teacher[0].tree.config
        for name, split in self.keys:
            b = self._teacher[0].tree.branches[name].config
            for depth in self.compared.depths(b, b.enter(split)):
                own = getattr(self, self._units(name, split, depth))
                own.copy_(units_of(self._match(name, depth), scale(name, depth)))
        if self.trunk_name is not None:
            own = scale(self.trunk_name, config.trunk_stop)
            self.std_own.copy_(units_of("channel" if self.match == "norm" else self.match, own))

    def _match(self, name: str, depth: int) -> str:
        """In which units a depth is compared: a model's final norm belongs to the depth that is read alone."""
        read = depth == self._teacher[0].tree.branches[name].config.stop
        return "channel" if self.match == "norm" and not read else self.match

    def forward(self, seen: Mapping[int, Tensor] | Tensor, targets: Mapping[str, Mapping[int, Tensor]]) -> Tensor:
        """Losses ``[labels]``.

        Args:
            seen: the trunk's tokens by depth; its pixels ``[B, 3, S, S]`` where the trunk is tuned.
            targets: by name, what :meth:`wanted` picks of its target.
        """
        (teacher,) = self._teacher
        tree = teacher.tree
        with nullcontext() if self.tuning is None else self.tuning.once():
            taps = seen if isinstance(seen, Mapping) else self._taps(seen)
            losses = [self._loss(name, split, taps, targets[name]) for name, split in self.keys]
            if self.trunk_name is not None:
                depth = tree.config.trunk_stop
                given, wanted = tree.trunk.patches(taps[depth]), targets[self.trunk_name][depth]
                losses.append(stitch_loss(given, wanted, self.std_own))
        if self.tuning is not None:
            losses[0] = losses[0] + idle(self.tuning)
        return torch.stack(losses)

    def total(self, losses: Tensor) -> Tensor:
        """What is minimised: the stitches' losses, and the trunk's own as ``own`` times their number."""
        count = len(self.keys)
        return losses[:count].sum() + self.own * count * losses[count:].sum()

    def _taps(self, pixels: Tensor) -> dict[int, Tensor]:
        (teacher,) = self._teacher
        branches = teacher.tree.branches
        depths = {depth for name, split in self.keys for depth in branches[name].config.reads(split)}
        depths |= {teacher.tree.config.trunk_stop} if self.own else set()
        return teacher.tree.trunk.taps(teacher.cast(pixels), depths)

    def _loss(self, name: str, split: int, taps: Mapping[int, Tensor], wanted: Mapping[int, Tensor]) -> Tensor:
        (teacher,) = self._teacher
        branch = teacher.tree.branches[name]
        b, stitch = branch.config, self.stitches[f"{name}_{split}"]
        depths = self.compared.depths(b, b.enter(split))
        x, at, found = stitch(joined(taps, b.reads(split)), teacher.tree.trunk), b.enter(split), {}
        for depth in sorted(depths):
            if depth > b.stop:
                x, at = branch.tail.run(x, at, b.stop), b.stop
                x = teacher.after[name].run(x, at, depth)
            else:
                x = branch.tail.run(x, at, depth)
            at, found[depth] = depth, self.objective.picked(branch.tail, x)
        losses = []
        for depth in depths:
            given, own = found[depth], wanted[depth]
            if self._match(name, depth) == "norm":
                given, own = self._normed(name, given), self._normed(name, own)
            losses.append(stitch_loss(given, own, getattr(self, self._units(name, split, depth))))
        first, *others = losses
        return (first + torch.stack(others).mean() if others else first) + idle(stitch)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        norm = self._teacher[0].heads[name].norm
        if norm is None:
            raise ValueError(f"match='norm' needs the final norm of the target of branch {name!r}: load it with norm.")
        return norm(x)

    def depths(self, name: str) -> list[int]:
        """The target's own depths that are compared, of one branch, or of the trunk."""
        config = self._teacher[0].tree.config
        if name == self.trunk_name:
            return [config.trunk_stop]
        b = self._teacher[0].tree.branches[name].config
        return self.compared.of_branch(b, {b.enter(split) for own, split in self.keys if own == name})

    def wanted(self, name: str, target: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """What is compared with, by the target's own depth: all that a cache has to hold."""
        tree = self._teacher[0].tree
        if name == self.trunk_name:
            return {depth: tree.trunk.patches(target[depth]) for depth in self.depths(name)}
        return {depth: self.objective.picked(tree.branches[name].tail, target[depth]) for depth in self.depths(name)}

    def shapes(self, name: str) -> dict[int, tuple[int, int]]:
        """(tokens, width) of what :meth:`wanted` gives of one picture, by depth."""
        config = self._teacher[0].tree.config
        if name == self.trunk_name:
            return dict.fromkeys(self.depths(name), (config.grid**2, config.trunk.width))
        spec = self._teacher[0].tree.branches[name].config.spec
        tokens = config.grid**2 + (spec.prefix if self.objective.prefix else 0)
        return dict.fromkeys(self.depths(name), (tokens, spec.width))
