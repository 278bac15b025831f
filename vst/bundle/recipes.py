"""Folders that recipes make (``vst.demo.assets``), each in its smaller exact form: made, or as its archives."""

from __future__ import annotations

import importlib
from pathlib import Path

from vst.bundle.contents import Contents, member
from vst.bundle.manifest import Asset
from vst.bundle.parts import told
from vst.bundle.sets import SETS
from vst.demo.assets import Recipe, fetch_archives, home, made_from, make_ready, sound
from vst.demo.unchanged import contents


def recipes_of(kind: str) -> dict[str, Recipe]:
    """Recipes of a set by their folder.

    Raises:
        ImportError: a module of it, or a package that this needs, is not installed.
    """
    found: dict[str, Recipe] = {}
    for name in SETS[kind].modules:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"{kind} needs {name}, which cannot be imported here ({error}): "
                f'pip install "vfm-stitch-tree[{SETS[kind].install}]".'
            ) from error
        found |= {recipe.folder: recipe for recipe in module.recipes()}
    return found


def form_of(recipe: Recipe, root: Path, made: bool) -> tuple[str, int]:
    """The form that a folder is taken in, ``made`` or ``archives``, and its bytes; a tie is taken made.

    Args:
        recipe: of the folder.
        root: of the assets.
        made: take it made in any case.
    """
    packed = sum(package.size for package in recipe.packages)
    there = contents(root / recipe.folder)["bytes"] or recipe.bytes
    if made or (there is not None and there <= packed):
        return "made", there or 0
    return "archives", packed


def add_recipes(into: Contents, kind: str, made: bool, dry: bool) -> None:
    """Add a set's folders.

    Args:
        into: what they are added to; a folder that is there already is not added again.
        kind: the set's name.
        made: take every folder as it was made.
        dry: tell what would be taken, and fetch, make and check nothing.

    Raises:
        ImportError: a package is missing here.
        RuntimeError: what is not here cannot be fetched or made.
    """
    root, known = home(), {asset.folder for asset in into.assets}
    into.require(SETS[kind].requirements)
    for recipe in recipes_of(kind).values():
        if recipe.folder in known:
            continue
        form, size = form_of(recipe, root, made)
        if not dry:
            form = _take(into, recipe, root, form)
            size = sum(m.size for m in into.members if _of(m.path, recipe))
        needs = recipe.needs if form == "archives" else ()
        into.require(needs)
        bytes_made = contents(root / recipe.folder)["bytes"] or recipe.bytes or 0
        names = tuple(package.filename for package in recipe.packages)
        into.assets.append(Asset(recipe.folder, kind, form, made_from(recipe), bytes_made, needs, names))
        words = "the folder as it was made" if form == "made" else f"{len(names)} archive(s) that it is made from"
        into.rows.append((recipe.folder, words, size, "home"))


def _take(into: Contents, recipe: Recipe, root: Path, form: str) -> str:
    """Add a folder's files in a form, or in the other one where the archives cannot be had; the form."""
    if form == "archives":
        before = list((root / "archives").glob("*"))
        try:
            archives = fetch_archives(recipe)
        except RuntimeError as error:
            if not sound(recipe, root):
                raise
            into.notes.append(
                f"{recipe.folder} is taken as it was made ({told(contents(root / recipe.folder)['bytes'])}), since its "
                f"archives ({told(sum(p.size for p in recipe.packages))}) cannot be fetched: "
                f"{' '.join(str(error).split())[:200]}"
            )
        else:
            into.members += [
                member(f"home/archives/{package.filename}", path, package.sha256)
                for package, path in zip(recipe.packages, archives, strict=True)
            ]
            if sound(recipe, root):  # else they are what it will be made from here
                into.fetched += [path for path in archives if path not in before]
            return "archives"
    (folder,) = make_ready([recipe])
    if not sound(recipe, root):  # looks alone may have been compared
        raise RuntimeError(f"{folder} is not what was made any more: delete it and call again, which makes it anew.")
    into.add_folder("home", recipe.folder, [p for p in sorted(folder.rglob("*")) if p.is_file()], folder)
    return "made"


def _of(path: str, recipe: Recipe) -> bool:
    archives = [f"home/archives/{package.filename}" for package in recipe.packages]
    return path in archives or path.startswith(f"home/{recipe.folder}/")
