"""Closed-form maps from streamed sums (ridge, orthogonal Procrustes): memory does not grow with the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_KEPT_ROWS = 4096  # a sample of inputs, for ranges that sums cannot tell
_MIN_STD = 1e-4  # of the mean standard deviation: a dead channel must not be blown up


@dataclass(frozen=True)
class RidgeFit:
    """An affine map between standardised spaces: ``y = (weight @ ((x - x_mean) / x_std)) * y_std + y_mean``.

    Attributes:
        weight: ``[Dy, Dx]`` fp32. x_mean, x_std: ``[Dx]``. y_mean, y_std: ``[Dy]``.
        sample: ``[rows, Dx]`` standardised inputs, a few thousand of those seen.
        explained: share of the (standardised) variance of y that the map explains on the data it was fitted to.
    """

    weight: Tensor
    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor
    sample: Tensor
    explained: float


def products(x: Tensor, y: Tensor) -> Tensor:
    """``x.T @ y`` of rows ``[rows, Dx]`` and ``[rows, Dy]`` in full precision, as fp64 ``[Dx, Dy]``.

    Autocast would take such products in bf16, and ``torch.set_float32_matmul_precision`` may allow less than fp32. What
    is read off them (a map between correlated channels, a covariance's root) does not bear that.
    """
    full = torch.float32 if torch.get_float32_matmul_precision() == "highest" else torch.float64
    with torch.autocast(x.device.type, enabled=False):
        return (x.to(full).T @ y.to(full)).double()


class RidgeSums:
    """Sums for the regression of ``y [rows, Dy]`` on ``x [rows, Dx]``; rows come in any number of updates.

    Products are taken in fp32 about a provisional mean (the first rows') and summed in fp64 (:func:`products`).
    """

    def __init__(self) -> None:
        self.rows = 0
        self._sums: dict[str, Tensor] = {}
        self._shift: tuple[Tensor, Tensor] | None = None
        self._sample: list[Tensor] = []

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add rows.

        Raises:
            ValueError: x and y do not pair up, or hold values that are not finite.
        """
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
            raise ValueError(f"Rows must pair up: got x {list(x.shape)} and y {list(y.shape)}; expected [rows, width].")
        x, y = x.float(), y.float()
        if self._shift is None:
            self._shift = (x.mean(0), y.mean(0))
        x, y = x - self._shift[0], y - self._shift[1]
        parts = {"x": x.sum(0), "y": y.sum(0), "xx": products(x, x), "xy": products(x, y), "yy": (y * y).sum(0)}
        if not all(bool(torch.isfinite(p).all()) for p in parts.values()):
            raise ValueError("Features that are not finite were given to the ridge start; look for broken weights.")
        for name, part in parts.items():
            part = part.double()
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        kept = sum(len(s) for s in self._sample)
        if kept < _KEPT_ROWS:
            self._sample.append(x[:: -(-len(x) // 256)][: _KEPT_ROWS - kept].clone())  # spread over the batch
        self.rows += len(x)

    def nbytes(self) -> int:
        """Memory of what is kept: bounded, however many rows come."""
        return sum(t.nbytes for t in (*self._sums.values(), *(self._shift or ()), *self._sample))

    def y_std(self) -> Tensor:
        """Standard deviation of y by channel ``[Dy]``, fp32."""
        return channel_std(self._sums["yy"] / self.rows - (self._sums["y"] / self.rows) ** 2).float()

    def solve_orthogonal(self) -> RidgeFit:
        """Orthogonal Procrustes with a scale: ``y - mean(y) = s Q (x - mean(x))``, Q orthogonal, of least squares.

        ``Q = U V'`` where ``U S V'`` is the SVD of the cross-covariance ``[Dy, Dx]``, and ``s = tr(S) / tr(cov(Q x))``
        (Schoenemann 1966; Schoenemann and Carroll 1970). Where widths differ the SVD is the thin one and Q is
        semi-orthogonal: into a wider space ``Q'Q = I`` (all of x is kept, turned into a subspace of y's), into a
        narrower one ``QQ' = I`` (the directions of x that y knows are kept). Spaces are centred and divided by one
        number, the root mean variance of their channels, as a scale by channel would not commute with Q.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if self.rows < 2 or self._shift is None:
            raise ValueError(f"A Procrustes fit needs at least 2 rows, {self.rows} were given: pass more pictures.")
        n, s = self.rows, self._sums
        x_mean, y_mean = s["x"] / n, s["y"] / n
        xx = s["xx"].diagonal() / n - x_mean**2
        x_std, y_std = (channel_std(v.clamp_min(0).mean().expand_as(v)) for v in (xx, s["yy"] / n - y_mean**2))
        cross = ((s["xy"] / n - torch.outer(x_mean, y_mean)) / torch.outer(x_std, y_std)).T
        u, singular, v = torch.linalg.svd(cross, full_matrices=False)
        turned = v.T @ v  # x that Q keeps: all of it unless y is narrower
        gram = (s["xx"] / n - torch.outer(x_mean, x_mean)) / torch.outer(x_std, x_std)
        scale = singular.sum() / (turned * gram).sum()
        explained = scale * singular.sum() / len(y_std)  # of least squares: s tr(S) over the variance of y, its width
        sample = torch.cat(self._sample).double()
        return RidgeFit(
            weight=(scale * (u @ v)).float(),
            x_mean=(x_mean + self._shift[0]).float(),
            x_std=x_std.float(),
            y_mean=(y_mean + self._shift[1]).float(),
            y_std=y_std.float(),
            sample=((sample - x_mean) / x_std).float(),
            explained=float(explained),
        )

    def solve(self, penalty: float) -> RidgeFit:
        """Minimise ``mean |W x - y|^2 + penalty * |W|^2`` over standardised x and y.

        Raises:
            ValueError: fewer than two rows were seen, or the penalty is not positive.
        """
        if self.rows < 2 or self._shift is None:
            raise ValueError(f"A ridge fit needs at least 2 rows, {self.rows} were given: pass more pictures.")
        if penalty <= 0:
            raise ValueError(f"The ridge penalty is {penalty}; expected a positive number, such as 1e-3.")
        n, s = self.rows, self._sums
        x_mean, y_mean = s["x"] / n, s["y"] / n
        xx = s["xx"] / n - torch.outer(x_mean, x_mean)
        xy = s["xy"] / n - torch.outer(x_mean, y_mean)
        x_std, y_std = channel_std(xx.diagonal()), channel_std(s["yy"] / n - y_mean**2)
        gram = xx / torch.outer(x_std, x_std)
        cross = xy / torch.outer(x_std, y_std)
        gram.diagonal().add_(penalty)
        weight = torch.linalg.solve(gram, cross).T
        gram.diagonal().sub_(penalty)
        residual = 1 - 2 * (weight * cross.T).sum(1) + ((weight @ gram) * weight).sum(1)
        sample = torch.cat(self._sample).double()
        return RidgeFit(
            weight=weight.float(),
            x_mean=(x_mean + self._shift[0]).float(),
            x_std=x_std.float(),
            y_mean=(y_mean + self._shift[1]).float(),
            y_std=y_std.float(),
            sample=((sample - x_mean) / x_std).float(),
            explained=float(1 - residual.mean()),
        )


def channel_std(variance: Tensor) -> Tensor:
    """Standard deviations by channel ``[D]``, none so small that dividing by it would blow up a dead channel."""
    std = variance.clamp_min(0).sqrt()
    return std.clamp_min(max(float(std.mean()) * _MIN_STD, 1e-12))


CLOSED_FORMS: dict[str, Callable[[RidgeSums, float], RidgeFit]] = {
    "ridge": lambda sums, penalty: sums.solve(penalty),
    "procrustes": lambda sums, penalty: sums.solve_orthogonal(),
}


class ChannelSums:
    """Streams mean and standard deviation of features by channel, in fp64."""

    def __init__(self) -> None:
        self.rows = 0
        self._total: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def update(self, y: Tensor) -> None:
        """Add rows ``[rows, D]``."""
        y = y.double()
        self.rows += len(y)
        self._total, self._squares = self._total + y.sum(0), self._squares + y.square().sum(0)

    def mean(self) -> Tensor:
        """``[D]``, fp32."""
        return torch.as_tensor(self._total / self.rows).float()

    def std(self) -> Tensor:
        """``[D]``, fp32; see :func:`channel_std`."""
        variance = self._squares / self.rows - (self._total / self.rows) ** 2
        return channel_std(torch.as_tensor(variance)).float()
