"""``python -m llava_integration doctor``: what is installed, whether a host is hooked, whether a tree loads."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from typing import Any

from llava_integration import hosts
from llava_integration.hosts.hooks import FURTHER, no_users
from llava_integration.hosts.options import GRID_SIDES, grid_sides
from llava_integration.hosts.versions import auto_classes_served, installed

DISTRIBUTION = "vfm-stitch-tree"
PARTS = {
    "": "the library, and the tower of LLaVA",
    "hosts": "LLaVA itself, as tested",
    "llava": "Auto classes, training, answering",
    "fit": "fitting stitches",
    "eval": "probes and plots",
    "hub": "open_clip and data sets as sources",
    "deepspeed": "DeepSpeed",
    "lmms": "benchmarks",
}


def doctor(tree: str | None = None) -> None:
    """Print versions, hosts and (with a tree) what it is and whether it loads; fails with a sentence on what to do.

    A host that is hooked but would not build a tree, and the lock of a build that was ended, count as wrong too. The
    environment variable VST_HOSTS names further packages to look at.

    Examples:
        python -m llava_integration doctor
        python -m llava_integration doctor --tree vst:runs/demo/tree@10

    Args:
        tree: a saved tree as --vision_tower takes it: vst:PATH, vst:PATH@SPLIT, or a folder.

    Raises:
        RuntimeError: something is wrong; the first thing to do is said.
    """
    problems = [*_packages(), *_library()]
    if not problems:
        problems += [*_hosts(), *_builds()]
    if tree is not None and not problems:
        problems += _tree(tree)
    if problems:
        raise RuntimeError(problems[0])
    print("All is well.")


def main(words: list[str]) -> None:
    """The command with nothing but the standard library to parse it."""
    summary, _, rest = (doctor.__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="python -m llava_integration doctor", description=summary)
    parser.add_argument("--tree", help=rest.partition("tree:")[2].strip().split("\n")[0])
    try:
        doctor(parser.parse_args(words).tree)
    except RuntimeError as error:
        sys.exit(f"Something is wrong: {error}")


def _packages() -> list[str]:
    """A table of what each part asks for; problems are those of the library alone, the other parts are optional."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        return [f'{DISTRIBUTION} is not installed: run "pip install ." (or pip install -e .) in its folder.']
    rows, problems = [], []
    for extra, part in PARTS.items():
        for need in wanted:
            marker = need.marker
            applies = marker.evaluate({"extra": extra}) if marker else not extra
            if not applies or (extra and marker and marker.evaluate({"extra": ""})) or need.name == DISTRIBUTION:
                continue
            here = installed(need.name)
            good = here is not None and need.specifier.contains(here, prereleases=True)
            state = "ok" if good else "missing" if here is None else "other version"
            rows.append([part, need.name, str(need.specifier) or "any", here or "-", state])
            if not extra and not good:
                problems.append(
                    f"{need.name} is {'missing' if here is None else here}, the library needs {need.name}"
                    f"{need.specifier}: pip install '{need.name}{need.specifier}'."
                )
    rows.append(["all", "python", ">=3.10", platform.python_version(), "ok"])
    if not any("rich" in problem for problem in problems):
        from vst.results.tables import table

        table(f"Packages ({DISTRIBUTION} {installed(DISTRIBUTION)})", ["part", "package", "asked", "here", ""], rows)
    return problems


def _library() -> list[str]:
    """Import what a tree is made of."""
    try:
        importlib.import_module("vst.tree.encoder")
    except Exception as error:  # whatever a broken installation raises
        return [
            f"The library cannot be imported ({type(error).__name__}: {error}): reinstall torch and torchvision "
            "as a pair."
        ]
    return []


def _hosts() -> list[str]:
    """Find the hosts and hook them, for as long as that takes."""
    from vst.results.tables import table

    transformers = installed("transformers")
    rows: list[list[Any]] = []
    if auto_classes_served():
        rows.append(["transformers' LLaVA", transformers, "served by import llava_integration"])
    elif transformers is not None:
        rows.append(["transformers' LLaVA", transformers, "not served: needs transformers 5.0 or later"])
    problems: list[str] = []
    found: list[str] = []
    try:
        found = hosts.find_hosts()
        if found or os.environ.get(FURTHER):
            hosts.install()
            for package in found:
                owners = packages_distributions().get(package, [])
                version = ", ".join(f"{owner} {installed(owner)}" for owner in owners) or "a folder on the path"
                if used := hosts.users(package):
                    rows.append([package, version, f"hooked: {', '.join(hosts.hooked(package))}; used in {used[0]}"])
                else:
                    rows.append([package, version, "hooked, but nothing in it builds towers so: not served"])
                    problems.append(no_users(package))
    except (ImportError, ValueError) as error:
        problems.append(str(error))
        rows += [[package, "found", "cannot be hooked"] for package in found]
    finally:
        hosts.uninstall()
    if not found and not problems and not auto_classes_served():
        problems.append(
            "there is nothing here that could use a tree: install the original LLaVA (package llava) beside "
            "transformers 4.37, or transformers 5.0 or later."
        )
    table("Hosts", ["host", "version", ""], rows or [["none", "-", "-"]])
    return problems


def _builds() -> list[str]:
    """Locks of operators of DeepSpeed whose build was killed: every later run would wait for them."""
    from vst.fit.op_builds import stale_locks

    return [
        f"{lock} is left of a build of the operator {lock.parent.name} (DeepSpeed's or another) that no process of "
        "this machine is at, and runs wait for it: delete it, unless another machine is building in that folder."
        for lock in stale_locks()
    ]


def _tree(name: str) -> list[str]:
    """Load a tree as a tower and look through it once at every split."""
    import torch

    from llava_integration.hosts.options import parse_name
    from llava_integration.hosts.tower import VSTVisionTower
    from vst.measure.inspect import inspect_tree
    from vst.tree.folder import read_config

    try:
        source, split = parse_name(name)
        config = read_config(source)[1]
        inspect_tree(config if split is None else config.at(split), torch.float16)
        tower = VSTVisionTower(name)
        side = tower.image_size
        for choice in tower.tree_config.choices().values() or [None]:
            tokens = tower.vision_tower(torch.zeros(1, 3, side, side), split=choice)
            if not torch.isfinite(tokens).all():
                return [f"The tree {name} gives numbers that are not finite at split {choice}: save or fetch it again."]
    except (ValueError, OSError, RuntimeError) as error:
        return [f"The tree {name} does not load ({error})."]
    memory = sum(t.numel() for t in tower.vision_tower.state_dict().values()) * 2 / 1e6
    size = f"{tower.num_patches} tokens of width {tower.hidden_size}"
    print(f"The tree loads and runs: {size}, {memory:.0f} MB in float16.")
    if side not in GRID_SIDES:
        print(f"In LLaVA-NeXT: {grid_sides(side)}")
    return []
