"""Saved trees, models on them, and model sources: folders, and files of the Hugging Face hub's cache."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

from vst.bundle.contents import Contents, files_in, member
from vst.bundle.sets import LANGUAGE, LIBRARY, OPEN_CLIP
from vst.models.checkpoints.names import resolve
from vst.models.checkpoints.preparation import PROCESSOR_FILES
from vst.tree.folder import CONFIG, STITCHES, WEIGHTS, check_seal, check_weights, read_config

_HF = ("config.json", *PROCESSOR_FILES, "README.md")
_HF_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def add_tree(into: Contents, folder: Path, dry: bool) -> None:
    """Add a saved tree, or a language model on one; of stitches alone the models that they stand on, too.

    Raises:
        FileNotFoundError, ValueError: the folder is none, is damaged, or stands on folders of this machine.
    """
    _, config = read_config(folder, inside=True)
    check_weights(folder)
    whole, stitches = (folder / WEIGHTS).is_file(), (folder / STITCHES).is_file()
    tree = read_is_tree(folder)
    if whole and tree and not dry:
        check_seal(folder)
    into.require(LIBRARY if tree else (*LIBRARY, *LANGUAGE))
    name = _free_name(into, folder)
    size = into.add_folder("trees", name, files_in(folder), folder)
    into.trees.append(f"trees/{name}")
    into.rows.append((str(folder), "saved tree" if tree else "language model on a tree", size, "trees"))
    if tree and stitches and not whole:
        for source in dict.fromkeys([config.trunk.source, *(b.spec.source for b in config.branches)]):
            if Path(resolve(source)[1].split("@")[-1]).expanduser().exists():
                raise ValueError(
                    f"{folder} holds stitches alone, and they stand on {source}, a place of this machine: save the "
                    "whole tree (save_pretrained) and bundle that."
                )
            add_source(into, source, dry)


def read_is_tree(folder: Path) -> bool:
    """Whether a folder holds a tree alone, not a language model on one."""
    try:
        read_config(folder)
    except ValueError:
        return False
    return True


def add_source(into: Contents, source: str, dry: bool) -> None:
    """Add a model by its source.

    Raises:
        ValueError: no source, or one that cannot be carried.
        RuntimeError: its files are neither in the hub's cache nor to be had.
    """
    if source in into.sources:
        return
    scheme, name = resolve(source)
    into.require((*LIBRARY, *OPEN_CLIP) if scheme == "open_clip" else LIBRARY)
    if scheme == "hf" and (folder := Path(name).expanduser()).is_dir():
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} has no {CONFIG}; expected a folder as save_pretrained writes it.")
        check_weights(folder)
        here = _free_name(into, folder)
        size = into.add_folder("trees", here, files_in(folder), folder)
        into.sources.append(f"hf:{{trees}}/{here}")
        into.rows.append((source, "folder of a model", size, "trees"))
        return
    repository, patterns = hub_files(source)
    snapshot = _snapshot(source, repository, patterns, dry)
    into.sources.append(source)
    if snapshot is None:
        into.rows.append((source, f"{repository} of the hub, not here yet", None, "hub"))
        return
    files = [p for p in sorted(snapshot.iterdir()) if p.is_file() and any(fnmatch(p.name, one) for one in patterns)]
    if not any(path.suffix == ".safetensors" for path in files):
        raise ValueError(
            f"{source}: {repository} has no safetensors among {', '.join(p.name for p in files) or 'its files'}; "
            "pickled weights are not loaded, so a checkpoint that has only those has to be converted."
        )
    top = f"hub/{snapshot.parents[1].name}"
    new = [member(f"{top}/snapshots/{snapshot.name}/{path.name}", path, _name_of_blob(path)) for path in files]
    if (main := snapshot.parents[1] / "refs" / "main").is_file():
        new.append(member(f"{top}/refs/main", main))
    held = {m.path for m in into.members}
    into.members += (new := [m for m in new if m.path not in held])
    into.rows.append((source, f"{repository} of the hub", sum(m.size for m in new), "hub"))


def hub_files(source: str) -> tuple[str, tuple[str, ...]]:
    """Repository on the hub and patterns of the files that a source is read from.

    Raises:
        ValueError: its files are not on the hub.
    """
    scheme, name = resolve(source)
    found, file = "", ""
    if scheme == "hf":
        return name, (*_HF, *_HF_WEIGHTS)
    if scheme == "timm" and "@" not in name:
        from vst.models.checkpoints.timm_hub import built

        settings = getattr(built(name), "pretrained_cfg", None) or {}
        found, file = settings.get("hf_hub_id") or "", settings.get("hf_hub_filename") or "model.safetensors"
    elif scheme == "open_clip":
        from vst.models.checkpoints.openclip import tag_config

        path = str(tag_config(name).get("hf_hub") or "")
        found, _, file = path.rpartition("/") if path.count("/") > 1 else (path, "", "")
        file = re.sub(r"\.(bin|pt)$", ".safetensors", file) or "open_clip_model.safetensors"
    if not found:
        raise ValueError(
            f"{source} is not read from the Hugging Face hub, so there is nothing in its cache to take: bring the "
            "model as a folder, hf:FOLDER."
        )
    return found, ("config.json", "open_clip_config.json", file)


def _snapshot(source: str, repository: str, patterns: tuple[str, ...], dry: bool) -> Path | None:
    """Folder of a repository in the hub's cache, fetched if need be; in a dry look None where it is not there."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), local_files_only=dry))
    except Exception as error:  # offline, no such repository, gated, ...: the hub has many classes for it
        if dry:
            return None
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise RuntimeError(
            f"{source} is not in the Hugging Face cache and could not be fetched ({type(error).__name__}: {first}): "
            "check the id, or load it once where there is a network."
        ) from error


def _name_of_blob(path: Path) -> str | None:
    """SHA-256 of a file in the hub's cache, where the cache names it by that."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _free_name(into: Contents, folder: Path) -> str:
    """Name of a folder on the other machine: its own, with those above it where that says little or is taken."""
    names = [name for name in folder.resolve().parts[1:] if re.fullmatch(r"[\w.=+,@-]+", name)] or ["tree"]
    options = ["-".join(names[-count:]).lstrip(".") for count in range(1, len(names) + 1)]
    first = 1 if names[-1] == "tree" and len(options) > 1 else 0
    return next((name for name in options[first:] if f"trees/{name}" not in into.whole), options[first])
