"""Put a bundle in place, make what comes as archives, and tell what is where, what is missing and what to type next."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from vst.bundle.manifest import Asset, Manifest
from vst.bundle.parts import told
from vst.bundle.placing import Placed, is_made, put_in_place
from vst.bundle.sets import SETS
from vst.results.stopping import ending

GOES_ON = "The same call goes on from what was put in place."


def unbundle_folder(
    folder: str | os.PathLike,
    home: str | None = None,
    trees: str | None = None,
    hub: str | None = None,
    wheels: str | None = None,
    overwrite: bool = False,
    show: bool = True,
) -> Placed:
    """Put a bundle in place and tell what came of it.

    Args:
        folder: the bundle's, with its parts and manifest.
        home: of the assets; default: ``$VST_HOME``, else ``$XDG_CACHE_HOME/vst``, else ``~/.cache/vst``.
        trees: of saved trees and models in folders; default: ``trees`` in ``home``.
        hub: the Hugging Face hub's cache; default: where huggingface_hub looks.
        wheels: of wheels; default: ``wheels`` in ``home``.
        overwrite: replace what differs from the bundle.
        show: show progress.

    Raises:
        FileNotFoundError, ValueError, FileExistsError, OSError: as for :func:`vst.bundle.placing.put_in_place`.
        ImportError: a package that an asset is made with is missing; all else is in place.
    """
    top = Path(home).expanduser() if home else default_home()
    roots = {
        "home": top,
        "trees": Path(trees).expanduser() if trees else top / "trees",
        "hub": Path(hub).expanduser() if hub else default_hub(),
        "wheels": Path(wheels).expanduser() if wheels else top / "wheels",
    }
    roots = {place: root.absolute() for place, root in roots.items()}
    placed = put_in_place(Path(folder), roots, overwrite=overwrite, show=show)
    for words, units in (("in place", placed.new), ("there already", placed.there)):
        for unit in (unit for unit in units if unit.target.exists()):  # archives go once they are used
            size = sum(member.size for member in unit.members.values())
            print(f"{words}: {unit.target} ({told(size)})")
    for asset in placed.manifest.assets:
        if asset.form == "archives" and is_made(asset, roots["home"]):
            print(f"made already: {roots['home'] / asset.folder} ({told(asset.bytes)})")
    left, lacking = _make(placed.manifest.assets, roots["home"])
    _tell_next(placed.manifest, roots, left, lacking)
    if left:
        raise ImportError(
            f"{', '.join(asset.folder for asset in left)} came as archives and cannot be made here without "
            f"{', '.join(lacking)}: install what is missing and give the same call again."
        )
    return placed


def default_home() -> Path:
    """Where the assets live, as :func:`vst.demo.assets.home` says, which may lack packages here."""
    if given := os.environ.get("VST_HOME"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "vst"


def default_hub() -> Path:
    """Where huggingface_hub keeps what it fetched."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(name):
            return Path(given).expanduser()
    if given := os.environ.get("HF_HOME"):
        return Path(given).expanduser() / "hub"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "huggingface" / "hub"


def _make(assets: Sequence[Asset], home: Path) -> tuple[list[Asset], list[str]]:
    """Make what came as archives; those that cannot be made here, and the requirements that this takes."""
    left, lacking = [], []
    for asset in (a for a in assets if a.form == "archives" and not is_made(a, home)):
        try:
            if missing := missing_of(asset.needs):
                raise ImportError(missing[0])
            from vst.bundle.recipes import recipes_of
            from vst.demo.assets import made_from, make_ready

            recipe = recipes_of(asset.kind).get(asset.folder)
        except ImportError as error:
            left.append(asset)
            lacking += missing_of(asset.needs) or [error.name or str(error)]
            continue
        if recipe is None or made_from(recipe) != asset.made_from:
            raise ValueError(
                f"{asset.folder} is made in another way by the vst of this machine than by the one that wrote the "
                "bundle: bring the same version of vst to both, or bundle with --made."
            )
        with _home_is(home):
            make_ready([recipe])
        print(f"made: {home / asset.folder}")
    return left, list(dict.fromkeys(lacking))


@contextmanager
def _home_is(home: Path) -> Iterator[None]:
    before = os.environ.get("VST_HOME")
    os.environ["VST_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["VST_HOME"]
        else:
            os.environ["VST_HOME"] = before


def missing_of(requirements: Sequence[str]) -> list[str]:
    """Those of requirements that this Python does not meet: a package or one of an extra is missing, or too old."""
    return [requirement for requirement in requirements if not _met(requirement)]


def _met(requirement: str) -> bool:
    found = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\d.]+))?", requirement)
    if found is None:
        return False
    name, extras, least = found[1], (found[2] or "").split(","), found[3] or "0"
    try:
        there = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    if _version(there.version) < _version(least):
        return False
    for line in there.requires or ():
        wanted, _, marker = line.partition(";")
        if re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker) and any(
            extra and re.search(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]", marker) for extra in extras
        ):
            other = re.match(r"[\w.-]+", wanted.strip())
            if "python_version" not in marker and other and not _met(other[0]):
                return False
    return True


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of a version, without zeros at its end."""
    numbers = [int(n) for n in re.match(r"\d*(?:\.\d+)*", text)[0].split(".") if n]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _tell_next(manifest: Manifest, roots: Mapping[str, Path], left: Sequence[Asset], lacking: Sequence[str]) -> None:
    """Print what is missing in this Python, and the lines to type next."""
    missing = list(dict.fromkeys([*missing_of(manifest.requirements), *lacking]))
    held = {_plain(path.name.split("-")[0]) for path in roots["wheels"].glob("*.whl")}
    brought = [r for r in missing if _plain(re.split(r"[\[>=<!~ ]", r)[0]) in held]
    if absent := [r for r in missing if r not in brought]:
        print(f"missing in this Python, and not among the wheels: {', '.join(absent)} (bundle them with --wheels)")
    lines = []
    if roots["home"] != default_home().absolute():
        lines.append(f"export VST_HOME={quote(str(roots['home']))}")
    if any("{trees}" not in source for source in manifest.sources):
        if roots["hub"] != default_hub().absolute():
            lines.append(f"export HF_HUB_CACHE={quote(str(roots['hub']))}")
        lines.append("export HF_HUB_OFFLINE=1")
    if brought:
        names = " ".join(quote(r) for r in brought)
        pip = f"{quote(sys.executable)} -m pip install --no-index"
        lines.append(f"{pip} --find-links {quote(str(roots['wheels']))} {names}")
    if not left:
        lines += [f"vst inspect {quote(str(roots['trees'] / tree.partition('/')[2]))}" for tree in manifest.trees]
        lines += [known.command for kind, known in SETS.items() if kind in manifest.asked]
    if lines:
        print("next:")
        for line in lines:
            print(f"  {line}")
    for source in manifest.sources:
        print(f"model source: {source.replace('{trees}', str(roots['trees']))}")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def options() -> argparse.ArgumentParser:
    """The options of :func:`main`, which are those of ``vst unbundle``."""
    parser = argparse.ArgumentParser(
        prog="python -m vst.bundle",
        description="Put a bundle that vst bundle wrote in place, check it, and say what is missing; as vst unbundle, "
        "and without the packages that the command line needs.",
        epilog="Example: python -m vst.bundle /media/stick/bundle --home /data/vst",
        allow_abbrev=False,
    )
    parser.add_argument("path", help="folder of the bundle: its parts and manifest.json")
    parser.add_argument("--home", help="folder of the assets; default: $VST_HOME, else ~/.cache/vst")
    parser.add_argument("--trees", help="folder of saved trees and models in folders; default: trees in home")
    parser.add_argument("--hub", help="the Hugging Face hub's cache; default: where huggingface_hub looks")
    parser.add_argument("--wheels", help="folder of wheels; default: wheels in home")
    parser.add_argument(
        "--overwrite",
        nargs="?",
        const="true",
        default="false",
        choices=("true", "false"),
        help="replace what differs from the bundle",
    )
    return parser


def main(words: list[str] | None = None) -> None:
    """``vst unbundle`` without the packages of the command line."""
    given = vars(options().parse_args(words))
    with ending() as advise:
        advise(GOES_ON)
        try:
            unbundle_folder(given.pop("path"), **{**given, "overwrite": given["overwrite"] == "true"})
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            if os.environ.get("VST_DEBUG"):
                raise
            sys.exit(f"{type(error).__name__}: {error}")
