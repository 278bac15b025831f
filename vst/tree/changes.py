"""What was tuned in a tree's models besides its stitches, as it is told in the config and saved beside the stitches.

A tuned tree is an ordinary tree: all that was trained is merged into its weights. Its stitches alone, saved, carry the
changes as they were trained, factors of low rank and the norms' own numbers, and loading them merges these into the
sources' weights again. Merging gives the same bits on every machine: see :func:`merged`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vst.models.fields import check_fields, mapping, one_of
from vst.models.spec import MOST_DEPTH, MOST_WIDTH
from vst.models.vfm import VFM

PREFIX = "changes."
DOWN, UP = "down", "up"
TAILS = ("none", "norms", "lora")
MATRICES: dict[str, tuple[str, ...]] = {"all": ("attn", "mlp"), "attention": ("attn",), "mlp": ("mlp",)}
_CHUNK = 2**15  # numbers that are merged at a time: they stay in a core's cache


@dataclass(frozen=True)
class Tuned:
    """What of a tree's models was trained with its stitches.

    Attributes:
        trunk_blocks: so many blocks of the trunk, from the first one on, were changed by low-rank factors; 0: none.
        tails: none, norms (of all their blocks) or lora.
        rank: of the factors.
        matrices: all, attention or mlp: which matrices of a block they change.
        pictures, steps: how many pictures were learned from, in how many steps.
        digest: of the changes, so that one training is not taken for another.
        own_error: relative error of the trunk's own features to those of the published model, on held-out pictures; of
            a tree that keeps its trunk and was measured.
        own_channel_error: the same by channel.
    """

    trunk_blocks: int = 0
    tails: str = "none"
    rank: int = 16
    matrices: str = "all"
    pictures: int = 0
    steps: int = 0
    digest: str = ""
    own_error: float | None = None
    own_channel_error: float | None = None

    def __post_init__(self) -> None:
        one_of(self.tails, "tuned.tails", TAILS)
        one_of(self.matrices, "tuned.matrices", tuple(MATRICES))
        least = dict.fromkeys(("pictures", "steps", "own_error", "own_channel_error"), (0, None))
        check_fields(self, {**least, "trunk_blocks": (0, MOST_DEPTH), "rank": (1, MOST_WIDTH)}, prefix="tuned.")
        if (self.own_error is None) != (self.own_channel_error is None):
            raise ValueError("tuned tells one of own_error and own_channel_error; expected both, or neither.")
        if not self.trunk_blocks and self.tails == "none":
            raise ValueError("tuned says that neither trunk nor tails were; expected one of them, or no tuned at all.")

    def to_dict(self) -> dict[str, Any]:
        """Plain dict; inverse of :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Tuned:
        """From a plain dict.

        Raises:
            ValueError: it is none, or holds what a newer version wrote.
        """
        try:
            return cls(**mapping(values, "tuned"))
        except TypeError as error:
            raise ValueError(f"tuned cannot be read ({error}): was it made by a newer version?") from error

    def made_with(self) -> dict[str, Any]:
        """The part of it that saved numbers depend on."""
        return self.unmeasured().to_dict()

    def unmeasured(self) -> Tuned:
        """The same without what is measured of it."""
        return replace(self, own_error=None, own_channel_error=None)

    def told(self) -> str:
        """What was tuned, in words."""
        which = {"all": "all matrices", "attention": "the attention's matrices", "mlp": "the MLP's matrices"}
        low = f"low-rank changes (rank {self.rank}, {which[self.matrices]})"
        parts = [f"trunk blocks 1 to {self.trunk_blocks} by {low}"] if self.trunk_blocks else []
        if self.tails == "norms":
            parts.append("the tails' norms")
        elif self.tails == "lora":
            parts.append("the tails by the same" if parts else f"the tails by {low}")
        text = f"{' and '.join(parts)}, trained in {self.steps:,} steps on {self.pictures:,} pictures and merged"
        if self.own_error is not None:
            text += (
                f"; the trunk's own features are off the published model's by a relative error of {self.own_error:.3f} "
                f"({self.own_channel_error:.3f} by channel)"
            )
        return text


def matrices_of(block: nn.Module, matrices: str) -> Iterator[str]:
    """Names of the matrices of a block that low-rank factors change."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and name.partition(".")[0] in MATRICES[matrices]:
            yield f"{name}.weight"


def norms_of(block: nn.Module) -> Iterator[str]:
    """Names of the numbers of a block's norms."""
    for name, module in block.named_modules():
        if isinstance(module, nn.LayerNorm):
            yield from (f"{name}.{part}" for part, _ in module.named_parameters(recurse=False))


def tuned_weights(tree: Any, tuned: Tuned) -> dict[str, str]:
    """Names of the tree's weights that were (or are to be) changed, each with its kind: lora or norms."""
    parts: list[tuple[str, VFM, Collection[int], str]] = []
    trunk = range(tuned.trunk_blocks)
    parts.append(("trunk", tree.trunk, trunk, "lora"))
    for name, branch in tree.branches.items():
        tail = branch.tail
        own = range(tail.start, tail.stop) if tuned.tails != "none" else ()
        parts.append((f"branches.{name}.tail", tail, own, tuned.tails))
    found: dict[str, str] = {}
    for place, model, numbers, kind in parts:
        for key, block in model.blocks.items():
            if int(key) in numbers:
                names = norms_of(block) if kind == "norms" else matrices_of(block, tuned.matrices)
                found |= {f"{place}.blocks.{key}.{name}": kind for name in names}
    return found


def change_shapes(tree: Any, tuned: Tuned | None) -> dict[str, torch.Size]:
    """Shapes of a tree's changes by the names that they are saved under."""
    out: dict[str, torch.Size] = {}
    for name, kind in ({} if tuned is None else tuned_weights(tree, tuned)).items():
        shape = weight_of(tree, name).shape
        if kind == "norms":
            out[PREFIX + name] = shape
        else:
            out[f"{PREFIX}{name}.{DOWN}"] = torch.Size((tuned.rank, shape[1]))  # type: ignore[union-attr]
            out[f"{PREFIX}{name}.{UP}"] = torch.Size((shape[0], tuned.rank))  # type: ignore[union-attr]
    return out


def weight_of(module: nn.Module, name: str) -> Tensor:
    """A weight by its name, also where it is computed by a parametrisation."""
    path, _, own = name.rpartition(".")
    return getattr(module.get_submodule(path), own)


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a weight other numbers, in memory of their own: trees that were cut from this one share what it had."""
    weight = weight_of(module, name)
    weight.data = value.to(weight.device, weight.dtype, copy=True)


def changes_digest(changes: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex and cut short, over the names, shapes and bytes of changes."""
    sha = hashlib.sha256()
    for name, value in sorted(changes.items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.contiguous().numpy().tobytes())
    return sha.hexdigest()[:24]


@torch.no_grad()
def apply_changes(tree: Any, changes: Mapping[str, Tensor]) -> None:
    """Merge changes into the weights of a tree that has none yet, in fp32.

    Raises:
        ValueError: the weights are of another dtype, in which the sums would be others.
    """
    for name in changed_weights(changes):
        if (dtype := weight_of(tree, name).dtype) != torch.float32:
            raise ValueError(
                f"The tree's {name} is {dtype}, and changes are merged in fp32: load the tree with "
                "dtype=torch.float32 and cast it afterwards, or load the saved stitches by from_pretrained."
            )
    for name, value in changes.items():
        weight_name = name.removeprefix(PREFIX)
        if weight_name.endswith(f".{UP}"):
            continue
        if weight_name.endswith(f".{DOWN}"):
            weight_name = weight_name.removesuffix(f".{DOWN}")
            weight = weight_of(tree, weight_name)
            put(tree, weight_name, merged(weight, value, changes[f"{PREFIX}{weight_name}.{UP}"]))
        else:
            put(tree, weight_name, value)


def changed_weights(changes: Iterable[str]) -> list[str]:
    """Names of the weights that changes are of, each once."""
    return list(dict.fromkeys(n.removeprefix(PREFIX).removesuffix(f".{DOWN}").removesuffix(f".{UP}") for n in changes))


def merged(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``W + up down``, fp32 on the CPU, the same bits on every machine.

    Products of two fp32 numbers are exact in fp64, so whether a machine fuses them with the sum makes no difference,
    and the sum is taken in the order of the factors; it is rounded once.

    Args:
        weight: ``[out, in]``. down: ``[rank, in]``. up: ``[out, rank]``; all fp32.
    """
    weight, down, up = (x.detach().cpu().float() for x in (weight, down, up))
    down, rows = down.double(), max(1, _CHUNK // weight.shape[1])
    out = torch.empty_like(weight)
    for at in range(0, len(weight), rows):
        part, own = weight[at : at + rows].double(), up[at : at + rows].double()
        for k in range(len(down)):
            part.addcmul_(own[:, k : k + 1], down[k : k + 1])
        out[at : at + rows] = part.float()
    return out
