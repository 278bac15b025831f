"""Pictures and other media of a record: their names in the folder, and what would be left out without a word.

A record whose picture stands under another key than ``image`` would train as text alone, and so would one about a
video. Such a record is not used, and the reason names the key or the tag.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llava_integration.models.chat import IMAGE_TOKEN

KEY = "image"
"""Where a record names its pictures."""

_OWN = (KEY, "conversations", "id", "from", "value")
# fmt: off
_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".avif", ".svg",
    ".mp4", ".m4v", ".mkv", ".webm", ".avi", ".mov", ".mpg", ".mpeg", ".wav", ".mp3", ".flac", ".ogg", ".m4a", ".npy",
    ".npz", ".ply", ".pcd", ".obj", ".glb", ".pdf", ".dcm", ".nii", ".nii.gz", ".heif", ".jp2", ".exr", ".ppm",
)
# fmt: on
_INSIDE = ("image", "picture", "photo", "video", "audio", "screenshot")  # telling wherever they stand in a key
_WORDS = {"img", "imgs", "pic", "pics", "frame", "frames", "sound", "sounds", "speech", "voice", "wav", "png", "jpg"}
_WORDS |= {"jpeg", "mp3", "mp4", "pixel", "pixels", "media", "visual", "visuals"}
_NOUN = r"(?:image|img|picture|pic|photo|screenshot|frame|video|audio|sound|speech|voice|wav)s?"
_KEYS = re.compile(rf"{_NOUN}|media|pixel_?values|(?:video|audio|sound|speech)s?_(?:path|file|url)s?", re.IGNORECASE)
# Not what stands in back quotes, has its end tag as HTML has, or is called a tag.
_TAG = re.compile(
    r"(?<!`)<\|?(?:vila/)?(?P<name>(?:image|img|picture|photo|video|audio|speech|sound|frame)s?"
    r"(?:[_-]?(?:here|placeholder|pad|token|patch|features?|start|bos|soft_token))?[_ -]?\d*"
    r"|vision_start|start_of_image|im_patch)\|?>"
    r"(?!\s*(?:tags?|elements?)\b)",
    re.IGNORECASE,
)


def unread_key(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The key of a record, or of one of its turns, under which media stand that are not read; None: there is none.

    Beside pictures that are read, sizes, sources and other names of theirs are facts about them. Without any, whatever
    speaks of a picture means one that would be missed.

    Args:
        record: with its turns under ``conversations``.
        names: of the pictures that are read.
    """
    read = {os.path.basename(name) for name in names}
    own = [(key, value) for key, value in record.items() if key not in _OWN]
    turns = [pair for turn in record["conversations"] for pair in turn.items()]
    own += [(f"conversations.{key}", value) for key, value in turns if key not in _OWN or key == KEY]
    for path, value in own:
        key = path.rpartition(".")[2]
        if not value:
            continue
        if not read:
            if found := next(_telling(path, value), None):
                return found
        elif _KEYS.fullmatch(key) and isinstance(value, (str, list, dict)):
            files = [os.path.basename(file) for file in _strings(value)]
            if not files or set(files) - read:
                return path
    return None


def unread_tag(text: str) -> str | None:
    """The first tag in what a user or the system says that stands for media, ``<image>`` aside; None: there is none."""
    for tag in _TAG.finditer(text):
        name = tag["name"].lower()
        if tag[0] != IMAGE_TOKEN and (name.startswith("img") or f"</{name}>" not in text.lower()):
            return tag[0]
    return None


def unread(key: str) -> str:
    """Why a record with media under a key is not used."""
    return f"has `{key}`; pictures are named under `{KEY}`, and no other media are read"


def inside(name: str, folder: str) -> str | None:
    """A picture's name relative to the folder; None where it lies elsewhere.

    Args:
        name: relative to the folder, or a whole path into it.
        folder: of pictures.
    """
    if os.path.isabs(name):
        for place in (os.path.abspath(folder), os.path.realpath(folder)):
            found = os.path.relpath(os.path.normpath(name), place)
            if found.split(os.sep)[0] != os.pardir:
                return found
        return None
    name = os.path.normpath(name)
    return None if name.split(os.sep)[0] == os.pardir else name


def is_url(name: str) -> bool:
    """Whether a name is an address or holds the picture itself, instead of naming a file."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|data:", name))


def _telling(path: str, value: Any) -> Iterator[str]:
    """Keys at or below ``path`` that speak of media, or whose values name a file of media."""
    key = path.rpartition(".")[2]
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*", key)}
    if any(part in key.lower() for part in _INSIDE) or words & _WORDS:
        yield path
    elif isinstance(value, dict):
        for name, inner in value.items():
            if inner:
                yield from _telling(f"{path}.{name}", inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            yield from _telling(path, item)
    elif any(_is_media(text) for text in _strings(value)):
        yield path


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _is_media(text: str) -> bool:
    if re.match(r"data:(image|video|audio|application)/", text):
        return True
    return len(text) < 1000 and "\n" not in text and text.lower().partition("?")[0].endswith(_SUFFIXES)
