"""What all rows of one task and seed share: pictures, labels, statistics, stitches and heads that were trained before.

A stitch whose chain has no task loss depends on pictures alone: tasks that draw the same pictures share it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vst.data.probes import LinearHead
from vst.fit.cache import digest
from vst.fit.matching import idle, stitch_loss
from vst.fit.objectives import OBJECTIVES, Objective
from vst.protocol.cells import Cell
from vst.protocol.chains import is_closed, name_of, needs_labels
from vst.protocol.config import ProtocolConfig
from vst.protocol.features import FeatureStore
from vst.protocol.kept import load_module, save_module
from vst.protocol.stitched import Stitched
from vst.protocol.tasks import Division, Task, check_classes, labels_of
from vst.protocol.training import Trainer
from vst.tree.ridge import ChannelSums
from vst.tree.stitches import Calibration


class SeededTask:
    """One task at one seed.

    Args:
        name: of the task. task: itself. division: its pictures. store: their features.
        config: of the protocol. folder: of the run. seed: of everything random.
        show: progress.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        division: Division,
        store: FeatureStore,
        config: ProtocolConfig,
        folder: Path,
        seed: int,
        *,
        show: bool = True,
    ) -> None:
        self.name, self.task, self.division, self.store, self.config = name, task, division, store, config
        self.folder, self.seed, self.show = folder, seed, show
        self.models, self.device = store.models, store.models.device
        rows = [*division.train, *division.validation, *division.test]
        labels = labels_of(name, task, rows, config.cut, config.mask_size)
        check_classes(name, labels[: len(division.train)])
        self._labels = labels.to(self.device)
        self._place = {row: i for i, row in enumerate(rows)}
        names = {part: [_short(store.images.name(row)) for row in numbers] for part, numbers in vars(division).items()}
        self.data = digest(names, {"labels": labels})[:12]  # the same wherever the files lie, and whatever their dates
        self._pool = {"pool": store.fingerprint, "train": division.train, "validation": division.validation}
        self._calibrations: dict[tuple[str, tuple[int, ...], str, int], tuple[Calibration, dict[str, Any]]] = {}
        self._statistics: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def test_labels(self) -> Tensor:
        """Labels or masks of the test pictures (long)."""
        return self.labels(self.division.test)

    def labels(self, rows: Sequence[int]) -> Tensor:
        """Labels of rows (long)."""
        return self._labels[[self._place[row] for row in rows]].long()

    def autocast(self) -> Any:
        """For every pass of a stitch and a tail."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.store.bf16)

    def statistics(self, model: str) -> dict[str, Tensor]:
        """Of a model's own features over the training pictures, by channel: ``mean``, ``std`` of patch tokens, and
        ``pooled_mean``, ``pooled_std`` of their means over a picture."""
        if model not in self._statistics:
            final = self.models.specs[model].depth
            tokens, means = ChannelSums(), ChannelSums()
            for rows in self._parts(self.division.train):
                y = self.store.batch(rows, {model: [final]}, counted=False)[model, final]
                y = self.models[model].patches(y).double()
                tokens.update(y.flatten(0, 1))
                means.update(y.mean(1))
            self._statistics[model] = {
                f"{what}{name}": value
                for what, sums in (("", tokens), ("pooled_", means))
                for name, value in (("mean", sums.mean()), ("std", sums.std()))
            }
        return self._statistics[model]

    def _parts(self, rows: Sequence[int], size: int = 32) -> list[Sequence[int]]:
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def calibration(self, stitched: Stitched) -> tuple[Calibration, dict[str, Any]]:
        """Sums for the closed forms and the seam's statistics, from the first training pictures, and what they cost."""
        cell = stitched.cell
        key = (cell.source, stitched.reads, cell.target, cell.enter)
        if key not in self._calibrations:
            sums, began = Calibration(), time.monotonic()
            self.store.counts.take()
            for rows in self._parts(self.division.train[: self.config.train.calibration]):
                x, y = self._pair(rows, stitched, cell.enter)
                sums.update(stitched.source.spec, stitched.target.spec, x, y)
            facts = {"seconds": time.monotonic() - began, "naive_pictures": self.store.counts.take()}
            self._calibrations[key] = sums, facts
        return self._calibrations[key]

    def _pair(self, rows: Sequence[int], stitched: Stitched, depth: int) -> tuple[Tensor, Tensor]:
        """Source tokens that the stitch reads, and the target's own at one depth."""
        source, target = stitched.cell.source, stitched.cell.target
        wanted = {source: [*stitched.reads]}
        wanted.setdefault(target, []).append(depth)
        out = self.store.batch(rows, wanted)
        return stitched.read(out), out[target, depth]

    def states(self, rows: Sequence[int], stitched: Stitched) -> Tensor:
        """Source tokens that the stitch reads."""
        return stitched.read(self.store.batch(rows, {stitched.cell.source: stitched.reads}))

    def known(self, *models: str) -> str:
        """Digest of all that what is kept of these models on these pictures depends on."""
        return digest({**self._pool, "models": [self.models.digest(name) for name in models]})[:12]

    def stitched(self, cell: Cell) -> tuple[Stitched, dict[str, Any]]:
        """The stitch of a chain without task loss, trained or read back, and facts of each of its stages."""
        stitched = Stitched(cell, self.models)
        name = f"{self.known(cell.source, cell.target)},{cell.place},{name_of(cell.chain)},seed{cell.seed}"
        path = self.folder / "stages" / f"{name}.safetensors"
        kept = load_module(path, stitched.stitch)
        if kept is not None:
            return stitched, kept
        if not cell.chain or is_closed(cell.chain[-1]):
            facts = {name_of(cell.chain): self._start(stitched, cell.chain)}
        else:
            stitched, facts = self.stitched(cell.before())
            stitched.cell = cell
            facts = {**facts, cell.chain[-1]: self._match(stitched, cell.chain[-1])}
        save_module(path, stitched.stitch, facts)
        return stitched, facts

    def _start(self, stitched: Stitched, chain: Sequence[str]) -> dict[str, Any]:
        """A closed form, or a random map between standardised spaces."""
        sums, facts = self.calibration(stitched)
        began, penalty = time.monotonic(), self.config.train.penalty
        stitched.stitch.start(sums, chain[0] if chain else None, penalty=penalty)
        return {**facts, "seconds": facts["seconds"] + time.monotonic() - began}

    def _match(self, stitched: Stitched, stage: str) -> dict[str, Any]:
        """An objective without labels, in units of each channel's own deviation."""
        objective, cell = OBJECTIVES[stage], stitched.cell
        depth = objective.depth(cell.enter, stitched.target.spec.depth)
        std = self._scale(stitched, objective).to(self.device)

        def loss(rows: Sequence[int]) -> Tensor:
            with self.autocast():
                x, y = self._pair(rows, stitched, depth)
                given = stitched.target.run(stitched.seam(x), cell.enter, depth)
            given, wanted = (objective.picked(stitched.target, tokens) for tokens in (given, y))
            return stitch_loss(given, wanted, std, stitched.stitch)

        return self._train(stitched.stitch, loss, stage, cell)

    def _scale(self, stitched: Stitched, objective: Objective) -> Tensor:
        """Standard deviation ``[D]`` by channel of the target's own patch tokens where an objective compares."""
        depth, last = objective.depth(stitched.cell.enter, stitched.target.spec.depth), stitched.target.spec.depth
        if depth == stitched.cell.enter:
            return self.calibration(stitched)[0].patches.y_std()
        if depth == last:
            return self.statistics(stitched.cell.target)["std"]
        sums, name = ChannelSums(), stitched.cell.target
        for rows in self._parts(self.division.train):
            y = self.store.batch(rows, {name: [depth]}, counted=False)[name, depth]
            sums.update(stitched.target.patches(y).flatten(0, 1))
        return sums.std()

    def _train(self, module: nn.Module, loss: Any, stage: str, cell: Cell | None, what: str = "") -> dict[str, Any]:
        title = f"{what or (cell.key if cell else '')}: {stage}"
        train = self.config.train
        parts = self.division.train, self.division.validation
        self.store.counts.take()
        trained = Trainer(module, loss, *parts, train, train.epochs(stage), self.seed, title, self.show).run()
        return {**trained.to_dict(), "naive_pictures": self.store.counts.take()}

    def head(self, model: str) -> LinearHead:
        """A new head, between the statistics of a model's own features."""
        own, kind = self.statistics(model), self.task.kind
        head = LinearHead(kind, self.models.specs[model].width, len(self.task.classes))
        what = "pooled_" if kind == "classification" else ""
        head.mean.copy_(own[f"{what}mean"])
        head.std.copy_(own[f"{what}std"])
        return head.to(self.device)

    def probed(self, stitched: Stitched) -> tuple[LinearHead, dict[str, Any]]:
        """A linear head trained on the frozen stitched model's features, or read back."""
        cell = replace(stitched.cell, task=self.name)
        name = f"{self.known(cell.source, cell.target)},{cell.key}"
        head, path = self.head(cell.target), self.folder / "heads" / f"{name}.safetensors"
        kept = load_module(path, head)
        if kept is not None:
            return head, kept
        facts = self.train_head(head, lambda rows: stitched.end(stitched.seam(self.states(rows, stitched))), cell.key)
        save_module(path, head, facts)
        return head, facts

    def train_head(self, head: LinearHead, features: Any, title: str) -> dict[str, Any]:
        """Train a head on ``features(rows) [B, N, D]`` of frozen models, each computed once."""
        began, rows = time.monotonic(), [*self.division.train, *self.division.validation]
        self.store.counts.take()
        kept = torch.float32 if self.task.kind == "classification" else torch.float16
        pooled = torch.empty(0)
        with torch.no_grad(), self.autocast():
            done = 0
            for part in self._parts(rows):
                made = head.pool(features(part).float())
                if not done:  # whole at once: a list of parts would need the room twice
                    pooled = torch.empty(len(rows), *made.shape[1:], dtype=kept, device=made.device)
                pooled[done : done + len(part)] = made
                done += len(part)
        place, seen = {row: i for i, row in enumerate(rows)}, self.store.counts.take()

        def loss(rows: Sequence[int]) -> Tensor:
            return head.loss(head(pooled[[place[row] for row in rows]]), self.labels(rows))

        facts = self._train(head, loss, "head", None, title)
        return {**facts, "naive_pictures": seen, "seconds": time.monotonic() - began}

    def task_trained(self, cell: Cell) -> tuple[Stitched, LinearHead, dict[str, Any]]:
        """Stitch and head trained on the task loss, from the stitch of the chain before and its linear probe."""
        stitched, facts = self.stitched(cell.before())
        head, probe = self.probed(stitched)
        stitched.cell = cell

        def loss(rows: Sequence[int]) -> Tensor:
            with self.autocast():
                end = stitched.end(stitched.seam(self.states(rows, stitched)))
            return head.loss(head(head.pool(end.float())), self.labels(rows)) + idle(stitched.stitch)

        both = nn.ModuleList([stitched.stitch, head])
        return stitched, head, {**facts, "head": probe, cell.chain[-1]: self._train(both, loss, cell.chain[-1], cell)}

    def chain(self, cell: Cell) -> tuple[Stitched, LinearHead, dict[str, Any]]:
        """Any chain: its stitch, the head that its score is told with, and facts of each stage."""
        if needs_labels(cell.chain):
            return self.task_trained(cell)
        stitched, facts = self.stitched(cell)
        head, probe = self.probed(stitched)
        return stitched, head, {**facts, "head": probe}


def _short(name: str) -> str:
    """Of a picture: its file and the folder that it is in."""
    return "/".join(Path(name).parts[-2:])
