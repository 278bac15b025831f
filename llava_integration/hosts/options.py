"""What the original LLaVA says to a tower by name and options, and what the tower says back in its config."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from vst.tree.config import MODEL_TYPE, VSTConfig
from vst.tree.fusion import FUSIONS
from vst.tree.splits import as_split

LOG = logging.getLogger("llava_integration")
PREFIX = "vst:"
WHOLE = "+whole"
GRID_SIDES = (224, 336, 384, 448, 512)  # of pictures, that LLaVA-NeXT takes a grid's string for


@dataclass(frozen=True)
class HostConfig:
    """What hosts read of a tower's config.

    Attributes:
        hidden_size: width of a fused token.
        image_size, patch_size: in pixels.
        num_hidden_layers: depth of the trunk.
    """

    hidden_size: int
    image_size: int
    patch_size: int
    num_hidden_layers: int
    model_type: str = MODEL_TYPE


def parse_name(name: str) -> tuple[str, int | dict[str, int] | None]:
    """Folder or hub id of a tree, and the split where one is named.

    ``vst:PATH``, ``vst:PATH@14``, ``vst:PATH@clip=14,siglip=6`` or ``PATH``; ``+whole`` behind the first three says
    what is trained (:func:`trains_whole`).

    Raises:
        ValueError: no path.
    """
    if not name.startswith(PREFIX):
        return name, None
    found = re.fullmatch(r"(.+?)(?:@(\d+|\w+=\d+(?:,\w+=\d+)*))?", name.removeprefix(PREFIX).removesuffix(WHOLE))
    if found is None:
        raise ValueError(f"The vision tower is {name!r}; expected vst:PATH or vst:PATH@SPLIT of a saved tree.")
    return found[1], as_split(found[2]) if found[2] else None


def trains_whole(name: str) -> bool:
    """Whether the name of a tower ends in ``+whole``: a host that trains the tower trains more than its stitches."""
    return name.startswith(PREFIX) and name.endswith(WHOLE)


def check_options(tree: VSTConfig, args: Any) -> None:
    """See that the tree can serve the host's options.

    Raises:
        ValueError: it cannot.
    """
    if (feature := getattr(args, "mm_vision_select_feature", None) or "patch") != "patch":
        raise ValueError(
            f"mm_vision_select_feature is {feature!r}; a tree hands over patch tokens alone: set it to 'patch'."
        )
    wanted = [str(getattr(args, name, None) or "") for name in ("mm_patch_merge_type", "image_aspect_ratio")]
    if FUSIONS[tree.fusion].multiplies and (wanted[0].startswith("spatial") or "anyres" in wanted[1]):
        raise ValueError(no_grid(tree))
    grid = getattr(args, "image_grid_pinpoints", None)
    if "anyres" in wanted[1] and isinstance(grid, str) and "x" in grid and tree.image_size not in GRID_SIDES:
        LOG.warning("image_grid_pinpoints is %r: %s", grid, grid_sides(tree.image_size))
    layer = getattr(args, "mm_vision_select_layer", None)
    if layer is not None and layer != tree.feature_layer:
        LOG.warning(
            "mm_vision_select_layer is %s and has no effect: the tree was fitted to hidden state %s of its models",
            layer,
            tree.feature_layer,
        )


def grid_sides(side: int) -> str:
    """What LLaVA-NeXT cannot do with a tree of this side in pixels, and what it can."""
    return (
        f"grids written as (1x1),...,(6x6) want pictures of {', '.join(map(str, GRID_SIDES[:-1]))} or {GRID_SIDES[-1]} "
        f"pixels a side, and this tree's are of {side}: write image_grid_pinpoints as sizes in pixels, "
        f"[[{side}, {2 * side}], [{2 * side}, {side}], [{2 * side}, {2 * side}]]."
    )


def no_grid(tree: VSTConfig) -> str:
    """Why a tree of several tokens a patch cannot serve what needs a grid."""
    return (
        f"The tree's fusion {tree.fusion!r} gives {len(tree.names)} tokens a patch, which are no grid: anyres, "
        "spatial merging and 2-D pooling need a tree with fusion 'channel' or 'additive'."
    )
