"""What a run is made of besides its options: the content of the files that they name.

A name can come to stand for other records, another tree or another model between a run's start and its resumption, and
would then go on as a mixture of both. Records count with every byte. Of weights, which can be tens of GB, the names,
types and shapes of all tensors count and a few bytes from each of them: another training changes nearly all values.
Pictures count by the records that name them alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llava_integration.train.data import DataConfig
from llava_integration.train.model import ModelConfig
from vst.results.folders import OVERWRITE, read_json

_TEXTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
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


def noted(folder: Path, model: ModelConfig, data: DataConfig, resume: bool) -> dict[str, Any]:
    """What a run's config says of content (``content``), to be noted or compared.

    A finished run keeps what it noted, as it mixes with nothing any more and its files may be gone; one that was begun
    by a version that noted nothing has nothing to compare.
    """
    file = folder / "run.json"
    if resume and file.is_file():
        before = read_json(file, OVERWRITE)
        if not isinstance(before, dict):
            raise ValueError(f"{file} holds no run's config (a JSON object); {OVERWRITE}.")
        if "content" not in before or (folder / "results.json").is_file():
            return {key: before[key] for key in ("content",) if key in before}
    return {"content": content(model, data)}


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
