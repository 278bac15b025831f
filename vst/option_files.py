"""What is looked at in a YAML file of options before it is read: its encoding, keys that are there twice, its size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

_MOST = 10**6  # values, with those that aliases repeat


def check_option_files(words: Sequence[str]) -> None:
    """Check the files that a command line names by ``--config``.

    Raises:
        ValueError: a file that is not in UTF-8, says a key twice, or holds or repeats more than any options do. What
            is no YAML, and files that are not there, are the parser's to tell.
    """
    given = [b if a == "--config" else a.partition("=")[2] for a, b in pairwise([*words, ""])
             if a.partition("=")[0] == "--config"]  # fmt: skip
    for name in given:
        if Path(name).is_file():
            _check(Path(name))


def _check(path: Path) -> None:
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        top = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        size = 0 if top is None else _size(top, path, {})
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 (byte {error.object[error.start]:#04x} at {error.start}).") from error
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply for options.") from None
    except yaml.YAMLError:
        return
    if size > _MOST:
        raise ValueError(
            f"{path} stands for {size:.1e} values, by aliases (*name) of aliases: write out what is meant."
        )


def _size(node: Any, path: Path, seen: dict[int, int | None]) -> int:
    """How many values a node stands for, each alias counted in full."""
    if id(node) in seen:
        if (known := seen[id(node)]) is None:
            raise ValueError(f"{path}:{node.start_mark.line + 1} has an alias (*name) of what it stands in.")
        return known
    seen[id(node)] = None
    size = 1
    if node.id == "mapping":
        keys = [(key.tag, key.value) for key, _ in node.value if key.id == "scalar" and not key.tag.endswith(":merge")]
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise ValueError(f"{path}:{node.start_mark.line + 1} says {key[1]} twice in one block; give it once.")
        size += sum(_size(part, path, seen) for pair in node.value for part in pair)
    elif node.id == "sequence":
        size += sum(_size(part, path, seen) for part in node.value)
    seen[id(node)] = size
    return size
