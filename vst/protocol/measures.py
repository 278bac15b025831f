"""What is told of a stitched model on the test pictures, beside its score."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vst.data.probes import IGNORED, ClassCounts, LinearHead
from vst.fit.similarity import AgreementSums, CKASums, FrechetSums
from vst.protocol.bench import Bench
from vst.protocol.stitched import Stitched


@torch.no_grad()
def measure(bench: Bench, stitched: Stitched, head: LinearHead) -> tuple[dict[str, Any], Tensor]:
    """Agreement at the seam and at the end, distance of the tail's inputs, score; and the predictions.

    Returns:
        A part of the row, and predictions ``[test]`` or ``[test, side, side]``.
    """
    cell, patches = stitched.cell, stitched.target.patches
    last = stitched.target.spec.depth
    seam, end, distance = AgreementSums(), AgreementSums(), FrechetSums()
    counts, given = ClassCounts(len(bench.task.classes)), []
    wanted = {cell.source: {stitched.reads}}
    wanted.setdefault(cell.target, set()).update({cell.enter, last})
    rows = bench.division.test
    for at in range(0, len(rows), 32):
        part = rows[at : at + 32]
        state = bench.store.batch(part, {k: sorted(v) for k, v in wanted.items()})
        with bench.autocast():
            z = stitched.seam(state[cell.source, stitched.reads])
            y = stitched.end(z).float()
        own = patches(state[cell.target, cell.enter])
        seam.update(patches(z).float(), own)
        distance.update(patches(z).float(), own)
        end.update(y, patches(state[cell.target, last]))
        given.append(_predict(bench, head, y, part))
        counts.update(given[-1], bench.labels(part))
    out = {
        "score": counts.score(bench.task.kind),
        "seam": seam.result().to_dict(),
        "end": end.result().to_dict(),
        "distance": distance.result(),
    }
    return out, torch.cat(given).cpu()


@torch.no_grad()
def measure_model(bench: Bench, model: str, head: LinearHead) -> tuple[float, Tensor]:
    """Score and predictions of one model alone."""
    last, rows = bench.models.specs[model].depth, bench.division.test
    counts, given = ClassCounts(len(bench.task.classes)), []
    for at in range(0, len(rows), 32):
        part = rows[at : at + 32]
        y = bench.models[model].patches(bench.store.batch(part, {model: [last]})[model, last])
        given.append(_predict(bench, head, y, part))
        counts.update(given[-1], bench.labels(part))
    return counts.score(bench.task.kind), torch.cat(given).cpu()


def _predict(bench: Bench, head: LinearHead, patches: Tensor, rows: list[int]) -> Tensor:
    return head.resized(head(head.pool(patches)), bench.labels(rows)).argmax(1)


def majority(bench: Bench) -> float:
    """Score of always giving the training pictures' most frequent class."""
    seen, counts = (ClassCounts(len(bench.task.classes)) for _ in range(2))
    for labels in _labels(bench, bench.division.train):
        seen.update(labels, labels)
    most_frequent = int(seen.wanted.argmax())
    for labels in _labels(bench, bench.division.test):
        counts.update(torch.full_like(labels, most_frequent), labels)
    return counts.score(bench.task.kind)


def _labels(bench: Bench, rows: list[int]) -> Iterator[Tensor]:
    """Of 32 pictures at a time."""
    return (bench.labels(rows[at : at + 32]) for at in range(0, len(rows), 32))


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
def cka_map(bench: Bench, source: str, target: str) -> list[list[float]]:
    """Linear CKA of patch tokens by depth: rows are the source's ``cka_depths``, columns the target's."""
    depths, rows = bench.config.cka_depths, bench.division.test[: bench.config.cka_pictures]
    sums = {(i, j): CKASums() for i in depths for j in depths}
    for at in range(0, len(rows), 32):
        out = bench.store.batch(rows[at : at + 32], dict.fromkeys((source, target), depths))
        for (i, j), value in sums.items():
            value.update(bench.models[source].patches(out[source, i]), bench.models[target].patches(out[target, j]))
    return [[sums[i, j].result() for j in depths] for i in depths]
