"""Pictures for trees, as tensors."""

import torch


def pixels_of(tree, batch=2, seed=0):
    return torch.randn(batch, 3, tree.image_size, tree.image_size, generator=torch.Generator().manual_seed(seed))
