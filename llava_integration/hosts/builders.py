"""The functions by which hosts build towers, and what stands in their place: trees are ours, all else goes on.

A host's own function is known by its name alone. Whatever arguments it takes, in whatever order, it is given again.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

LOG = logging.getLogger("llava_integration")
Builder = Callable[..., Any]


def is_ours(name: Any) -> bool:
    """Whether a vision tower's name is a tree's: ``vst:...``, or a folder whose config says so."""
    if not isinstance(name, str) or not name:
        return False
    if name.startswith("vst:"):
        return True
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "vst"


def one_tower(original: Builder) -> Builder:
    """Our ``build_vision_tower``, around the host's own: its config says the tower's name, or is the name."""

    @wraps(original)
    def build_vision_tower(*given: Any, **kwargs: Any) -> Any:
        config, options = _arguments(original, given, kwargs)
        name = config if isinstance(config, str) else _get(config, "mm_vision_tower", "vision_tower")
        if not is_ours(name):
            return original(*given, **kwargs)
        from llava_integration.hosts.resampled import ResampledTower, parse_count
        from llava_integration.hosts.tower import VSTVisionTower

        args = None if isinstance(config, str) else config
        source, count = parse_count(name)
        if count is not None:
            return ResampledTower(source, count, args, **_for_a_tree(name, options))
        return VSTVisionTower(name, args, **_for_a_tree(name, options))

    return build_vision_tower


def list_of_towers(original: Builder) -> Builder:
    """Our ``build_vision_tower_aux_list``, around the host's own: names and token counts, of which some are trees'."""
    keys = ("mm_vision_tower_aux_list", "vision_tower_aux_list")
    counts = ("mm_vision_tower_aux_token_len_list", "vision_tower_aux_token_len_list")

    @wraps(original)
    def build_vision_tower_aux_list(*given: Any, **kwargs: Any) -> Any:
        from llava_integration.hosts.resampled import ResampledTower, parse_count

        config, options = _arguments(original, given, kwargs)
        names, sizes = _get(config, *keys), _get(config, *counts)
        listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        ours = [is_ours(parse_count(name)[0]) for name in names] if listed else []
        if not any(ours):
            return original(*given, **kwargs)
        if sizes is None or len(names) != len(sizes):
            raise ValueError(
                f"vision_tower_aux_list has {len(names)} towers and vision_tower_aux_token_len_list is {sizes!r}; "
                "expected a number of tokens for each tower."
            )
        towers: list[Any] = []
        for name, size, tree in zip(names, sizes, ours, strict=True):
            if tree:
                source = parse_count(name)[0]
                towers.append(ResampledTower(source, int(size), config, **_for_a_tree(source, options)))
                continue
            alone = copy.copy(config)  # the host's own function, for this tower of its list
            for key, value in [(key, [name]) for key in keys] + [(key, [size]) for key in counts]:
                if hasattr(alone, key):
                    setattr(alone, key, value)
            towers += original(
                *(alone if a is config else a for a in given),
                **{key: alone if a is config else a for key, a in kwargs.items()},
            )
        return towers

    return build_vision_tower_aux_list


FUNCTIONS: dict[str, Callable[[Builder], Builder]] = {
    "build_vision_tower": one_tower,
    "build_vision_tower_aux_list": list_of_towers,
}


def _arguments(original: Builder, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What a host's function takes first, and all else by name; None and nothing where the call does not fit it."""
    try:
        bound = inspect.signature(original).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None, {}
    values = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            values |= values.pop(parameter.name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL:
            more = values.pop(parameter.name, ())
            values |= {f"argument {i + 1}": value for i, value in enumerate(more)}
    first = next(iter(values), None)
    return (None, {}) if first is None else (values.pop(first), values)


def _get(config: Any, *keys: str) -> Any:
    """The first of several attributes (or keys) that is there, as LLaVA looks for it; None where there is none."""
    for key in keys:
        if isinstance(config, Mapping):
            if key in config:
                return config[key]
        elif hasattr(config, key):
            return getattr(config, key)
    return None


def _for_a_tree(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``delay_load`` of a call; all else is said to have no effect."""
    if rest := sorted(set(options) - {"delay_load"}):
        LOG.warning("%s is a tree: what the host says of its towers by %s has no effect", name, ", ".join(rest))
    return {"delay_load": bool(options.get("delay_load", False))}
