"""What a run is made of besides its options: the content of the files that they name.

A name can come to stand for other records, another tree or another model between a run's start and its resumption, and
would then go on as a mixture of both. Records count with every byte. Of weights, which can be tens of GB, the names,
types and shapes of all tensors count and a few bytes from each of them: another training changes nearly all values.
Of pictures, which can be a million files, the names in the records count and the files' sizes; not the times of files,
which are others wherever pictures are staged anew.

What is the same by its content may have another name: a run goes on when it, its data or its models were moved.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from llava_integration.train.data import DataConfig
from llava_integration.train.model import ModelConfig
from vst.results.finished import as_written
from vst.results.folders import Run, begun_with, read_json, write_json

_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
PICTURES = "pictures.json"
_AT_ONCE, _PART = 16, 1024  # threads that ask for the sizes of pictures; pictures that one asks for at a time
_PLACES, _BYTES = 3, 64  # of a tensor: at its beginning, in its middle and at its end
_MOST_HEADER = 2**27  # bytes; safetensors itself takes no longer ones


def content(model: ModelConfig, data: DataConfig) -> dict[str, Any]:
    """Digests of the files that a run is made of; what is on the hub stands for itself and is left out.

    Returns:
        ``records``: by file, ``bytes`` and ``sha256``. ``model``: by option, a digest of the folder or file it names.

    Raises:
        FileNotFoundError: a file of conversations or the folder of pictures is missing.
    """
    if data.images is not None and not Path(data.images).is_dir():
        raise FileNotFoundError(f"There is no folder of pictures {data.images}; give one, or none (images).")
    named = {name: getattr(model, name) for name in ("start", "llm", "tower", "template")}
    places = {name: Path(os.path.expanduser(value)) for name, value in named.items() if value is not None}
    return {
        "records": {file: _records(Path(file)) for file in data.files},
        "model": {name: _digest(path) for name, path in places.items() if path.exists()},
    }


def noted(
    folder: Path, config: Mapping[str, Any], model: ModelConfig, data: DataConfig, resume: bool
) -> dict[str, Any]:
    """A run's config with what its files hold (``content``), to be noted or compared.

    What the run noted under another name, with the same content, is called by that name. A finished run keeps what it
    noted, as it mixes with nothing any more and its files may be gone; one that was begun by a version that noted
    nothing has nothing to compare.
    """
    before = begun_with(folder) if resume else None
    if before is None:
        return {**config, "content": content(model, data)}
    if "content" not in before or (folder / "results.json").is_file():
        return {**config, **{key: before[key] for key in ("content",) if key in before}}
    compared = (folder / PICTURES).is_file() or not any(folder.glob("checkpoints/*"))
    with as_written(folder / "run.json", "a training", "restore it, or give another folder"):
        return _renamed(config, content(model, data), before, compared)


def _renamed(
    config: Mapping[str, Any], found: dict[str, Any], before: Mapping[str, Any], compared: bool
) -> dict[str, Any]:
    """A config in the names that the run noted, where they stand for the same.

    Args:
        config: as it is given now.
        found: its content.
        before: what the run noted.
        compared: whether the pictures, wherever they lie, are compared later on (:func:`check_pictures`), or nothing
            was learned from any yet.
    """
    model, data, kept = dict(config["model"]), dict(config["data"]), before["content"]
    for name, digest in found["model"].items():
        if kept["model"].get(name) == digest:
            model[name] = before["model"][name]
    if [found["records"][file] for file in data["files"]] == list(kept["records"].values()):
        data["files"], found = before["data"]["files"], {**found, "records": kept["records"]}
    if compared and data["images"] is not None and before["data"]["images"] is not None:
        data["images"] = before["data"]["images"]
    return {**config, "model": model, "data": data, "content": found}


def check_pictures(run: Run, names: Iterable[str], images: str | None) -> None:
    """Note which pictures a run learns from, or compare: their names and sizes; one that is missing has the size -1.

    Args:
        run: which may have been begun by a version that noted nothing.
        names: of the pictures of all conversations, in order, relative to ``images``.
        images: the folder.

    Raises:
        ValueError: they are others than those that the run was begun with.
    """
    paths = list(names)
    # On a network each answer takes its time, and they can be awaited together.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        parts = [paths[i : i + _PART] for i in range(0, len(paths), _PART)]
        sizes = list(chain.from_iterable(pool.map(lambda part: [_size(images or "", name) for name in part], parts)))
    sha = hashlib.sha256()
    for name, size in zip(paths, sizes, strict=True):
        sha.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    missing = sizes.count(-1)
    found = {
        "pictures": len(sizes) - missing,
        "missing": missing,
        "bytes": sum(sizes) + missing,
        "sha256": sha.hexdigest(),
    }
    file = run.path(PICTURES)
    if not file.is_file():
        write_json(file, found)
        return
    advice = "delete it, and the pictures are taken for those that the run was begun with"
    before = read_json(file, advice)
    if before != found:
        with as_written(file, "a training", advice):
            then = _told(before)
        raise ValueError(
            f"{run.folder} cannot be resumed because the pictures in {images} are not those that it was begun with "
            f"({then} then, {_told(found)} now, compared by names and sizes): put those back, or give another folder."
        )


def _told(pictures: Mapping[str, Any]) -> str:
    return f"{pictures['pictures']:,} of {pictures['bytes']:,} bytes and {pictures['missing']:,} missing"


def _size(folder: str, name: str) -> int:
    try:
        return os.stat(os.path.join(folder, name)).st_size
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return -1


def _records(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of conversations {path}; give a JSON or JSONL file (files).")
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: BinaryIO) -> str:
    sha = hashlib.sha256()
    while part := file.read(2**20):
        sha.update(part)
    return sha.hexdigest()


def _digest(path: Path) -> str:
    """Of a file, or of a folder's texts and weights."""
    sha = hashlib.sha256()
    files = [path] if path.is_file() else [path / name for name in _TEXTS if (path / name).is_file()]
    for text in files:
        sha.update(text.name.encode() + b"\0" + text.read_bytes())
    for weights in sorted(found for pattern in _WEIGHTS for found in path.glob(pattern)):
        sha.update(weights.name.encode() + b"\0" + str(weights.stat().st_size).encode())
        with open(weights, "rb") as file:
            for part in _samples(file, weights):
                sha.update(part)
    return sha.hexdigest()[:24]


def _samples(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """A few bytes of every tensor; of a file of another format, or a damaged one, from places spread over it."""
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    ranges = [(size * i // 256, size * (i + 1) // 256) for i in range(256)]
    if path.suffix == ".safetensors" and length <= min(size, _MOST_HEADER):
        header = file.read(length)
        yield header
        try:
            parts = json.loads(header)
            offsets = [part["data_offsets"] for name, part in parts.items() if name != "__metadata__"]
            ranges = [(8 + length + begin, 8 + length + end) for begin, end in offsets]
        except (ValueError, TypeError, KeyError, AttributeError):
            pass  # whoever loads it says what is wrong
    for begin, end in ranges:
        for place in range(_PLACES):
            file.seek(begin + max(0, end - begin - _BYTES) * place // (_PLACES - 1))
            yield file.read(min(_BYTES, end - begin))
