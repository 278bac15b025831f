"""How the branches' tokens become one sequence.

channel      [B, N, sum of widths]   features side by side (Prismatic, Eagle): same token count
additive     [B, N, D]               weighted sum, equal widths
interleave   [B, k * N, D]           a1 b1 a2 b2 ... (mixture of features): k times the tokens, equal widths
sequence     [B, k * N, D]           all of a, then all of b: k times the tokens, equal widths
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NORMALISE = ("layer", "none")


@dataclass(frozen=True)
class Rule:
    """One way to fuse; a new one is an entry of ``FUSIONS``.

    Attributes:
        join: branches' tokens ``[B, N, D_i]`` and weights to one sequence.
        widens: the widths add up, and may differ; else all branches have one width, and so has what comes out.
        multiplies: there are as many tokens out as branches have together; else as many as one has.
        weighted: weights mean something.
    """

    join: Callable[[list[Tensor], Sequence[float]], Tensor]
    widens: bool = False
    multiplies: bool = False
    weighted: bool = False


FUSIONS: dict[str, Rule] = {
    "channel": Rule(lambda parts, weights: torch.cat(parts, dim=-1), widens=True),
    "additive": Rule(
        lambda parts, weights: torch.stack([w * p for w, p in zip(weights, parts, strict=True)]).sum(0), weighted=True
    ),
    "interleave": Rule(lambda parts, weights: torch.stack(parts, dim=2).flatten(1, 2), multiplies=True),
    "sequence": Rule(lambda parts, weights: torch.cat(parts, dim=1), multiplies=True),
}


class Fusion:
    """Fuse features of named branches.

    Args:
        name: one of ``FUSIONS``.
        widths: width of each branch, in order.
        normalise: ``layer`` gives every token of every branch zero mean and unit variance (branch scales differ by
            tens of standard deviations); ``none`` leaves them.
        weights: of ``additive``, one a branch; the default is equal shares.

    Raises:
        ValueError: widths that the fusion cannot join, or weights that do not belong.
    """

    def __init__(
        self, name: str, widths: Mapping[str, int], *, normalise: str = "layer", weights: Sequence[float] | None = None
    ) -> None:
        rule = FUSIONS[name]
        if not rule.widens and len(set(widths.values())) > 1:
            raise ValueError(
                f"Fusion {name!r} needs branches of equal width, these have {dict(widths)}: use fusion "
                "'channel', or before a language model one projector a branch."
            )
        if weights is not None and (not rule.weighted or len(weights) != len(widths)):
            weighted = " and ".join(repr(n) for n, r in FUSIONS.items() if r.weighted)
            raise ValueError(
                f"fusion_weights {list(weights)} were given for fusion {name!r} of {len(widths)} branches; they belong "
                f"to {weighted}, one a branch."
            )
        self.name, self.normalise = name, normalise
        self.branches = len(widths)
        self.weights = list(weights) if weights is not None else [1 / len(widths)] * len(widths)
        self.width = sum(widths.values()) if rule.widens else next(iter(widths.values()))

    @property
    def rule(self) -> Rule:
        """How parts are joined; looked up, as a tree that goes to another process carries no functions."""
        return FUSIONS[self.name]

    def tokens(self, patches: int) -> int:
        """Tokens out for ``patches`` tokens a branch."""
        return patches * (self.branches if self.rule.multiplies else 1)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Fuse one ``[B, N, D_i]`` a branch, in order."""
        ready = [F.layer_norm(p, p.shape[-1:]) for p in parts] if self.normalise == "layer" else list(parts)
        return self.rule.join(ready, self.weights)
