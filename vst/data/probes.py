"""Probes: linear classifiers of frozen features, of a picture by its pooled tokens or of its pixels by every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vst.data.labels import one_a_picture

IGNORED = -1
"""Label of a mask's pixels that count neither in the loss nor in the score."""
KINDS = ("classification", "segmentation")
"""What is predicted: one class for a picture, or one for each of its pixels."""


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a probe on held-out pictures, the majority class's there, and the probe's answers ``[test]``."""

    accuracy: float
    majority: float
    given: np.ndarray


def linear_probe(
    train: np.ndarray,
    train_labels: Sequence[int],
    test: np.ndarray,
    test_labels: Sequence[int],
    *,
    strength: float = 0.01,
) -> ProbeResult:
    """Multinomial logistic regression on standardised features (scikit-learn, L-BFGS, to convergence).

    Args:
        train, test: ``[pictures, width]``.
        train_labels, test_labels: class of each picture.
        strength: scikit-learn's ``C``, the inverse of the L2 penalty.

    Raises:
        ValueError: features and labels do not pair up, the training labels hold fewer than two classes, a label is no
            class, or features are not finite.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError('A probe needs scikit-learn: pip install "vfm-stitch-tree[eval]".') from error
    for features, labels, what in ((train, train_labels, "training"), (test, test_labels, "test")):
        if len(features) != len(labels) or not len(labels):
            raise ValueError(f"{len(features)} {what} features and {len(labels)} labels were given; expected as many.")
        one_a_picture(labels, len(labels))
        if not np.isfinite(features).all():
            raise ValueError(f"The {what} features are not finite; look at the model that they come from.")
    if len(set(train_labels)) < 2:
        raise ValueError(f"The training labels are all {train_labels[0]!r}; a probe needs at least two classes.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    model.fit(train, np.asarray(train_labels))
    kinds, counts = np.unique(np.asarray(train_labels), return_counts=True)
    majority = float(np.mean(np.asarray(test_labels) == kinds[counts.argmax()]))
    given = model.predict(test)
    return ProbeResult(float(np.mean(given == np.asarray(test_labels))), majority, given)


class LinearHead(nn.Module):
    """A linear head on a model's patch tokens, between statistics of the model's own features.

    Classification: the mean over patches, then ``W z + b``. Segmentation: ``W z + b`` for every patch, resampled
    bilinearly to the mask's size. Features are standardised by channel first (a buffer; the target model's own
    statistics), so that one learning rate suits every model. It starts at zero: every class alike.

    Args:
        kind: one of ``KINDS``.
        width: D of the features.
        classes: how many.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, kind: str, width: int, classes: int) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"The head's kind is {kind!r}; expected one of {', '.join(KINDS)}.")
        self.kind = kind
        self.linear = nn.Linear(width, classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def pool(self, patches: Tensor) -> Tensor:
        """What the head reads of patch tokens ``[B, N, D]``: ``[B, 1, D]`` pooled, or every token."""
        return patches.mean(1, keepdim=True) if self.kind == "classification" else patches

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of :meth:`pool`'s output, or ``[B, classes, grid, grid]``."""
        z = self.linear((pooled.float() - self.mean) / self.std)
        if self.kind == "classification":
            return z[:, 0]
        grid = math.isqrt(z.shape[1])
        return z.transpose(1, 2).unflatten(2, (grid, grid))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy with labels ``[B]`` or masks ``[B, side, side]``; ``IGNORED`` left out, 0 of nothing."""
        total = F.cross_entropy(self.resized(logits, labels), labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp_min(1)

    def resized(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits at the size of the labels."""
        if self.kind == "classification":
            return logits
        return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def dense_probe(
    tokens: Tensor, masks: Tensor, classes: int, *, penalty: float = 0.03, iterations: int = 40
) -> LinearHead:
    """A linear segmentation head on standardised patch tokens, fitted to the pixels of masks.

    Minimises the mean cross-entropy of the bilinearly resampled logits plus ``penalty / 2 |W|^2`` by L-BFGS on all
    pictures at once. The problem is convex and starts from zero, so nothing is drawn: equal tokens give equal heads.

    Args:
        tokens: ``[pictures, N, D]``, N a square number.
        masks: ``[pictures, side, side]`` class numbers (``IGNORED`` where none counts).
        classes: how many.
        penalty: of the weights; how the default was chosen: docs/demo.md.
        iterations: of L-BFGS at the most; the default stops a little before the minimum, alike for all.

    Raises:
        ValueError: tokens and masks do not pair up, or all pixels are of one class.
    """
    if len(tokens) != len(masks) or not len(tokens):
        raise ValueError(f"Tokens of {len(tokens)} pictures and {len(masks)} masks were given; expected as many.")
    if len(kinds := [k for k in masks.unique().tolist() if k != IGNORED]) < 2:
        raise ValueError(f"The masks hold only the class {kinds}; a probe needs at least two.")
    head = LinearHead("segmentation", tokens.shape[-1], classes).to(tokens.device)
    std, mean = torch.std_mean(tokens.flatten(0, 1), 0)
    z = (tokens - mean) / std.clamp_min(1e-6)
    optimizer = torch.optim.LBFGS(
        head.parameters(), max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = head.loss(head(z), masks) + penalty / 2 * head.linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    head.mean.copy_(mean)
    head.std.copy_(std.clamp_min(1e-6))
    return head.requires_grad_(False)


def picture_counts(given: Tensor, wanted: Tensor, classes: int) -> np.ndarray:
    """Hits, labels and predictions by class of each picture, ``[pictures, 3, classes]``; their sums tell scores.

    Args:
        given, wanted: class numbers ``[pictures, ...]``; ``IGNORED`` labels are left out.
        classes: how many.
    """
    out = np.zeros((len(wanted), 3, classes), dtype=np.int64)
    for i, (own, right) in enumerate(zip(given, wanted, strict=True)):
        counts = ClassCounts(classes)
        counts.update(own, right)
        out[i] = counts.array()
    return out


def score_of_counts(counts: np.ndarray, kind: str) -> np.ndarray:
    """Score in 0..1 of summed counts ``[..., 3, classes]``: accuracy, or mean IoU of the classes that occur."""
    hits, wanted, given = (counts[..., i, :].astype(float) for i in range(3))
    if kind == "classification":
        return hits.sum(-1) / np.maximum(wanted.sum(-1), 1)
    union = given + wanted - hits
    occurs = union > 0
    return np.where(occurs, hits / np.where(occurs, union, 1), 0).sum(-1) / occurs.sum(-1)


class ClassCounts:
    """Streams hits, labels and predictions by class, of any shape; ``IGNORED`` labels are left out.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int) -> None:
        self.hits, self.wanted, self.given = (torch.zeros(classes, dtype=torch.long) for _ in range(3))

    def update(self, given: Tensor, wanted: Tensor) -> None:
        """Add predictions and labels (long) of the same shape."""
        given, wanted = given.flatten().cpu(), wanted.flatten().cpu()
        given, wanted = given[wanted != IGNORED], wanted[wanted != IGNORED]
        for counts, values in ((self.hits, wanted[given == wanted]), (self.wanted, wanted), (self.given, given)):
            counts += torch.bincount(values, minlength=len(counts))

    def score(self, kind: str) -> float:
        """The task's score in 0..1: accuracy of classification, mean IoU of segmentation."""
        return float(score_of_counts(self.array(), kind))

    def array(self) -> np.ndarray:
        """Hits, labels and predictions ``[3, classes]``."""
        return torch.stack([self.hits, self.wanted, self.given]).numpy()
