"""How fast pictures are read: decoded, cut and resized in worker processes, as a fit reads them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from vst.data.images import ImageTransform
from vst.data.pictures import ImageSet, collate
from vst.models.fields import whole


def measure_reading(
    images: Any, transforms: Mapping[str, ImageTransform], *, workers: int = 1, batch_size: int = 32, passes: int = 3
) -> dict[str, float]:
    """Pictures a second that worker processes make into tensors, one for each transform.

    Each worker runs on one core (torch gives it one thread). The first pass, in which processes start and files come
    into the system's page cache, is not counted: what is measured is arithmetic, not the disk.

    Args:
        images: what :class:`vst.data.pictures.ImageSet` takes, such as a folder.
        transforms: by name, as :func:`vst.fit.heldout.transforms` gives those of a tree.
        workers: processes.
        batch_size: pictures a batch, which one worker makes.
        passes: counted passes over the pictures.

    Returns:
        ``workers``, ``pictures_per_s``, ``pictures_per_s_per_worker``, ``pictures`` (that were read while it was
        measured) and ``skipped``.

    Raises:
        ValueError: numbers below 1, no pictures, or none that can be read.
    """
    workers, passes = whole(workers, "workers", (1, 1024)), whole(passes, "passes", (1, None))
    data = ImageSet(images, transforms)
    loader = DataLoader(
        data, whole(batch_size, "batch_size", (1, None)), collate_fn=collate, num_workers=workers,
        persistent_workers=True,
    )  # fmt: skip
    read = skipped = 0
    for _, kept, bad in loader:
        read, skipped = read + len(kept), skipped + len(bad)
    if not read:
        raise ValueError(f"None of {skipped} pictures can be read; expected some.")
    began = time.perf_counter()
    for _ in range(passes):
        for _ in loader:
            pass
    per_s = passes * read / (time.perf_counter() - began)
    return {
        "workers": workers, "pictures_per_s": per_s, "pictures_per_s_per_worker": per_s / workers,
        "pictures": passes * read, "skipped": skipped,
    }  # fmt: skip
