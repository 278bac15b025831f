"""Hook the tree into the original LLaVA and its forks as a vision tower, with no edit of theirs.

A host builds its tower by ``build_vision_tower``, a function of its module ``model.multimodal_encoder.builder`` that
other modules import by name. :func:`install` imports that module and puts ours in the function's place, there and
wherever it has been imported by name already; whoever imports it later gets ours from the start. Names that are not a
tree's go on to the host's own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

Builder = Callable[..., Any]
PACKAGES = ("llava", "eagle", "cambrian")
FUNCTION = "build_vision_tower"
_LOG = logging.getLogger("llava_integration")
_hooks: dict[str, tuple[Builder, Builder]] = {}  # the host's own function and ours, by package


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


def find_hosts() -> list[str]:
    """Hosts whose package can be found and has a vision tower's builder; nothing of them is run."""
    return [package for package in PACKAGES if _builder_file(package) is not None]


def install() -> list[str]:
    """Let every host that is found take trees as ``--vision_tower``; returns their packages. Twice does no harm.

    Call it before a model is built. The log (``llava_integration``) is shown on stderr by the first process, unless the
    program has set up logging itself.

    Raises:
        ImportError: no host is found, or it cannot be imported.
    """
    packages = find_hosts()
    if not packages:
        raise ImportError(
            "No host is found: none of the packages llava, eagle and cambrian with model/multimodal_encoder/builder.py "
            "is on the path; install LLaVA in this environment, or start in its folder."
        )
    _show_log()
    for package in packages:
        _install(package)
    return packages


def uninstall() -> None:
    """Give every host its own builder back, wherever it was replaced."""
    for package, (original, ours) in _hooks.items():
        _replace(package, ours, original)
    _hooks.clear()


def hooked(package: str) -> list[str]:
    """Modules of a host that build towers by our function."""
    if package not in _hooks:
        return []
    return [name for name, module in _modules(package) if getattr(module, FUNCTION, None) is _hooks[package][1]]


def run_module(name: str, args: list[str]) -> None:
    """Hook the hosts, then run a module as ``python -m`` does.

    Args:
        name: dotted, such as ``llava.train.train``, or ``trl.scripts.sft``, which needs no host.
        args: its command line.

    Raises:
        SystemExit: there is no such module or no host, with a sentence.
    """
    from llava_integration.hosts.running import hook_for

    try:
        hook_for(name)
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"There is no module {name!r}: give one of the host's, such as llava.train.train.")
    except ImportError as error:
        sys.exit(f"ImportError: {error}")
    from vst.fit.processes import leave_group  # here: the hooks themselves are imported where little else can be

    sys.argv = [name, *args]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    leave_group()


def _builder_file(package: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        file = Path(folder) / "model" / "multimodal_encoder" / "builder.py"
        if file.is_file():
            return file
    return None


def _install(package: str) -> None:
    if package in _hooks:
        _replace(package, *_hooks[package])
        return
    module = f"{package}.model.multimodal_encoder.builder"
    try:
        original = getattr(importlib.import_module(module), FUNCTION)
    except Exception as error:  # whatever a host's import raises
        raise ImportError(
            f"The host {package!r} is found but {module} cannot be imported ({type(error).__name__}: {error}): "
            f"see that \"python -c 'import {package}'\" works in this environment."
        ) from error

    @wraps(original)
    def build_vision_tower(vision_tower_cfg: Any, **kwargs: Any) -> Any:
        name: Any = getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None))
        if not is_ours(name):
            return original(vision_tower_cfg, **kwargs)
        from llava_integration.hosts.tower import VSTVisionTower

        return VSTVisionTower(name, vision_tower_cfg, **kwargs)

    _hooks[package] = (original, build_vision_tower)
    _replace(package, original, build_vision_tower)


def _modules(package: str) -> list[tuple[str, ModuleType]]:
    names = [n for n in sys.modules if n == package or n.startswith(f"{package}.") or n == "__main__"]
    return [(n, sys.modules[n]) for n in names if sys.modules[n] is not None]


def _replace(package: str, old: Builder, new: Builder) -> None:
    for _, module in _modules(package):
        if getattr(module, FUNCTION, None) is old:
            setattr(module, FUNCTION, new)


def _show_log() -> None:
    if logging.getLogger().handlers or _LOG.handlers or os.environ.get("RANK", "0") != "0":
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[vst] %(message)s"))
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
