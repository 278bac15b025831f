"""The order of conversations: batches of like length, so that little of a step is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class GroupedByLength(Sampler[int]):
    """Indices in an order in which each batch holds conversations of like length, as LLaVA-1.5 trains.

    All are shuffled, cut into pools of ``pool`` batches, sorted by length within each pool, and the batches are then
    shuffled over all pools. The order depends on the seed and the epoch alone, so that a resumed run goes on with it.
    transformers' LengthGroupedSampler is no stand-in: it goes from long to short through each pool, which is another
    order than that of the published runs, and the Trainer has it draw from torch's global generator, so that the order
    would hang on whatever was drawn before.

    Args:
        lengths: of every conversation.
        batch_size: conversations a step, over all processes.
        seed: of the order.
        pool: batches that are sorted together.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 20) -> None:
        self.lengths, self.batch_size, self.seed, self.pool = list(lengths), batch_size, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew; accelerate calls it at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.pool
        batches = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda i: self.lengths[i])
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        short = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []  # stays last: the rest align
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return iter([index for batch in shuffled + short for index in batch])
