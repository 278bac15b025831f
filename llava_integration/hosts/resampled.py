"""A tower for hosts that see through several at once and say how many tokens each of them gives (Cambrian).

Such a host keeps a list of towers beside a list of token counts, and appends each count to the name: ``-interp576``.
"""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llava_integration.hosts.options import no_grid
from llava_integration.hosts.tower import VSTVisionTower
from vst.tree.fusion import FUSIONS

LOG = logging.getLogger("llava_integration")


def parse_count(name: str) -> tuple[str, int | None]:
    """The name of a tower without the token count behind it, and the count (the last of several)."""
    counts = re.findall(r"-interp(\d+)(?=-interp|$)", name)
    return re.sub(r"(-interp\d+)+$", "", name), int(counts[-1]) if counts else None


class ResampledTower(VSTVisionTower):
    """A tree whose grid of tokens is resampled, bilinear in float32, to as many tokens as the host asks for.

    Args:
        vision_tower: as :class:`VSTVisionTower`.
        count: tokens to give, a square number.
        args: the host's config or model arguments.
        delay_load: as :class:`VSTVisionTower`.

    Raises:
        FileNotFoundError: there is no tree.
        ValueError: a count that is no square, or a tree whose tokens are no grid.
    """

    def __init__(self, vision_tower: str, count: int, args: Any = None, delay_load: bool = False) -> None:
        self.count = count
        if count < 1 or math.isqrt(count) ** 2 != count:
            raise ValueError(f"{vision_tower} is to give {count} tokens; expected a square number, such as 576.")
        super().__init__(vision_tower, args, delay_load)
        if FUSIONS[self.tree_config.fusion].multiplies:
            raise ValueError(no_grid(self.tree_config))
        if delay_load and self.unfreeze_mm_vision_tower:
            LOG.warning(
                "%s is one of a list of towers that a reloaded model may keep outside of its modules: what was trained "
                "of it is then read from its own folder, so save it there (to_tree().save_pretrained)",
                vision_tower,
            )

    def _tokens(self, images: Tensor) -> Tensor:
        tokens, side = super()._tokens(images), math.isqrt(self.count)
        if tokens.shape[1] == self.count:
            return tokens
        grid = tokens.transpose(1, 2).unflatten(2, (self.tree_config.grid, self.tree_config.grid)).float()
        grid = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(tokens.dtype)

    @property
    def num_patches(self) -> int:
        """N, as the host asked for."""
        return self.count

    @property
    def num_patches_per_side(self) -> int:
        """Side of the grid that the N tokens are."""
        return math.isqrt(self.count)
