"""Tasks that tell what features are good for. So far: classification by a linear probe on pooled patch tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a probe on held-out pictures, the majority class's accuracy there, and how many pictures."""

    accuracy: float
    majority: float
    train: int
    test: int


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
        ValueError: features and labels do not pair up, or the training labels hold fewer than two classes.
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
    if len(set(train_labels)) < 2:
        raise ValueError(f"The training labels are all {train_labels[0]!r}; a probe needs at least two classes.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000))
    model.fit(train, np.asarray(train_labels))
    kinds, counts = np.unique(np.asarray(train_labels), return_counts=True)
    majority = float(np.mean(np.asarray(test_labels) == kinds[counts.argmax()]))
    return ProbeResult(float(model.score(test, np.asarray(test_labels))), majority, len(train), len(test))
