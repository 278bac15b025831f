"""Trees of every family and stitch, for what traces them."""

import torch

from vst.tree.stitches import STITCHES

FAMILIES = {
    "dinov2-clip": (("dinov2", "clip"), {}),
    "clip-dinov2-registers": (("clip", "dinov2_registers"), {}),
    "siglip-dinov3": (("siglip", "dinov3"), {}),
    "dinov3-siglip-clip": (("dinov3", "siglip", "clip"), {"feature_norm": True}),
    "registers-dinov2": (("dinov2_registers", "dinov2"), {"keep_trunk": False}),
    "additive": (("dinov2", "clip"), {"fusion": "additive", "widths": (32, 32)}),
    "interleave": (("dinov2", "clip"), {"fusion": "interleave", "widths": (32, 32)}),
    "sequence": (("dinov2", "clip"), {"fusion": "sequence", "widths": (32, 32), "normalise": "none"}),
    **{family: (("dinov2", "clip"), {"stitch": family, "widths": (32, 32)}) for family in sorted(STITCHES)},
    "reads": (("clip", "dinov2_registers"), {"stitch": {"family": "mlp_skip", "reads": 2}}),
    "lora-rotary": (("dinov3", "clip"), {"stitch": "lora", "widths": (32, 32)}),
}


def built(tree_of, name):
    """A tree by its name above, whose stitches do something."""
    models, options = FAMILIES[name]
    tree = tree_of(*models, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for stitch in tree.stitches().values():
            for p in stitch.parameters():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
            for n, b in stitch.named_buffers():
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5 * n.endswith("std"))
    return tree


def pixels_of(tree, batch):
    return torch.randn(batch, 3, tree.image_size, tree.image_size, generator=torch.Generator().manual_seed(batch))
