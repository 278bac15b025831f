"""How close stitched features are to a target's own: errors, cosine, distance between distributions.

All are streamed over batches of tokens; sums are kept in fp64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vst.tree.ridge import products


@dataclass(frozen=True)
class Agreement:
    """Agreement of y' with y over tokens.

    Attributes:
        error: relative error, ``sum |y' - y|^2 / sum |y - mean(y)|^2``: 0 is equality, 1 the mean's own error.
        channel_error: the same ratio for every channel, averaged over channels, so that outlier channels count as one.
        cosine: mean cosine between tokens.
        tokens: how many were compared.
    """

    error: float
    channel_error: float
    cosine: float
    tokens: int

    def to_dict(self) -> dict[str, float]:
        """Plain dict."""
        return asdict(self)


class AgreementSums:
    """Streams :class:`Agreement` over pairs of ``[..., D]`` tensors."""

    def __init__(self) -> None:
        self.tokens = 0
        self._cosine = 0.0
        self._sums: dict[str, Tensor] = {}

    def update(self, given: Tensor, wanted: Tensor) -> None:
        """Add tokens: ``given`` y' and ``wanted`` y of the same shape ``[..., D]``."""
        if given.shape != wanted.shape:
            raise ValueError(f"Tokens must pair up: given {list(given.shape)}, wanted {list(wanted.shape)}.")
        y1, y = given.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        self._cosine += float(F.cosine_similarity(y1, y, dim=-1).sum())
        for name, part in (("off", ((y1 - y) ** 2).sum(0)), ("y", y.sum(0)), ("yy", (y * y).sum(0))):
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        self.tokens += len(y)

    def result(self) -> Agreement:
        """The agreement so far.

        Raises:
            ValueError: nothing was added.
        """
        if not self.tokens:
            raise ValueError("No tokens were compared: give at least one readable picture.")
        s, n = self._sums, self.tokens
        spread = (s["yy"] - s["y"] ** 2 / n).clamp_min(0)
        floor = spread.mean() * 1e-8 + 1e-30  # a channel that never moves has no error of its own scale
        alive = spread > floor
        per_channel = (s["off"][alive] / spread[alive]).mean() if bool(alive.any()) else torch.tensor(float("nan"))
        return Agreement(
            error=float(s["off"].sum() / spread.sum().clamp_min(1e-30)),
            channel_error=float(per_channel),
            cosine=self._cosine / n,
            tokens=n,
        )


class FrechetSums:
    """Streams the Frechet distance between two sets of tokens, relative to the second set's spread.

    ``(|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))) / tr(C2)``, the distance of Gaussians with the sets' means and
    covariances (Dowson and Landau 1982; as in FID): 0 for equal distributions, 1 for a constant at the second's mean.
    """

    def __init__(self) -> None:
        self._sets: list[dict[str, Tensor]] = [{}, {}]
        self._shift: Tensor | None = None
        self.tokens = 0

    def update(self, given: Tensor, wanted: Tensor) -> None:
        """Add tokens ``[..., D]`` of both sets."""
        if self._shift is None:
            self._shift = wanted.flatten(0, -2).float().mean(0)
        for sums, x in zip(self._sets, (given, wanted), strict=True):
            x = x.flatten(0, -2).float() - self._shift
            for name, part in (("x", x.sum(0).double()), ("xx", products(x, x))):
                sums[name] = sums[name] + part if name in sums else part
        self.tokens += wanted.flatten(0, -2).shape[0]

    def result(self) -> float:
        """The relative distance so far; nan for fewer than two tokens."""
        if self.tokens < 2:
            return float("nan")
        (m1, c1), (m2, c2) = (self._moments(s) for s in self._sets)
        root = _sqrt(c2)
        cross = torch.linalg.eigvalsh(root @ c1 @ root).clamp_min(0).sqrt().sum()
        distance = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross
        return float(distance.clamp_min(0) / c2.trace().clamp_min(1e-30))

    def _moments(self, sums: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean = sums["x"] / self.tokens
        return mean, sums["xx"] / self.tokens - torch.outer(mean, mean)


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class CKASums:
    """Streams linear CKA between two sets of tokens of the same pictures, whatever their widths.

    ``|Y'X|^2 / (|X'X| |Y'Y|)`` over centred tokens, Frobenius norms (Kornblith et al. 2019, eq. 3): 1 for sets that are
    equal up to rotation and scale, near 0 for unrelated ones.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._shift: tuple[Tensor, Tensor] | None = None
        self.tokens = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add tokens ``[..., Dx]`` and ``[..., Dy]`` that pair up."""
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"Tokens must pair up: got {list(x.shape)} and {list(y.shape)}.")
        x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
        if self._shift is None:
            self._shift = (x.mean(0), y.mean(0))
        x, y = x - self._shift[0], y - self._shift[1]
        parts = {"x": x.sum(0), "y": y.sum(0), "xx": products(x, x), "yy": products(y, y), "yx": products(y, x)}
        for name, part in parts.items():
            self._sums[name] = self._sums[name] + part.double() if name in self._sums else part.double()
        self.tokens += len(x)

    def result(self) -> float:
        """CKA so far, in 0..1; nan for fewer than two tokens."""
        if self.tokens < 2:
            return float("nan")
        s, n = self._sums, self.tokens
        yx, xx, yy = (s[a + b] - torch.outer(s[a], s[b]) / n for a, b in (("y", "x"), ("x", "x"), ("y", "y")))
        return float(yx.square().sum() / (xx.norm() * yy.norm()).clamp_min(1e-30))
