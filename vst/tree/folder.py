"""The folder of a saved tree: its files, and what is read of it before weights are; or a hub id's files, fetched."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

from vst.data.preparation import asked_otherwise
from vst.models.checkpoints.preparation import processor_settings
from vst.models.fields import checked, shown
from vst.results.folders import read_json
from vst.tree.config import MODEL_TYPE, VSTConfig
from vst.tree.seal import check_config, check_sums
from vst.tree.tensors import opened

CONFIG, WEIGHTS, STITCHES, CARD = "config.json", "model.safetensors", "stitches.safetensors", "README.md"
PREPROCESSOR = "preprocessor_config.json"  # read by transformers alone: here the config says all of it
MOST_CONFIG_BYTES = 2**24


def preprocessor(config: VSTConfig) -> dict[str, Any]:
    """A tree's picture preparation, as ``AutoImageProcessor`` of transformers reads it."""
    return {
        "image_processor_type": "VSTImageProcessor",
        "size": {"height": config.image_size, "width": config.image_size},
        "image_mean": list(config.trunk.mean),
        "image_std": list(config.trunk.std),
        "cut": config.cut,
    }


def warn_preparation(folder: Path, config: VSTConfig) -> None:
    """Warn where the processor that lies beside a model prepares pictures in another way than its tree does."""
    try:
        path, values = processor_settings(folder)
    except ValueError as error:
        warnings.warn(f"{error} A tree's pictures are prepared as its config says.", stacklevel=1)
        return
    if path is None:
        return
    does = config.transform()
    otherwise = [f"{name} {shown(given)} for {own}" for name, (given, own) in asked_otherwise(does, values).items()]
    lacking = [name for name in ("size", "image_mean", "image_std") if values.get(name) is None]
    if found := [*otherwise, *(f"no {name}" for name in lacking)]:
        warnings.warn(
            f"{path} prepares pictures in another way than the tree's config ({', '.join(found)}), so transformers' "
            "processors hand over other pixels than the tree was fitted to: save the model again, or correct the file.",
            stacklevel=1,  # in one place, so that whoever reads tree and processor is told once
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the files of weights in a folder: whole, in shards as transformers writes them, the stitches alone."""
    patterns = (WEIGHTS, f"{WEIGHTS}.index.json", f"model-{5 * '?'}-of-{5 * '?'}.safetensors", STITCHES)
    return sorted(path.name for pattern in patterns for path in folder.glob(pattern))


def check_weights(folder: str | Path) -> None:
    """See that the weights beside a config are there and whole: headers alone are read, which tell how long a file is.

    Raises:
        FileNotFoundError: no weights, or a part of them is missing.
        ValueError: a file was cut, or is no safetensors.
    """
    folder = Path(folder)
    files = set(weight_files(folder)) | {path.name for path in folder.glob("*.bin")}
    index = f"{WEIGHTS}.index.json"
    if index in files:
        listed = read_json(folder / index)
        files |= set((listed.get("weight_map") or {}).values() if isinstance(listed, dict) else ())
    missing = sorted(name for name in files if not (folder / name).is_file())
    if missing or not files:
        lacks = f"{', '.join(missing)} is missing" if missing else f"it has neither {WEIGHTS} nor {STITCHES}"
        raise FileNotFoundError(f"{folder} is incomplete: {lacks}; restore it, or make it anew.")
    for name in sorted(files):
        if name.endswith(".safetensors"):
            with opened(folder / name):
                pass  # safetensors looks at the whole header, and at the file's length


def check_seal(folder: str | Path) -> None:
    """See that a saved tree's weights and config are what was saved, for readers of tensors other than this one.

    The file is read once, a tensor at a time; one without a seal is not read.

    Raises:
        FileNotFoundError: there is no config, or are no weights.
        ValueError: damage, which is named.
    """
    path = read_config(folder)[0] / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: restore it, or make it anew.")
    with opened(path) as file:
        check_sums(path, file.metadata(), ((k, file.get_tensor(k)) for k in file.keys()))  # noqa: SIM118 (not a dict)


def read_config(
    source: str | Path, revision: str | None = None, *, weights: bool = False, inside: bool = False
) -> tuple[Path, VSTConfig]:
    """Folder and config of a saved tree.

    Args:
        source: a folder, or a hub id whose files are fetched first.
        revision: of a hub id.
        weights: whether a hub id's weights are fetched too, not its config alone.
        inside: take a saved language model as well, for the tree that it sees through.

    Raises:
        FileNotFoundError: neither a folder with a config nor a hub id that can be reached.
        ValueError: the config is damaged or not a tree's.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValueError(f"{shown(source)} is no saved tree; expected a folder, or a hub id such as owner/tree.")
    checked(revision, str | None, "revision")
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(
            str(source), revision, [CONFIG, WEIGHTS, STITCHES, PREPROCESSOR, CARD] if weights else [CONFIG]
        )
    if not (folder / CONFIG).is_file():
        made = [str(folder / part) for part in ("tree", "stitches") if (folder / part / CONFIG).is_file()]
        hint = f": take {' or '.join(made)}, which the run there made" if made else ""
        raise FileNotFoundError(f"{folder} has no {CONFIG}; expected a folder made by save_pretrained{hint}.")
    if (size := (folder / CONFIG).stat().st_size) > MOST_CONFIG_BYTES:
        raise ValueError(f"{folder / CONFIG} has {size} bytes; expected a tree's config, of a few thousand.")
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG} holds a {type(values).__name__}; expected a tree's config.")
    tower, alone = values.get("vision_config"), True
    if isinstance(tower, dict) and tower.get("model_type") == MODEL_TYPE:
        if not inside:
            raise ValueError(
                f"{folder} holds a language model on a tree, where a tree alone is expected: give the tree's own "
                "folder, or load the model by transformers or llava_integration.models.assemble.load."
            )
        alone = False  # the folder's weights are those of the whole language model
        known = {"model_type", *(field.name for field in fields(VSTConfig))}  # the others are transformers' own
        values = {name: value for name, value in tower.items() if name in known}
    config = VSTConfig.from_dict(values)
    held = next((folder / name for name in (WEIGHTS, STITCHES) if (folder / name).is_file()), None)
    if alone and held:
        _check_bounds(held, config)
    return folder, config


def _check_bounds(path: Path, config: VSTConfig) -> None:
    """Refuse a config that asks for more than its file of weights holds, before anything of that size is built."""
    with opened(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a dict)
        check_config(path, file.metadata(), config)
    held = sum(math.prod(shape) for shape in shapes.values())
    if path.name == WEIGHTS and (needed := config.least_weights()) > held:
        raise ValueError(
            f"{path.with_name(CONFIG)} describes a tree of at least {needed} weights and {path.name} holds {held}: one "
            "of the two is damaged or of another tree; save or fetch it again."
        )


def _from_hub(repo_id: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder here nor a hub repository that can be reached "
            f"({type(error).__name__}): check the path, or the network."
        ) from error
