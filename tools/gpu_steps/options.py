"""YAML files of options without the command line's parser, which not every machine has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
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

    Args:
        kind: of the options.
        values: by name.
        changes: put in their place.

    Raises:
        ValueError: an option that there is not.
    """
    hints = get_type_hints(kind)
    if unknown := sorted({**values, **changes}.keys() - hints.keys()):
        raise ValueError(f"{kind.__name__} has no option {unknown[0]!r}; its options: {', '.join(hints)}.")
    return kind(**{name: _as(hints[name], value) for name, value in {**values, **changes}.items()})


def _as(hint: Any, value: Any) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        return made(hint, value)  # type: ignore[arg-type]
    if get_origin(hint) is dict and is_dataclass(inner := get_args(hint)[1]) and isinstance(value, Mapping):
        return {name: _as(inner, part) for name, part in value.items()}
    return value
