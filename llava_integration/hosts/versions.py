"""Which version of transformers serves which part; nothing is imported to find out."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

AUTO_CLASSES = (5, 0)


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def auto_classes_served() -> bool:
    """Whether the installed transformers can serve the tree's Auto classes and all that builds on them."""
    found = installed("transformers")
    return found is not None and _numbers(found) >= AUTO_CLASSES


def check_auto_classes() -> None:
    """See that the installed transformers serves the Auto classes.

    Raises:
        ImportError: it is missing or too old.
    """
    if not auto_classes_served():
        here = installed("transformers")
        raise ImportError(
            f"The Auto classes, training and answering need transformers 5.0 or later, here "
            f'{"it is not installed" if here is None else f"is {here}"}: pip install "vfm-stitch-tree[llava]" in '
            "another environment; the vision tower of the original LLaVA (llava_integration.install) works in this one."
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])
