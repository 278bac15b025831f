"""What a tree is, printed: its models, and what each split costs on paper."""

from __future__ import annotations

import torch

from vst.measure.cost import activation_bytes, extra_blocks, fit_flops, full_cost, tree_cost, weights_bytes
from vst.models.fields import checked, dtype_of
from vst.results.tables import table
from vst.tree.config import VSTConfig


def inspect_tree(config: VSTConfig, dtype: torch.dtype) -> None:
    """Print models, grid, tokens, cost and memory of a tree."""
    checked(config, VSTConfig, "config")
    dtype, fuse = dtype_of(dtype), config.fuser()
    print(
        f"Stitch tree: pictures {config.image_size} x {config.image_size}, grid {config.grid} x {config.grid}, "
        f"{fuse.tokens(config.grid**2)} tokens of width {fuse.width} (fusion {config.fusion}, normalise "
        f"{config.normalise}), hidden state {config.feature_layer}, cut {config.cut}"
    )
    parts = [("trunk", config.trunk_name, config.trunk, f"1..{config.trunk_depth()}", "-", "-")]
    parts += [
        (
            "branch",
            b.name,
            b.spec,
            f"{min(b.enters) + 1}..{b.stop}",
            str(b.stitch),
            ", ".join(f"{s}>{e}" for s, e in zip(b.splits, b.enters, strict=True)),
        )
        for b in config.branches
    ]
    table(
        "Models",
        ["part", "name", "source", "width", "heads", "patch", "prefix", "blocks", "stitch", "split>enters", "licence"],
        [
            (part, name, s.source, s.width, s.heads, s.patch, s.prefix, f"{held} of {s.depth}", stitch, at, s.license)
            for part, name, s, held, stitch, at in parts
        ],
    )
    if config.tuned is not None:
        print(f"Tuned: {config.tuned.told()}.")
    whole = full_cost(config)
    rows: list[tuple[object, ...]] = []
    default = config.default_split() if config.branches else None
    for label, split in config.choices().items():
        cost = tree_cost(config, split)
        rows.append(
            (
                label + (" (default)" if split == default else ""),
                f"{cost.flops / 1e9:.2f}",
                cost.flops / whole.flops,
                f"{100 * extra_blocks(config, split):.1f} %",
                f"{100 * extra_blocks(config, split, stitch=True):.1f} %",
                f"{cost.parameters / 1e6:.1f}",
                f"{weights_bytes(config, split, dtype) / 1e6:.0f}",
            )
        )
    rows.append(
        (
            "all in full",
            f"{whole.flops / 1e9:.2f}",
            1.0,
            "",
            "",
            f"{whole.parameters / 1e6:.1f}",
            f"{whole.parameters * dtype.itemsize / 1e6:.0f}",
        )
    )
    name = str(dtype).removeprefix("torch.")
    fit = ""
    if config.branches:
        apart = sum(fit_flops(config, [s]) for s in {s for b in config.branches for s in b.splits})
        fit = (
            f"; fitting all stitches by FFM: {fit_flops(config) / 1e9:.1f} GFLOPs a picture in one pass, "
            f"{fit_flops(config, cached=True) / 1e9:.1f} with cached targets, {apart / 1e9:.1f} in separate runs"
        )
    table(
        "Cost of one picture",
        ["split", "GFLOPs", "/ all in full", "extra blocks", "with stitch", "M parameters", f"MB in {name}"],
        rows,
        f"extra blocks: over the trunk model alone; activations of one picture: about "
        f"{activation_bytes(config, dtype=dtype) / 1e6:.1f} MB in {name}{fit}",
    )
