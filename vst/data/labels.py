"""Labels of pictures as people give them: one a picture, or the names of the folders that the pictures lie in."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

_PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"}


def one_a_picture(labels: Any, pictures: int) -> list[Any]:
    """Class names or numbers, one a picture, in the pictures' order.

    Args:
        labels: a list, array or tensor of strings or whole numbers, all of one kind.
        pictures: how many there are.

    Raises:
        ValueError: there are more or fewer, they have no order, one is missing, or they are no classes.
    """
    if isinstance(labels, (str, bytes, Mapping, set, frozenset)) or not hasattr(labels, "__len__"):
        raise ValueError(f"labels is a {type(labels).__name__}; expected a list or an array of one label a picture.")
    if len(labels) != pictures:
        raise ValueError(f"{pictures} pictures and {len(labels)} labels were given; expected one a picture.")
    out = [value.item() if getattr(value, "ndim", None) == 0 else value for value in labels]
    for place, value in enumerate(out):
        if not isinstance(value, (str, int)) and not (isinstance(value, float) and value.is_integer()):
            raise ValueError(f"The label of picture {place} is {value!r}; expected the name or number of its class.")
        if value == "":
            raise ValueError(f"The label of picture {place} is empty; expected the name of its class.")
    if len({isinstance(value, str) for value in out}) > 1:
        raise ValueError("labels mixes names and numbers; expected one or the other.")
    return out


def by_folder(names: Sequence[str]) -> list[str]:
    """The first folder of each picture's relative path.

    Raises:
        ValueError: a picture lies in no folder, or the folders are the parts of a data set and not its classes.
    """
    paths = [PurePath(name) for name in names]
    if loose := [path for path in paths if len(path.parts) < 2 or path.is_absolute()]:
        raise ValueError(f"The picture {loose[0]} lies in no class folder; expected CLASS/PICTURE below the folder.")
    folders = [path.parts[0] for path in paths]
    if {name.lower() for name in folders} <= _PARTS:
        raise ValueError(
            f"The folders of pictures are {', '.join(sorted(set(folders)))}, which are parts of a data set and no "
            "classes; give one of them as the pictures and another one as the held-out pictures."
        )
    return folders


def check_classes(train: Sequence[Any], test: Sequence[Any], known: Sequence[Any]) -> None:
    """Make sure that a probe can learn what it is asked: before any feature is computed.

    Held-out pictures of a class that is known, but of which no training picture was drawn, bring a warning.

    Args:
        train, test: label of each picture that is looked at.
        known: labels of all pictures that training pictures are drawn from.

    Raises:
        ValueError: one class alone, or held-out pictures of classes that are not known.
    """
    kinds = set(train)
    if len(kinds) < 2:
        told = f"are all {next(iter(kinds))!r}" if kinds else "are none"
        raise ValueError(f"The training labels {told}; a probe needs at least two classes.")
    if not (unseen := Counter(label for label in test if label not in kinds)):
        return
    names = ", ".join(repr(label) for label, _ in unseen.most_common(3))
    told = (
        f"{unseen.total()} of {len(test)} held-out pictures are of classes that no training picture has ({names}), so "
        "that no probe can be right on them"
    )
    if set(unseen) - set(known):
        raise ValueError(f"{told}; expected the same classes in both.")
    warnings.warn(f"{told}; give more pictures.", stacklevel=2)
