"""The tree's picture preparation with the face of CLIP's image processor, as the original LLaVA code bases use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from vst.data.images import INTERPOLATIONS, ImageTransform
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
        self.transform = ImageTransform(size=side, mean=trunk.mean, std=trunk.std, cut=config.cut)
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


def check_preparation(transform: ImageTransform, options: Mapping[str, Any]) -> None:
    """See that options of transformers' image processors ask for nothing but what a preparation does.

    Args:
        transform: the preparation.
        options: by name; None leaves an option open.

    Raises:
        ValueError: names the first option that is unknown or asks for something else.
    """
    does = {
        "do_convert_rgb": True,
        "do_resize": True,
        "size": transform.size,
        "default_to_square": True,
        "resample": int(INTERPOLATIONS[transform.interpolation]),
        "do_center_crop": transform.cut == "crop",
        "crop_size": transform.size,
        "do_pad": transform.cut == "pad",
        "pad_size": transform.size,
        "cut": transform.cut,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": transform.mean,
        "image_std": transform.std,
        "data_format": "channels_first",
    }
    for name, given in options.items():
        if given is None or name == "disable_grouping":  # which is about speed alone
            continue
        if name not in does:
            raise ValueError(f"{name} is no option of a tree's image processor; expected {', '.join(does)}.")
        if not _same(given, does[name]):
            raise ValueError(
                f"{name} is {given!r}, but the tree's pictures are prepared with {does[name]!r}: leave it out, or "
                "prepare the pixel values yourself."
            )


def square_side(size: Any) -> int | None:
    """The side of a square as image processors write it: ``S``, a pair, height and width, or the shortest edge."""
    if isinstance(size, Mapping):
        known = {"height", "width"} <= set(size) or "shortest_edge" in size
        sides = list(size.values()) if known and set(size) <= {"height", "width", "shortest_edge"} else []
    else:
        sides = list(size) if isinstance(size, (list, tuple)) else [size]
    whole = bool(sides) and all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    return sides[0] if whole and len(set(sides)) == 1 else None


def _same(given: Any, own: Any) -> bool:
    if isinstance(own, bool):
        return bool(given) == own
    if isinstance(own, str):
        return getattr(given, "value", given) == own
    if isinstance(own, tuple):
        given = (given,) * len(own) if isinstance(given, (int, float)) else given
        return len(given) == len(own) and all(abs(a - b) < 1e-6 for a, b in zip(given, own, strict=True))
    if isinstance(own, float):
        return abs(given - own) < 1e-9
    return given == own or square_side(given) == own


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
