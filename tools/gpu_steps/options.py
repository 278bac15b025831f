"""YAML files of options without the command line's parser, which not every machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from gpu_steps.work import ROOT

Kind = TypeVar("Kind")


def options(file: str, part: str) -> dict[str, Any]:
    """One option of a command, a mapping, out of a file below ``configs/``."""
    return yaml.safe_load(Path(ROOT / "configs" / file).read_text(encoding="utf-8"))[part]


def made(kind: type[Kind], values: Mapping[str, Any], **changes: Any) -> Kind:
    """A dataclass of options from a mapping as a YAML file holds it, with dataclasses inside as mappings.

    What such a mapping leaves out is as the field's own default has it, as the parser has it.

    Args:
        kind: of the options.
        values: by name.
        changes: put in their place.

    Raises:
        ValueError: an option that there is not.
    """
    return _made(kind, {**values, **changes}, None)


def _made(kind: type[Kind], values: Mapping[str, Any], base: Kind | None) -> Kind:
    hints = get_type_hints(kind)
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"{kind.__name__} has no option {unknown[0]!r}; its options: {', '.join(hints)}.")
    before = {f.name: _default(f) if base is None else getattr(base, f.name) for f in fields(kind)}  # type: ignore[arg-type]
    given = {name: _as(hints[name], value, before[name]) for name, value in values.items()}
    return kind(**given) if base is None else replace(base, **given)  # type: ignore[type-var]


def _default(own: Field) -> Any:
    if own.default_factory is not MISSING:
        return own.default_factory()
    return None if own.default is MISSING else own.default


def _as(hint: Any, value: Any, default: Any) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        return _made(hint, value, default if isinstance(default, hint) else None)  # type: ignore[arg-type]
    if get_origin(hint) is dict and is_dataclass(inner := get_args(hint)[1]) and isinstance(value, Mapping):
        return {name: _as(inner, part, None) for name, part in value.items()}
    return value
