"""The tree's picture preparation with the face of CLIP's image processor, as the original LLaVA code bases use it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from vst.data.preparation import check_preparation
from vst.tree.config import VSTConfig


class HostImageProcessor:
    """:class:`vst.data.images.ImageTransform` behind the attributes that LLaVA 1.2.2, LLaVA-NeXT and their forks read.

    Args:
        config: of the tree.

    Attributes:
        image_mean, image_std: of the trunk's normalisation.
        size: ``shortest_edge``, ``height`` and ``width`` of the square input in pixels.
        crop_size: ``height`` and ``width``.
    """

    model_input_names = ("pixel_values",)

    def __init__(self, config: VSTConfig) -> None:
        trunk, side = config.trunk, config.image_size
        self.transform = config.transform()
        self.image_mean, self.image_std = list(trunk.mean), list(trunk.std)
        self.crop_size = {"height": side, "width": side}
        self.size = {"shortest_edge": side, **self.crop_size}

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Pictures to ``pixel_values [K, 3, S, S]``, float32.

        Args:
            images: a PIL picture of any mode, a uint8 array or tensor (``[H, W, 3]`` or ``[3, H, W]``), a stack of
                those (the frames of a video), or a list of any of them.
            return_tensors: ``pt``, or ``np``; None gives a list of arrays.
            kwargs: what hosts say to image processors of all kinds, as far as it is what this one does.

        Raises:
            ValueError: something that is no picture, or an option that asks for another preparation.
        """
        check_preparation(self.transform, kwargs)
        pixels = [self.transform(picture) for picture in _pictures(images)]
        if return_tensors == "pt":
            return BatchFeature({"pixel_values": torch.stack(pixels)})
        return BatchFeature({"pixel_values": [p.numpy() for p in pixels]}, tensor_type=return_tensors)

    __call__ = preprocess


def _pictures(images: Any) -> Iterator[Image.Image]:
    if isinstance(images, Image.Image):
        yield images
    elif isinstance(images, (list, tuple)):
        for image in images:
            yield from _pictures(image)
    else:
        array = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
        if array.ndim == 4:
            yield from _pictures(list(array))
            return
        if array.dtype != np.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
            raise ValueError(
                f"A picture of shape {list(array.shape)} and type {array.dtype} was given; expected uint8 of "
                "[height, width, 3] or [3, height, width]: give PIL pictures instead."
            )
        yield Image.fromarray(array if array.shape[-1] == 3 else np.ascontiguousarray(array.transpose(1, 2, 0)))
