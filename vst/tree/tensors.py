"""Tensors of a file of weights, each checked: there, of its shape, floating, as sealed, finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vst.models.finite import not_finite, some
from vst.models.inputs import check_tensors
from vst.tree.seal import check_sums

FLOATING = ("F32", "F16", "BF16", "F64")  # as safetensors calls them


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: it cannot be read as one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is damaged; restore it, or make or fetch it again."
        ) from error


def check_finite(tensors: Mapping[str, Tensor], what: str, hint: str) -> None:
    """See that all numbers are finite.

    Raises:
        ValueError: some are not; ``what`` begins the sentence and ``hint`` ends it.
    """
    if bad := not_finite(tensors):
        raise ValueError(f"{what} numbers that are not finite in {some(bad)}{hint}.")


def read_tensors(
    path: Path, wanted: dict[str, torch.Size], possible: dict[str, torch.Size], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Tensors of a file that must hold all that is wanted and nothing beyond what is possible, finite.

    Args:
        path: of the file. wanted, possible: shapes by name.
        dtype: to cast to; None: as saved, and where several dtypes were saved the smallest that holds them all.

    Raises:
        ValueError: it does not hold them, or holds others, or numbers that are not finite, also after the cast.
    """
    with opened(path) as file:
        given = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        shapes = {k: tuple(v.get_shape()) for k, v in given.items()}
        check_tensors(
            str(path),
            wanted,
            {k: s for k, s in shapes.items() if k in wanted or k not in possible},
            "The folder is damaged or its config belongs to another tree: save or fetch it again.",
        )
        if odd := sorted({given[k].get_dtype() for k in wanted} - set(FLOATING)):
            raise ValueError(f"{path} holds tensors of {', '.join(odd)}; expected weights of {', '.join(FLOATING)}.")
        out = {k: file.get_tensor(k) for k in wanted}
        check_sums(path, file.metadata(), out.items())
    if dtype is None and len(kinds := {v.dtype for v in out.values()}) > 1:
        dtype = reduce(torch.promote_types, kinds)  # blocks of one dtype do not take the tokens of another
    check_finite(out, f"{path} holds", ": the training diverged or the file is damaged: fit, save or fetch it again")
    if dtype is not None:
        cast = {k: v.to(dtype) for k, v in out.items()}
        check_finite(cast, f"As {dtype}, {path} has", ": load it in a dtype of a wider range, such as bfloat16")
        return cast
    return out
