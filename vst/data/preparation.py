"""A preparation of pictures in the words of transformers' image processors: what is asked for beside what is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vst.data.images import INTERPOLATIONS, ImageTransform


def check_preparation(transform: ImageTransform, options: Mapping[str, Any]) -> None:
    """See that options of transformers' image processors ask for nothing but what a preparation does.

    Args:
        transform: the preparation.
        options: by name; None leaves an option open.

    Raises:
        ValueError: names the first option that is unknown or asks for something else.
    """
    does = _done_by(transform)
    for name, given in options.items():
        if given is not None and name not in does and name != "disable_grouping":  # which is about speed alone
            raise ValueError(f"{name} is no option of a tree's image processor; expected {', '.join(does)}.")
        for _, own in asked_otherwise(transform, {name: given}).values():
            raise ValueError(
                f"{name} is {given!r}, but the tree's pictures are prepared with {own!r}: leave it out, or "
                "prepare the pixel values yourself."
            )


def asked_otherwise(transform: ImageTransform, options: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options of transformers' image processors that ask for something else than a preparation does.

    Args:
        transform: the preparation.
        options: by name; None leaves an option open, and names that say nothing about a preparation are passed over.

    Returns:
        By name, what is asked for and what is done.
    """
    does = _done_by(transform)
    given = {name: value for name, value in options.items() if value is not None and name in does}
    return {name: (value, does[name]) for name, value in given.items() if not _same(value, does[name])}


def _done_by(transform: ImageTransform) -> dict[str, Any]:
    return {
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
    try:
        return _equal(given, own)
    except TypeError:  # what is no number at all, in a file of someone else's
        return False


def _equal(given: Any, own: Any) -> bool:
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
