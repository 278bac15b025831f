"""Feature maps as pictures that can be compared by eye."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pca_maps(features: Sequence[np.ndarray], basis: int = 0) -> list[np.ndarray]:
    """Feature maps ``[pictures, N, D]`` as RGB ``[pictures, grid, grid, 3]`` in 0..1.

    The three leading principal directions are those of ``features[basis]`` over all its pictures; every other set of
    the same width is shown in the same directions and scale (so equal colours mean equal features); a set of another
    width gets directions of its own.
    """

    def directions(x: np.ndarray) -> tuple[np.ndarray, ...]:
        flat = x.reshape(-1, x.shape[-1]).astype(np.float64)
        mean, scale = flat.mean(0), flat.std(0) + 1e-9
        # clipped: a few outlier tokens (CLIP keeps some in empty background) would otherwise be all that is seen
        _, _, v = np.linalg.svd(((flat - mean) / scale).clip(-2, 2), full_matrices=False)
        shown = (flat - mean) / scale @ v[:3].T
        low, high = np.percentile(shown, [2, 98], axis=0)
        return mean, scale, v[:3].T, low, high

    common, out = directions(features[basis]), []
    for x in features:
        mean, scale, v, low, high = common if x.shape[-1] == features[basis].shape[-1] else directions(x)
        side = round(x.shape[1] ** 0.5)
        shown = ((x - mean) / scale @ v - low) / (high - low)
        out.append(shown.clip(0, 1).reshape(len(x), side, side, 3).astype(np.float32))
    return out
