"""Splits as people write them: a trunk depth for all branches, or one for each; one of them, or several."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vst.models.fields import as_list, mapping, shown, whole

Split = int | Mapping[str, int]  # one for all branches, or by branch name


def split_label(split: Split) -> str:
    """A split as it is shown, and typed after ``TREE@``: ``14``, or ``clip=14,siglip=6`` by branch."""
    return str(split) if isinstance(split, int) else ",".join(f"{name}={depth}" for name, depth in split.items())


def as_split(value: Any) -> int | dict[str, int]:
    """A split as a call takes it, from an int, a mapping, or text as of :func:`split_label` or JSON.

    Raises:
        ValueError: anything else.
    """
    text, given = value, value
    if isinstance(text, str):
        text = text.strip().strip("'\"")
        try:
            if text.startswith("{"):
                given = json.loads(text)
            elif "=" in text:
                pairs = [part.split("=") for part in text.split(",")]
                given = {name.strip(): int(depth) for name, depth in pairs}
                given = given if len(given) == len(pairs) else value
            else:
                given = int(text)
        except (ValueError, RecursionError):
            given = value
    try:
        if isinstance(given, Mapping):
            return {branch: whole(depth, "") for branch, depth in mapping(given, "").items()}
        return whole(given, "")
    except ValueError:
        raise ValueError(
            f"{shown(value)} is no split: expected a depth, such as 14, or one for each branch, such as "
            "clip=14,siglip=6."
        ) from None


def as_splits(value: Any, names: Sequence[str], what: str = "Splits") -> dict[str, list[int]]:
    """Several splits by branch, from one or several depths for all branches, or a mapping from names to such.

    Args:
        value: ``6``, ``"6"``, ``"2,6"``, ``[2, 6]`` (whole floats and NumPy's integers as well), or ``{name: ...}``.
        names: of the branches; a mapping names each of them.
        what: for messages.

    Raises:
        ValueError: anything else; the names are others.
    """
    if isinstance(value, Mapping):
        if set(value) != set(names):
            raise ValueError(
                f"{what} by branch were given for {shown(sorted(map(str, value)))}; expected exactly {sorted(names)}."
            )
        return {name: _depths(value[name], f"{what} of branch {name!r}") for name in names}
    own = _depths(value, what)
    return {name: list(own) for name in names}


def _depths(value: Any, what: str) -> list[int]:
    given = as_list(value)
    if isinstance(value, str):
        text = value.strip()
        given = [part.strip() for part in text.removeprefix("[").removesuffix("]").split(",")] if text else []
    try:
        return [int(d) if isinstance(d, str) and d.isdecimal() and len(d) < 9 else whole(d, what) for d in given]
    except ValueError:
        raise ValueError(
            f"{what} are {shown(value)}; expected trunk depths, whole numbers such as [6, 14, 22]."
        ) from None


def several(splits: Any) -> list[Any]:
    """Splits of a call, of which one may stand alone.

    Raises:
        ValueError: there is none.
    """
    found = as_list(splits)
    if not found:
        raise ValueError(f"splits are {shown(splits)}; expected one or more, such as [6, 14, 22], or none for all.")
    return found
