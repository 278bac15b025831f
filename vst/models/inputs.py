"""What a model is handed: pixels, tokens and tensors of a checkpoint, looked at before they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vst.models.spec import VFMSpec


def check_pixels(pixels: Any) -> None:
    """Refuse what is no batch of prepared pictures, before it is cast.

    Raises:
        ValueError: no tensor, or one of whole numbers, which were not normalised.
    """
    if not isinstance(pixels, Tensor):
        raise ValueError(
            f"pixels is a {type(pixels).__name__}; expected a tensor [batch, 3, side, side]: prepare a picture with "
            "the tree's transform(), and stack several (transform()(picture)[None] is a batch of one)."
        )
    if not pixels.is_floating_point():
        raise ValueError(
            f"pixels are {pixels.dtype}; expected floating-point pixels, normalised: prepare pictures with the tree's "
            "transform()."
        )


def check_tokens(spec: VFMSpec, tokens: Any) -> None:
    """Refuse what are no tokens ``[B, T, D]`` of a model.

    Raises:
        ValueError: no tensor, or one of another shape or of whole numbers.
    """
    x, width = tokens, spec.width
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != width or not x.is_floating_point():
        told = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"{spec.source} got tokens {told}; expected a floating-point tensor [batch, tokens, {width}], as embed or "
            "taps give them."
        )


def check_tensors(
    what: str, expected: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]], hint: str | None = None
) -> None:
    """Compare names and shapes of a checkpoint with what a model needs.

    Raises:
        ValueError: names (at most five of each) what is missing, foreign or of another shape.
    """
    missing, foreign = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    shapes = [
        f"{n} is {list(given[n])}, not {list(expected[n])}"
        for n in sorted(set(expected) & set(given))
        if tuple(expected[n]) != tuple(given[n])
    ]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for kind, names in (("missing", missing), ("foreign", foreign), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(
            f"The tensors given for {what} do not fit it: {'; '.join(problems)}. "
            + (hint or "Check that the checkpoint is complete and is the model that its config describes.")
        )
