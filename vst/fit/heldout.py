"""How well a tree's stitches do on held-out pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vst.data.pictures import ImageSet, collate
from vst.fit.similarity import Agreement, AgreementSums, FrechetSums
from vst.fit.teacher import TRUNK_PIXELS, Teacher, target_pixels, transforms
from vst.models.fields import checked, shown, whole
from vst.models.vfm import VFM
from vst.results.progress import track
from vst.results.tables import table
from vst.tree.encoder import VSTEncoder
from vst.tree.stitches import joined


class UnreadableHeldout(ValueError):
    """None of the held-out pictures could be read."""


@dataclass(frozen=True)
class StitchReport:
    """One stitch on held-out pictures; patch tokens only.

    Attributes:
        branch, split, enter, family: which stitch.
        seam: agreement of the stitch's output with the target's own tokens at the depth entered.
        final: agreement of the branch's features with the target's own.
        distance: Frechet distance between what the stitch feeds the tail and what the target feeds it, relative to the
            latter's spread (0 equal, 1 as far as a constant): far off means the tail runs outside what it knows.
        pictures: how many were read.
    """

    branch: str
    split: int
    enter: int
    family: str
    seam: Agreement
    final: Agreement
    distance: float
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict."""
        return asdict(self)


def check_tree(tree: Any, what: str) -> None:
    """Refuse what is no tree.

    Raises:
        ValueError: says how one is loaded.
    """
    if not isinstance(tree, VSTEncoder):
        hint = f": load it, VSTEncoder.from_pretrained({str(tree)!r})" if isinstance(tree, (str, os.PathLike)) else ""
        raise ValueError(f"{what} was given {shown(tree)}; expected a tree (VSTEncoder){hint}.")


@torch.no_grad()
def evaluate_stitches(
    tree: VSTEncoder,
    images: Any,
    *,
    targets: Mapping[str, VFM] | Teacher | None = None,
    indices: Sequence[int] | None = None,
    skipped: dict[str, str] | None = None,
    batch_size: int = 16,
    show_progress: bool = False,
) -> list[StitchReport]:
    """Report every stitch of a tree on pictures that it was not fitted to.

    Args:
        tree: on any device.
        images: anything that :class:`vst.data.images.ImageSet` takes, or an ``ImageSet`` with this tree's transforms.
        targets: whole target models by branch (moved to the tree's device), or a teacher; default: loaded from the
            sources.
        indices: use only these pictures.
        skipped: filled with the reason by name of every picture that could not be read.

    Raises:
        UnreadableHeldout: no picture could be read.
        ValueError: a tree without branches.
    """
    checked(skipped, dict | None, "skipped")
    check_tree(tree, "evaluate_stitches")
    if not tree.branches:
        raise ValueError("This tree has no branches, so it has no stitches: evaluate_trunk measures a trunk alone.")
    heldout = _Heldout(tree, images, targets, indices, batch_size)
    teacher, device = heldout.teacher, heldout.device
    keys = [(b.name, s) for b in tree.config.branches for s in b.splits]
    seam, final = {k: AgreementSums() for k in keys}, {k: AgreementSums() for k in keys}
    distance = {k: FrechetSums() for k in keys}
    pictures = 0
    for pixels, kept in heldout.batches(skipped, show_progress):
        pictures += kept
        taps = teacher.taps(pixels[TRUNK_PIXELS].to(device))
        for name, branch in tree.branches.items():
            target = teacher.target(name, pixels[target_pixels(name)].to(device))
            for split in branch.config.splits:
                z = branch.stitches[str(split)](joined(taps, branch.config.reads(split)), tree.trunk)
                y1 = branch.run_tail(z, split)
                wanted = branch.tail.patches(target[branch.config.enter(split)])
                seam[name, split].update(branch.tail.patches(z), wanted)
                distance[name, split].update(branch.tail.patches(z), wanted)
                final[name, split].update(branch.tail.patches(y1), branch.tail.patches(target[branch.config.stop]))
    if not pictures:
        raise heldout.unreadable()
    reports = []
    for name, split in keys:
        config = tree.branches[name].config
        reports.append(
            StitchReport(
                branch=name,
                split=split,
                enter=config.enter(split),
                family=str(config.stitch),
                seam=seam[name, split].result(),
                final=final[name, split].result(),
                distance=distance[name, split].result(),
                pictures=pictures,
            )
        )
    return reports


@torch.no_grad()
def evaluate_trunk(
    tree: VSTEncoder,
    images: Any,
    *,
    targets: Mapping[str, VFM] | Teacher | None = None,
    indices: Sequence[int] | None = None,
    batch_size: int = 16,
    show_progress: bool = False,
) -> Agreement:
    """Agreement of a tuned trunk's own features with those of the published trunk, patch tokens.

    Args:
        tree: which keeps its trunk's features; of one whose trunk is not tuned they agree to the bit.
        images, indices, batch_size: as for :func:`evaluate_stitches`.
        targets: a teacher, or the published trunk by its name in the tree; default: loaded from its source.

    Raises:
        UnreadableHeldout: no picture could be read.
        ValueError: a tree without its trunk's features.
    """
    check_tree(tree, "evaluate_trunk")
    if not isinstance(targets, Teacher):  # the branches have no part in it, and are not loaded
        given = checked(targets, Mapping[str, VFM] | None, "targets") or {}
        tree, targets = tree.trunk_alone(), {n: model for n, model in given.items() if n == tree.config.trunk_name}
    heldout = _Heldout(tree, images, targets, indices, batch_size)
    config = tree.config
    sums, depth = AgreementSums(), config.trunk_stop
    for pixels, _ in heldout.batches(None, show_progress):
        there = pixels[TRUNK_PIXELS].to(heldout.device)
        given = tree.trunk.taps(heldout.teacher.cast(there), depth)[depth]
        wanted = heldout.teacher.target(config.trunk_name, there)[depth]
        sums.update(tree.trunk.patches(given), tree.trunk.patches(wanted))
    if not sums.tokens:
        raise heldout.unreadable()
    return sums.result()


class _Heldout:
    """Pictures that a report is of, and the teachers that it compares with."""

    def __init__(
        self,
        tree: VSTEncoder,
        images: Any,
        targets: Mapping[str, VFM] | Teacher | None,
        indices: Sequence[int] | None,
        batch_size: int,
    ) -> None:
        batch_size = whole(batch_size, "batch_size", (1, 2**31 - 1))
        if not isinstance(targets, Teacher):
            checked(targets, Mapping[str, VFM] | None, "targets")
        self.teacher = targets if isinstance(targets, Teacher) else Teacher(tree, targets)
        self.device = next(tree.parameters()).device
        self.teacher.to(self.device)
        dataset = images if isinstance(images, ImageSet) else ImageSet(images, transforms(tree))
        if indices is not None:
            indices = checked(indices, Sequence[int], "indices", (-len(dataset), len(dataset) - 1))
        self.pictures = Subset(dataset, list(range(len(dataset)) if indices is None else indices))
        self.loader = DataLoader(self.pictures, batch_size=batch_size, collate_fn=collate)

    def batches(self, skipped: dict[str, str] | None, show: bool) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Pixels by name, and of how many pictures; those that cannot be read are noted in ``skipped``."""
        checked(show, bool, "show_progress")
        for pixels, kept, lost in track(self.loader, "held-out pictures", len(self.loader), show):
            if skipped is not None:
                skipped.update({s.name: s.reason for s in lost})
            if kept:
                yield pixels, len(kept)

    def unreadable(self) -> UnreadableHeldout:
        """What is raised where no picture could be read."""
        return UnreadableHeldout(f"None of {len(self.pictures)} held-out pictures could be read: give readable ones.")


def stitch_table(reports: Sequence[StitchReport]) -> None:
    """Print how well stitches match on held-out pictures."""
    table(
        "Stitches on held-out pictures",
        ["branch", "split", "enters", "stitch", "seam error", "final error", "by channel", "cosine", "distance"],
        [
            (
                r.branch,
                r.split,
                r.enter,
                r.family,
                r.seam.error,
                r.final.error,
                r.final.channel_error,
                r.final.cosine,
                r.distance,
            )
            for r in reports
        ],
        "errors are relative to the target's own variance (1 = as bad as its mean); distance: of the tail's inputs "
        "from what the target feeds it (0 equal, 1 as far as a constant)",
    )
