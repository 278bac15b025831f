"""What a field of a config may hold: types by its annotation, whole and finite numbers, ranges, names.

Configs come from files and command lines as well as from code, so what is in them is checked once, where a config is
made, and in one sentence. What is plainly meant is taken: ``6.0`` and NumPy's 6 are 6, a list is a tuple. Nothing is
taken for something else: ``True`` is no number, ``"no"`` is not false, NaN is no rate.
"""

from __future__ import annotations

import difflib
import math
import numbers
import operator
import re
import reprlib
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

Number = TypeVar("Number", int, float)
Limits = tuple[float | None, float | None]  # least and most, both allowed; None where there is none

SEEDS: Limits = (-(2**42), 2**42)  # the generators take 64 bits, and some are given a multiple of the seed

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def shown(value: Any) -> str:
    """A value as a message shows it: one line, and not a long one."""
    return " ".join(_SHORT.repr(value).split())


def whole(value: Any, what: str, limits: Limits = (None, None)) -> int:
    """An int from an int, a NumPy integer or a float without a fraction.

    Raises:
        ValueError: anything else, or a number beyond the limits.
    """
    number: int | None = None
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()
    if type(value) is int:
        number = value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    elif not isinstance(value, (bool, torch.Tensor, str)) and type(value).__name__ != "bool_":  # NumPy's truth value
        try:
            number = operator.index(value)
        except TypeError:
            number = None
    if number is None:
        raise ValueError(f"{what} is {shown(value)}; expected a whole number{_told(limits)}.")
    return _within(number, what, limits)


def number(value: Any, what: str, limits: Limits = (None, None)) -> float:
    """A finite number: ints and floats as they are, NumPy's as Python's.

    Raises:
        ValueError: anything else, or a number beyond the limits.
    """
    try:
        plain = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # a whole number that no float can hold
        plain = math.inf
    if not math.isfinite(plain):
        raise ValueError(f"{what} is {shown(value)}; expected a finite number{_told(limits)}.")
    return _within(value if type(value) in (int, float) else plain, what, limits)


def name(value: Any, what: str) -> str:
    """A name of letters, digits and ``._-`` that can stand in files, tables and pages.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{what} is {shown(value)}; expected a name of letters, digits and ._-, of 100 at the most.")
    return value


def line(value: Any, what: str, most: int = 4096) -> str:
    """Text of one printable line, not empty.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or not value or len(value) > most or not value.isprintable():
        raise ValueError(f"{what} is {shown(value)}; expected one line of text, of {most} characters at the most.")
    return value


def one_of(value: Any, what: str, known: Collection[str]) -> str:
    """One of some words.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{what} is {shown(value)}; expected one of {', '.join(known)}.")
    return value


def dtype_of(value: Any, what: str = "dtype") -> torch.dtype:
    """A floating dtype of weights from itself or its name: ``torch.float16``, ``"float16"``, ``"torch.float16"``.

    Raises:
        ValueError: anything else.
    """
    known = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    named = {str(kind): kind for kind in known} | {str(kind).partition(".")[2]: kind for kind in known}
    found = named.get(value) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or found not in known:
        raise ValueError(f"{what} is {shown(value)}; expected float32, float16, bfloat16 or float64.")
    return found


def known_options(given: Iterable[str], known: Collection[str], what: str) -> None:
    """Refuse the first keyword that a function does not have, where it hands its keywords on.

    Raises:
        TypeError: as Python does for an unknown keyword; says what was probably meant.
    """
    if unknown := sorted(set(given) - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.7)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise TypeError(f"{what} has no option {unknown[0]!r}{hint}; its options: {', '.join(sorted(known))}.")


def as_list(value: Any) -> list[Any]:
    """Values of which one may stand alone: text, a mapping and a tensor without dimensions are one."""
    alone = isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable)
    return [value] if alone or getattr(value, "ndim", 1) == 0 else list(value)


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    """A mapping with text for keys, as a JSON object or a YAML block is.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} is {shown(value)}; expected a mapping from names to values.")
    return value


def check_fields(
    config: Any, limits: Mapping[str, Limits] | None = None, *, prefix: str = "", but: Collection[str] = ()
) -> None:
    """Check the fields of a frozen dataclass against their annotations and limits, and put plain values in their place.

    Args:
        config: the dataclass, from its ``__post_init__``.
        limits: by field, of its numbers; of a list's or a mapping's, of each number in it.
        prefix: before a field's name in messages.
        but: fields that the dataclass checks by itself.

    Raises:
        ValueError: the first field that is not what it is said to be.
    """
    hints = _hints(type(config))  # type: ignore[arg-type]  # a class is hashable
    for field in fields(config):
        if field.name in but:
            continue
        value = getattr(config, field.name)
        plain = checked(value, hints[field.name], f"{prefix}{field.name}", (limits or {}).get(field.name, (None, None)))
        if plain is not value:
            object.__setattr__(config, field.name, plain)


def checked(value: Any, hint: Any, what: str, limits: Limits = (None, None)) -> Any:
    """A value as its annotation says: itself, or the plain value that is meant.

    Raises:
        ValueError: it is something else.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if hint is int:
        return whole(value, what, limits)
    if hint is float:
        return number(value, what, limits)
    if origin in (Union, types.UnionType):
        return _union(value, inner, what, limits)
    if origin is tuple and Ellipsis not in inner:
        values = _items(value, what)
        if len(values) != len(inner):
            raise ValueError(f"{what} is {shown(value)}; expected {len(inner)} values.")
        pairs = enumerate(zip(values, inner, strict=True))
        return _unchanged(value, tuple(checked(v, h, f"{what}[{i}]", limits) for i, (v, h) in pairs))
    if origin in (list, tuple, Sequence):
        found = [checked(v, inner[0], f"{what}[{i}]", limits) for i, v in enumerate(_items(value, what))]
        return _unchanged(value, tuple(found) if origin is tuple else found)
    if origin in (dict, Mapping):
        given = mapping(value, what)
        return _unchanged(value, {k: checked(v, inner[1], f"{what}[{k!r}]", limits) for k, v in given.items()})
    kind = origin or hint
    if isinstance(kind, type) and not isinstance(value, kind):
        meant = {bool: "true or false", str: "text", type(None): "nothing"}.get(kind, f"a {kind.__name__}")
        raise ValueError(f"{what} is {shown(value)}; expected {meant}.")
    return value


def hints_of(function: Any) -> dict[str, Any]:
    """The annotations of a function's parameters, as far as they can be resolved."""
    try:
        return get_type_hints(function)
    except NameError:  # names that are known where the function was written alone
        return {}


def _union(value: Any, kinds: tuple[Any, ...], what: str, limits: Limits) -> Any:
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    for kind in kinds:
        try:
            return checked(value, kind, what, limits)
        except ValueError as error:
            if len(kinds) == 1:
                raise ValueError(str(error).removesuffix(".") + ", or none at all.") from error
    told = " or ".join(_kind(kind) for kind in kinds)
    raise ValueError(f"{what} is {shown(value)}; expected {told}{_told(limits)}.")


def _kind(hint: Any) -> str:
    plain = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}
    if hint in plain:
        return plain[hint]
    kind = get_origin(hint) or hint
    return {list: "a list", tuple: "a list", Sequence: "a list", dict: "a mapping", Mapping: "a mapping"}.get(
        kind, f"a {getattr(kind, '__name__', kind)}"
    )


def _items(value: Any, what: str) -> list[Any]:
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)) or getattr(value, "ndim", 1) == 0:
        raise ValueError(f"{what} is {shown(value)}; expected a list.")
    return list(value)


def _unchanged(value: Any, found: Any) -> Any:
    """The value itself where nothing in it had to be made plain."""
    if type(value) is type(found) and len(value) == len(found):
        old, new = (list(v.items()) if isinstance(v, dict) else list(v) for v in (value, found))
        if all(_same(a, b) for a, b in zip(old, new, strict=True)):
            return value
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b


def _within(value: Number, what: str, limits: Limits) -> Number:
    least, most = limits
    if (least is not None and value < least) or (most is not None and value > most):
        told = _told(limits).removeprefix(" from").removeprefix(" of").strip()
        raise ValueError(f"{what} is {shown(value)}; expected {told}.")
    return value


def _told(limits: Limits) -> str:
    least, most = limits
    if least is not None and most is not None:
        return f" from {least:g} to {most:g}"
    return f" of at least {least:g}" if least is not None else f" of at most {most:g}" if most is not None else ""


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
