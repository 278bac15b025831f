"""How a checkpoint says that its pictures are prepared: the normalisation that a spec keeps, and what is told aloud.

Whatever a checkpoint leaves open is assumed of its family, and whatever it asks for that a tree does otherwise is left
aside; neither goes without a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from vst.models.checkpoints.files import read_json

RGB = tuple[float, float, float]
PROCESSOR_FILES = ["preprocessor_config.json", "processor_config.json"]
_RESAMPLINGS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def of_processor(folder: Path, source: str, mean: RGB, std: RGB) -> tuple[RGB, RGB]:
    """Mean and standard deviation, for pixel values in 0..1, that the image processor saved in a folder works with.

    It lies in ``preprocessor_config.json``, or within ``processor_config.json`` where a whole processor was saved;
    as in transformers the latter comes first. A scale of the pixels other than 1 / 255 is folded into the two.

    Args:
        folder: of the checkpoint.
        source: what to call it in errors and warnings.
        mean, std: the family's own, assumed with a warning where the folder says nothing.

    Raises:
        ValueError: a processor whose normalisation is no three numbers, or is not known here.
    """
    path, values = processor_settings(folder)
    for name in ("do_normalize", "do_rescale"):
        if not isinstance(values.get(name), (bool, NoneType)):
            raise ValueError(f"{source}: {path} has {name} {values[name]!r}; expected true or false.")
    if values.get("rescale_offset") or values.get("offset"):
        raise ValueError(
            f"{source}: {path} shifts pixel values before they are normalised, which a VFM does not model."
        )
    for name in ("do_flip_channel_order", "do_grayscale"):
        if values.get(name):
            raise ValueError(f"{source}: {path} has {name} {values[name]!r}; a tree's pictures are RGB, in that order.")
    resample = values.get("resample")
    warn_resampling(source, _RESAMPLINGS.get(resample, resample) if isinstance(resample, int) else resample)
    factor = 1.0 if values.get("do_rescale") is False else values.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1e-4 <= factor <= 1e4:
        raise ValueError(f"{source}: {path} has rescale_factor {factor!r}; expected a number, 1 / 255 as a rule.")
    if values.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    else:
        given = {n: three(f"{source}: {path}", n, values.get(n)) for n in ("image_mean", "image_std")}
        if lacking := [n for n, v in given.items() if v is None]:
            what = f"{path} names no {' and no '.join(lacking)}" if path else "it has no preprocessor_config.json"
            warn_normalisation(source, what, mean, std)
        mean, std = given["image_mean"] or mean, given["image_std"] or std
    if math.isclose(255 * factor, 1.0, rel_tol=1e-6):
        return mean, std
    # The network sees (255 * factor * p - mean) / std for a pixel p in 0..1.
    scale = 255 * factor
    return tuple(m / scale for m in mean), tuple(s / scale for s in std)  # type: ignore[return-value]


def warn_normalisation(source: str, what: str, mean: RGB, std: RGB) -> None:
    """Tell that a family's normalisation is assumed, and how to say another."""
    warnings.warn(
        f"{source}: {what}, so the mean {_short(mean)} and standard deviation {_short(std)} of its family are assumed; "
        "where it was trained with others, put them beside its config.",
        stacklevel=3,
    )


def warn_resampling(source: str, told: Any) -> None:
    """Tell of a checkpoint whose own pictures are resized in another way than a tree's."""
    if told is not None and told != "bicubic":
        warnings.warn(
            f"{source}: its own processor resizes pictures by {told!r} resampling; a tree resizes them by 'bicubic'.",
            stacklevel=3,
        )


def processor_settings(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Settings of the image processor that is saved in a folder, and the file that they are from; nothing without one.

    Raises:
        ValueError: the file is damaged.
    """
    whole, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if whole.is_file() and (nested := read_json(whole).get("image_processor")) is not None:
        if not isinstance(nested, Mapping):
            raise ValueError(f"{whole} has an image_processor {nested!r}; expected its settings.")
        return whole, dict(nested)
    return (own, read_json(own)) if own.is_file() else (None, {})


def three(where: str, name: str, value: Any) -> RGB | None:
    """A mean or standard deviation: three numbers, or one that stands for all three; None where there is none.

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return None
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    plain = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    if len(values) != 3 or not plain or not all(-1e6 < v < 1e6 for v in values):
        raise ValueError(f"{where} has {name} {value!r}; expected three numbers, for R, G and B.")
    return float(values[0]), float(values[1]), float(values[2])


def _short(values: RGB) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in values) + ")"
