"""What is told of a stitched model on the test pictures, beside its score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vst.data.probes import IGNORED, ClassCounts, LinearHead
from vst.fit.similarity import AgreementSums, CKASums, FrechetSums
from vst.protocol.seeded_task import SeededTask
from vst.protocol.stitched import Stitched


@torch.no_grad()
def measure(seeded: SeededTask, stitched: Stitched, head: LinearHead) -> tuple[dict[str, Any], Tensor]:
    """Agreement at the seam and at the end, distance of the tail's inputs, score; and the predictions.

    Returns:
        A part of the row, and predictions ``[test]`` or ``[test, side, side]``.
    """
    cell, patches = stitched.cell, stitched.target.patches
    last = stitched.target.spec.depth
    seam, end, distance = AgreementSums(), AgreementSums(), FrechetSums()
    counts, given = ClassCounts(len(seeded.task.classes)), []
    wanted = {cell.source: {*stitched.reads}}
    wanted.setdefault(cell.target, set()).update({cell.enter, last})
    rows = seeded.division.test
    for at in range(0, len(rows), 32):
        part = rows[at : at + 32]
        state = seeded.store.batch(part, {k: sorted(v) for k, v in wanted.items()})
        with seeded.autocast():
            z = stitched.seam(stitched.read(state))
            y = stitched.end(z).float()
        own = patches(state[cell.target, cell.enter])
        seam.update(patches(z).float(), own)
        distance.update(patches(z).float(), own)
        end.update(y, patches(state[cell.target, last]))
        given.append(_predict(seeded, head, y, part))
        counts.update(given[-1], seeded.labels(part))
    out = {
        "score": counts.score(seeded.task.kind),
        "seam": seam.result().to_dict(),
        "end": end.result().to_dict(),
        "distance": distance.result(),
    }
    return out, torch.cat(given).cpu()


@torch.no_grad()
def measure_model(seeded: SeededTask, model: str, head: LinearHead) -> tuple[float, Tensor]:
    """Score and predictions of one model alone."""
    last, rows = seeded.models.specs[model].depth, seeded.division.test
    counts, given = ClassCounts(len(seeded.task.classes)), []
    for at in range(0, len(rows), 32):
        part = rows[at : at + 32]
        y = seeded.models[model].patches(seeded.store.batch(part, {model: [last]})[model, last])
        given.append(_predict(seeded, head, y, part))
        counts.update(given[-1], seeded.labels(part))
    return counts.score(seeded.task.kind), torch.cat(given).cpu()


def _predict(seeded: SeededTask, head: LinearHead, patches: Tensor, rows: list[int]) -> Tensor:
    scores = head.resized(head(head.pool(patches)), seeded.labels(rows))
    if not torch.isfinite(scores).all():  # the largest of such numbers is some class, and would be scored
        raise RuntimeError(
            f"{seeded.name}: the head's scores on test pictures are not finite; give precision fp32, or look for "
            "broken weights; finished rows are kept."
        )
    return scores.argmax(1)


def majority(seeded: SeededTask) -> float:
    """Score of always giving the training pictures' most frequent class."""
    seen, counts = (ClassCounts(len(seeded.task.classes)) for _ in range(2))
    for labels in _labels(seeded, seeded.division.train):
        seen.update(labels, labels)
    most_frequent = int(seen.wanted.argmax())
    for labels in _labels(seeded, seeded.division.test):
        counts.update(torch.full_like(labels, most_frequent), labels)
    return counts.score(seeded.task.kind)


def _labels(seeded: SeededTask, rows: list[int]) -> Iterator[Tensor]:
    """Of 32 pictures at a time."""
    return (seeded.labels(rows[at : at + 32]) for at in range(0, len(rows), 32))


def rescues(given: Tensor, first: Tensor, second: Tensor, labels: Tensor) -> dict[str, int]:
    """Where a stitched model differs from both models alone, in pictures (or pixels that count).

    Returns:
        ``rescue``: right where both are wrong (of ``both_wrong``); ``interference``: wrong where both are right (of
        ``both_right``).
    """
    kept = labels.cpu() != IGNORED
    right, a, b = (x.cpu()[kept] == labels.cpu()[kept] for x in (given, first, second))
    return {
        "rescue": int((right & ~a & ~b).sum()),
        "both_wrong": int((~a & ~b).sum()),
        "interference": int((~right & a & b).sum()),
        "both_right": int((a & b).sum()),
    }


@torch.no_grad()
def cka_map(seeded: SeededTask, source: str, target: str) -> list[list[float]]:
    """Linear CKA of patch tokens by depth: rows are the source's ``cka_depths``, columns the target's."""
    depths, rows = seeded.config.cka_depths, seeded.division.test[: seeded.config.cka_pictures]
    sums = {(i, j): CKASums() for i in depths for j in depths}
    for at in range(0, len(rows), 32):
        out = seeded.store.batch(rows[at : at + 32], dict.fromkeys((source, target), depths))
        for (i, j), value in sums.items():
            value.update(seeded.models[source].patches(out[source, i]), seeded.models[target].patches(out[target, j]))
    return [[sums[i, j].result() for j in depths] for i in depths]
