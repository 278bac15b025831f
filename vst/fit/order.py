"""Which pictures a fit learns from and in what order: by the seed alone, whatever number of processes runs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def divide(pictures: int, heldout: int, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the pictures to learn from, and of those held out: at most ``heldout``, and a fifth.

    Raises:
        ValueError: there are too few to hold one out.
    """
    order = torch.randperm(pictures, generator=_generator(seed)).tolist()
    held = min(heldout, pictures // 5)
    if heldout and not held:
        raise ValueError(
            f"{pictures} pictures were given; a fit needs 5 to keep one out: pass more, or heldout_images."
        )
    return order[held:], order[:held]


def batches(train: Sequence[int], epochs: int, size: int, seed: int) -> list[list[int]]:
    """Global batches of all epochs, the last of an epoch perhaps a short one."""
    out = []
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=_generator(seed, epoch + 1)).tolist()
        out += [[train[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return out


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(n * 1_000_003**i for i, n in enumerate(numbers)))
