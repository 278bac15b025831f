"""Pictures of results: drawn when the results are saved, so that no plotting library can cost them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotDrawn(RuntimeError):
    """A picture could not be drawn; the results that it shows are saved."""


@contextmanager
def drawing(path: str | os.PathLike) -> Iterator[None]:
    """Name the picture that a block of code draws, and fails to.

    Raises:
        NotDrawn: whatever else was raised.
    """
    try:
        yield
    except Exception as error:  # whatever a plotting library raises
        raise NotDrawn(
            f"{path} could not be drawn ({type(error).__name__}: {error}); what it shows is saved in "
            f"{Path(path).parent}."
        ) from error
