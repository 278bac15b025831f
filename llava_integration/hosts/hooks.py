"""Hook the tree into the original LLaVA and its forks as a vision tower, with no edit of theirs.

A host builds its tower by a function of its module ``model.multimodal_encoder.builder`` (:mod:`.builders` lists them)
that other modules import by name. :func:`install` imports that module and puts ours in the function's place, there and
wherever it has been imported by name already; whoever imports it later gets ours from the start. Names that are not a
tree's go on to the host's own.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import os
import re
import runpy
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType

from llava_integration.hosts.builders import FUNCTIONS, LOG, Builder, is_ours

__all__ = ["find_hosts", "hooked", "install", "is_ours", "run_module", "uninstall", "users"]
PACKAGES = ("llava", "eagle", "cambrian")
FURTHER = "VST_HOSTS"
_hooks: dict[str, dict[str, tuple[Builder, Builder]]] = {}  # the host's own function and ours, by package and name


def find_hosts(packages: Iterable[str] = ()) -> list[str]:
    """Hosts whose package can be found and has a vision tower's builder; nothing of them is run.

    Args:
        packages: further ones to look for, beside those that the environment variable VST_HOSTS names.
    """
    return [package for package in known_hosts(packages) if _builder_file(package) is not None]


def users(package: str) -> list[str]:
    """Files of a host, relative to its package, that build towers by its functions; nothing is run."""
    builder = _builder_file(package)
    if builder is None:
        return []
    names, root = _words(builder), builder.parents[2]
    return sorted(str(file.relative_to(root)) for file in root.rglob("*.py") if _uses(file, names))


def install(packages: Iterable[str] = ()) -> list[str]:
    """Let every host that is found take trees as ``--vision_tower``; returns their packages. Twice does no harm.

    Call it before a model is built. The log (``llava_integration``) is shown on stderr by the first process, unless the
    program has set up logging itself.

    Args:
        packages: further ones than llava, eagle and cambrian whose towers are built as LLaVA's are, by
            ``build_vision_tower`` of their ``model/multimodal_encoder/builder.py`` (``mgm`` is one). The environment
            variable VST_HOSTS names such packages too, with commas between them.

    Raises:
        ImportError: no host is found, one that was named is not, or it cannot be imported.
        ValueError: a name that is none of a package.
    """
    asked = _named(packages)
    found = find_hosts(asked)
    lacking = [package for package in asked if package not in found]
    if lacking or not found:
        what = f"The package {lacking[0]!r} was named as a host" if lacking else "No host is found"
        raise ImportError(
            f"{what}: none of the packages {', '.join(lacking or known_hosts())} with "
            "model/multimodal_encoder/builder.py is on the path; install it here, or start in its folder."
        )
    _show_log()
    for package in found:
        _install(package)
        if not users(package):
            LOG.warning("%s", no_users(package))
    return found


def no_users(package: str) -> str:
    """Why a host that is hooked will not see a tree."""
    return (
        f"nothing in the package {package!r} uses {' or '.join(FUNCTIONS)}, so it will not build a tree: it is not "
        "served as it is; build llava_integration.hosts.tower.VSTVisionTower where its towers are built."
    )


def uninstall() -> None:
    """Give every host its own builder back, wherever it was replaced."""
    for functions in _hooks.values():
        for original, ours in functions.values():
            _replace(ours, original)
    _hooks.clear()


def hooked(package: str) -> list[str]:
    """Modules that build towers of a host by our functions."""
    ours = [ours for _, ours in _hooks.get(package, {}).values()]
    return [name for name, module in _modules() if any(value is f for value in vars(module).values() for f in ours)]


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


def _named(packages: Iterable[str]) -> list[str]:
    """Packages that were named, by whom ever, each once."""
    if isinstance(packages, str):
        packages = packages.split(",")
    words = [*packages, *os.environ.get(FURTHER, "").split(",")]
    names = [word.strip() for word in words if word.strip()]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"{name!r} is no package's name: name it as Python imports it, such as mgm.")
    return list(dict.fromkeys(names))


def known_hosts(packages: Iterable[str] = ()) -> list[str]:
    """Packages that are looked for: ours, those given, and those that VST_HOSTS names."""
    return list(dict.fromkeys([*PACKAGES, *_named(packages)]))


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


def _words(file: Path) -> set[str]:
    """The functions whose names stand in a file."""
    try:
        return set(FUNCTIONS) & set(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _uses(file: Path, names: set[str]) -> bool:
    """Whether a file imports one of the functions to use it there, or calls one."""
    if not (names := names & _words(file)):
        return False
    try:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    except (ValueError, SyntaxError):
        return False
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    called = {getattr(n.func, "id", getattr(n.func, "attr", None)) for n in nodes if isinstance(n, ast.Call)}
    return bool(names & (called | (imported if file.name != "__init__.py" else set())))


def _install(package: str) -> None:
    for original, ours in _hooks.get(package, {}).values():
        _replace(original, ours)
    if package in _hooks:
        return
    module = f"{package}.model.multimodal_encoder.builder"
    try:
        builder = importlib.import_module(module)
    except Exception as error:  # whatever a host's import raises
        raise ImportError(
            f"The host {package!r} is found but {module} cannot be imported ({type(error).__name__}: {error}): "
            f"see that \"python -c 'import {package}'\" works in this environment."
        ) from error
    found = {name: getattr(builder, name) for name in FUNCTIONS if callable(getattr(builder, name, None))}
    if not found:
        raise ImportError(
            f"The host {package!r} is found but {module} has no {' and no '.join(FUNCTIONS)}: it does not build towers "
            "as LLaVA does, and cannot be hooked."
        )
    _hooks[package] = {name: (original, FUNCTIONS[name](original)) for name, original in found.items()}
    for original, ours in _hooks[package].values():
        _replace(original, ours)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    """All that is imported, whatever package it is of."""
    return ((name, module) for name, module in list(sys.modules.items()) if isinstance(module, ModuleType))


def _replace(old: Builder, new: Builder) -> None:
    """Put one function in another one's place wherever it was imported, under whatever name."""
    for _, module in _modules():
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _show_log() -> None:
    if logging.getLogger().handlers or LOG.handlers or os.environ.get("RANK", "0") != "0":
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[vst] %(message)s"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
