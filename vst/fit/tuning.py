"""What is trained of a tree's models beside its stitches: low-rank changes and norms that are merged at the end.

While a fit runs, a weight that is tuned is computed from the published one and its change by torch's own
parametrisation, so that whatever reads it, a fused qkv or DINOv3's attention, sees the tuned weight, and blocks that
are computed again in the backward pass see it too. Afterwards the tree holds plain weights again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vst.models.fields import check_fields, one_of
from vst.models.spec import MOST_WIDTH
from vst.tree.changes import DOWN, MATRICES, PREFIX, TAILS, UP, Tuned, changes_digest, put, tuned_weights, weight_of
from vst.tree.encoder import VSTEncoder
from vst.tree.modules import ModuleMap

TRUNKS = ("none", "lora")


@dataclass(frozen=True)
class TuneConfig:
    """What is trained of a tree's models, merged at the end: it costs nothing at inference.

    Attributes:
        trunk: ``lora`` (low-rank changes of the blocks that a stitch reads after) or ``none``.
        tails: ``lora``, ``norms`` (those of the tails' blocks) or ``none``.
        rank: of the low-rank changes ``W + (alpha / rank) B A`` (Hu et al. 2021).
        alpha: default: twice the rank.
        matrices: which of a block's are changed: ``all``, ``attention`` or ``mlp``.
        lr: peak learning rate of what is tuned; warm-up and decay are the stitches'.
        own: weight of the term that holds the trunk to its own features, where the tree keeps them; 1: as much as all
            stitches' losses together, in the same units.

    Raises:
        ValueError: a value out of its range, or one that changes nothing of what is tuned.
    """

    trunk: str = "none"
    tails: str = "none"
    rank: int = 16
    alpha: float | None = None
    matrices: str = "all"
    lr: float = 1e-3
    own: float = 1.0

    def __post_init__(self) -> None:
        one_of(self.trunk, "tune.trunk", TRUNKS)
        one_of(self.tails, "tune.tails", TAILS)
        one_of(self.matrices, "tune.matrices", tuple(MATRICES))
        limits = {"rank": (1, MOST_WIDTH), "alpha": (1e-30, 1e30), "lr": (1e-30, 1e30), "own": (0, 1e30)}
        check_fields(self, limits, prefix="tune.")
        self._check_used()

    def _check_used(self) -> None:
        """Refuse what would do nothing: whoever gives it expects otherwise."""
        low = "lora" in (self.trunk, self.tails)
        used = {"rank": low, "alpha": low, "matrices": low, "lr": self.anything, "own": self.trunk != "none"}
        for field in fields(self):
            value = getattr(self, field.name)
            if not used.get(field.name, True) and value != field.default:
                needed = {"lr": "tune.trunk or tune.tails", "own": "tune.trunk: lora"}
                raise ValueError(
                    f"tune.{field.name} is {value}, and nothing that is tuned would take it: it needs "
                    f"{needed.get(field.name, 'tune.trunk or tune.tails: lora')}; leave it out otherwise."
                )

    @property
    def anything(self) -> bool:
        """Whether anything is tuned."""
        return (self.trunk, self.tails) != ("none", "none")

    def what(self, tree: VSTEncoder, *, pictures: int = 0, steps: int = 0, digest: str = "") -> Tuned:
        """What it means for a tree."""
        return Tuned(self._blocks(tree), self.tails, self.rank, self.matrices, pictures, steps, digest)

    def _blocks(self, tree: VSTEncoder) -> int:
        """How many blocks of the trunk are to be tuned: those before the deepest that a stitch reads."""
        read = [b.reads(split)[-1] for b in tree.config.branches for split in b.splits]
        return max(read) if self.trunk == "lora" else 0

    def weights(self, tree: VSTEncoder) -> dict[str, str]:
        """Names of a tree's weights that are to be tuned, each with its kind: lora or norms.

        Raises:
            ValueError: the tree was tuned before, has weights that are not fp32, or nothing that could be tuned so.
        """
        if tree.config.tuned is not None:
            raise ValueError(
                f"This tree was tuned already ({tree.config.tuned.told()}): to tune it otherwise or further, build it "
                "from its sources; its stitches alone can be fitted again without tune."
            )
        left = {"trunk": self._blocks(tree), "tails": sum(len(b.tail.blocks) for b in tree.branches.values())}
        for part, asked in (("trunk", self.trunk), ("tails", self.tails)):
            if asked != "none" and not left[part]:
                raise ValueError(
                    f"tune asks for {part} {asked!r}, and no block of this tree is left for that at its splits: choose "
                    "other splits, or tune another part."
                )
        if self.own != type(self).own and not tree.config.keep_trunk:
            raise ValueError(f"tune.own is {self.own}, but this tree does not keep its trunk's features: leave it out.")
        names = tuned_weights(tree, self.what(tree))
        for name, kind in names.items():
            if kind == "lora" and self.rank > (most := min(weight_of(tree, name).shape)):
                raise ValueError(
                    f"tune.rank is {self.rank}, and {name} has a rank of {most} at the most: choose a lower one (16 is "
                    "usual)."
                )
            if (dtype := weight_of(tree, name).dtype) != torch.float32:
                raise ValueError(f"The tree's {name} is {dtype}; load it with dtype=torch.float32 to tune it.")
        return names


class LowRank(nn.Module):
    """``W + scale B A``: A uniform and B zero at the start."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1]))  # drawn on the CPU: alike on every device
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The changed weight; never in less than fp32, as it is merged."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.lora_B @ self.lora_A)

    def change(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The change as it is saved and merged."""
        return {f"{PREFIX}{name}.{DOWN}": self.lora_A, f"{PREFIX}{name}.{UP}": self.scale * self.lora_B}


class Shifted(nn.Module):
    """``w + d``, of a norm's numbers: d is zero at the start."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """The shifted numbers."""
        return weight + self.shift

    def change(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """The numbers as they are saved and put in place."""
        return {PREFIX + name: weight + self.shift}


class Tuning(nn.Module):
    """The changes of a tree's weights, in place while they are trained; its parameters are the changes' alone.

    Args:
        tree: whose weights are to be tuned; they are parametrised until :meth:`detach`.
        config: what is tuned.
        seed: of the factors.

    Raises:
        ValueError: as :meth:`TuneConfig.weights`.
    """

    def __init__(self, tree: VSTEncoder, config: TuneConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self._tree = (tree,)  # no submodule: its own weights are none of this module's
        names = config.weights(tree)
        self._names = {name.replace(".", "-"): name for name in names}
        scale = (2.0 * config.rank if config.alpha is None else config.alpha) / config.rank
        self._before: dict[str, Tensor] = {}  # merged weights as they were
        self.changes: ModuleMap[Any] = ModuleMap()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for key, name in self._names.items():
                weight = weight_of(tree, name)
                change = Shifted(weight) if names[name] == "norms" else LowRank(weight, config.rank, scale)
                self.changes[key] = change.to(weight.device)
        modules = {name.rpartition(".")[0] for name in self._names.values()}
        self._order = {path: list(tree.get_submodule(path)._parameters) for path in modules}
        try:
            for key, name in self._names.items():
                path, _, own = name.rpartition(".")
                parametrize.register_parametrization(tree.get_submodule(path), own, self.changes[key])
        except BaseException:  # each is computed once as it is put in place, for which memory may be lacking
            self.detach()
            raise

    @contextmanager
    def once(self) -> Iterator[None]:
        """While open, each tuned weight is computed once, however many tails it takes part in.

        Not where blocks are computed again in the backward pass: what they need then is computed with them.
        """
        (tree,) = self._tree
        again = tree.trunk.checkpointing or any(b.tail.checkpointing for b in tree.branches.values())
        with nullcontext() if again else parametrize.cached():
            yield

    @torch.no_grad()
    def result(self) -> dict[str, Tensor]:
        """The changes as they are saved: by name, fp32, on the CPU."""
        (tree,) = self._tree
        out: dict[str, Tensor] = {}
        for key, name in self._names.items():
            path, _, own = name.rpartition(".")
            original = tree.get_submodule(path).parametrizations[own].original  # type: ignore[union-attr, index]
            out |= {k: v.detach().cpu().clone() for k, v in self.changes[key].change(name, original).items()}
        return out

    @torch.no_grad()
    def merge(self, *, pictures: int, steps: int) -> None:
        """Merge the changes into the tree's weights, which are plain from then on; it is told as tuned then."""
        (tree,), changes = self._tree, self.result()
        self.detach()
        self._before = {name: weight_of(tree, name).detach().cpu().clone() for name in self._names.values()}
        tuned = self.config.what(tree, pictures=pictures, steps=steps, digest=changes_digest(changes))
        tree.take_changes(changes, replace(tree.config, tuned=tuned))

    @torch.no_grad()
    def undo(self) -> None:
        """Give the tree its weights back as they were before all this, merged or not."""
        self.detach()
        (tree,) = self._tree
        for name, value in self._before.items():
            put(tree, name, value)
        if self._before:
            tree.changes, tree.onto, tree.config = None, {}, replace(tree.config, tuned=None)
        self._before = {}

    def detach(self) -> None:
        """Give the tree its weights back as they were, plain; a second call does nothing."""
        (tree,) = self._tree
        for name in self._names.values():
            path, _, own = name.rpartition(".")
            module = tree.get_submodule(path)
            if parametrize.is_parametrized(module, own):
                parametrize.remove_parametrizations(module, own, leave_parametrized=False)
        for path, order in self._order.items():  # which files and optimizers go by
            held = tree.get_submodule(path)._parameters
            for own in order:
                held[own] = held.pop(own)
