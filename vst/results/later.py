"""Fields that a config was given after folders had been written with it: such folders stand for their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any

_LATER = "later"


def later(default: Any) -> Any:
    """A dataclass' field with this default (or, of a class, an instance of it), which earlier versions did not have."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={_LATER: True})
    return field(default=default, metadata={_LATER: True})


def later_defaults(config: Any, prefix: str = "") -> dict[str, Any]:
    """What such fields of a config, and of the configs in it, stood for before there were any, by dotted key."""
    if isinstance(config, Mapping):
        parts: list[tuple[str, Any, Field | None]] = [(str(name), value, None) for name, value in config.items()]
    elif is_dataclass(config):
        parts = [(f.name, getattr(config, f.name), f) for f in fields(config)]
    else:
        return {}
    out: dict[str, Any] = {}
    for name, value, own in parts:
        if own is not None and own.metadata.get(_LATER):
            out |= _flat(_default(own), f"{prefix}{name}")
        else:
            out |= later_defaults(value, f"{prefix}{name}.")
    return out


def _default(own: Field) -> Any:
    return own.default if own.default_factory is MISSING else own.default_factory()


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not is_dataclass(value):
        return {name: value}
    return {k: v for f in fields(value) for k, v in _flat(getattr(value, f.name), f"{name}.{f.name}").items()}
