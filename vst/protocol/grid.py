"""Run the grid: row by row, each saved as it is finished, going on where it was stopped."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vst.fit.objectives import OBJECTIVES
from vst.fit.precision import uses_bf16
from vst.measure.cost import model_cost
from vst.models.fields import checked
from vst.protocol import offline, sources  # noqa: F401 (their tasks are registered)
from vst.protocol.cells import Cell, cells, left_out, work
from vst.protocol.chains import name_of
from vst.protocol.config import ProtocolConfig
from vst.protocol.features import Counts, FeatureStore, Models
from vst.protocol.kept import load_tensors, save_tensors
from vst.protocol.marks import letters
from vst.protocol.measures import cka_map, majority, measure, measure_model, rescues
from vst.protocol.report import write_report
from vst.protocol.seeded_task import SeededTask
from vst.protocol.tasks import Task, draw, make_task
from vst.results.finished import ROWS, as_written
from vst.results.folders import Run, read_json, write_json
from vst.tree.stitches import StitchSpec


def run_protocol(
    folder: str | Path, config: ProtocolConfig, *, overwrite: bool = False, show: bool = True
) -> dict[str, Any]:
    """Run what is missing of the grid, then write results.json, tables, pictures and the page; returns the results.

    The axes of the grid may have grown since the last call; what the rows share may not have changed.

    Args:
        folder: of the run.
        config: see :class:`ProtocolConfig`.
        overwrite: start again; features in the cache are kept.
        show: progress, with time left.

    Raises:
        ValueError: bad data or options, or a folder with a run of other settings.
        LossNotFinite: a row's loss; the rows before it are kept.
    """
    checked(config, ProtocolConfig, "config")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, precision="bf16" if uses_bf16(config.precision, device) else "fp32")
    models = Models(config.models, config.grid, device, pretrained=config.pretrained)
    todo = cells(config, models.specs)
    tasks = {name: make_task(name, task) for name, task in config.tasks.items()}
    folder = Path(folder)
    run = Run(folder, config.settings(), resume=folder.exists() and not overwrite, overwrite=overwrite)
    if overwrite:
        for made in ("stages", "heads", "predictions"):
            for path in (folder / made).glob("*.safetensors"):
                path.unlink()
        for name in ("axes.json", "pushed.json"):
            run.path(name).unlink(missing_ok=True)
    _check_axes(run, config)
    _Grid(run, config, models, tasks, todo, show).fill()
    return write_report(run, config, models.specs)


_AXES = "restore it: it tells which models and tasks the rows are of"


def _check_axes(run: Run, config: ProtocolConfig) -> None:
    """Names keep their meaning: a model's source and a task's settings cannot change once they have rows."""
    path = run.path("axes.json")
    before: dict[str, dict[str, Any]] = {"models": {}, "tasks": {}}
    if path.exists():
        with as_written(path, "vst protocol", _AXES):
            before = checked(read_json(path, _AXES), dict[str, dict[str, Any]], "the whole")
            before = {axis: before[axis] for axis in ("models", "tasks")}
    now: dict[str, dict[str, Any]] = {
        "models": dict(config.models),
        "tasks": {name: vars(task) for name, task in config.tasks.items()},
    }
    rows = run.rows()
    with as_written(run.path("rows"), "vst protocol", ROWS):
        used = {
            "models": {row[end] for row in rows for end in ("model", "source", "target") if end in row},
            "tasks": {row["task"] for row in rows},
        }
    for axis, values in now.items():
        for name, value in values.items():
            if name in used[axis] and name in before[axis] and before[axis][name] != value:
                raise ValueError(
                    f"{run.folder} has rows in which {axis[:-1]} {name!r} is {before[axis][name]}; now it is {value}: "
                    "give it another name, or another out folder."
                )
    write_json(path, {axis: {**before[axis], **values} for axis, values in now.items()})


class _Grid:
    def __init__(
        self,
        run: Run,
        config: ProtocolConfig,
        models: Models,
        tasks: dict[str, Task],
        todo: list[Cell],
        show: bool,
    ) -> None:
        self.run, self.config, self.models, self.tasks, self.todo, self.show = run, config, models, tasks, todo, show
        self.counts = Counts(run.path("pushed.json"))
        self.root = Path(config.cache) if config.cache else run.path("features")
        self.root.mkdir(parents=True, exist_ok=True)
        self._stores: dict[str, FeatureStore] = {}  # by pictures: tasks about the same ones share
        self._by_task: dict[str, FeatureStore] = {}

    def fill(self) -> None:
        """Everything that has no row yet."""
        specs, pictures = self.models.specs, {}
        for cell in self.todo:
            task = self.config.tasks[cell.task]
            pictures[cell] = work(cell, specs, self.config, task.train or 1000)
        left = {cell: w for cell, w in pictures.items() if not self.run.has(cell.key)}
        finished, spent, done = len(self.todo) - len(left), 0.0, 0.0
        self._say(f"{len(self.todo)} rows, {finished} of them finished before")
        if absent := left_out(self.config, specs):
            self._say(f"no rows of what a family cannot do: {'; '.join(absent)}")
        for seed in self.config.seeds:
            for name in self.config.tasks:
                mine = [cell for cell in left if (cell.task, cell.seed) == (name, seed)]
                if not mine and self._baselines_done(name, seed):
                    continue
                seeded = self._seeded(name, seed, mine)
                self._baselines(seeded, compared=bool(mine))
                for cell in mine:
                    began = time.monotonic()
                    row = self._row(seeded, cell)
                    self.run.add(row, cell.key)
                    spent, done, finished = spent + time.monotonic() - began, done + left[cell], finished + 1
                    rest = spent / done * (sum(left.values()) - done)
                    took = time.monotonic() - began
                    self._say(
                        f"[{finished}/{len(self.todo)}] {cell.key}: {row['metric']} {100 * row['score']:.1f} %"
                        f"{letters([row])}, end error {row['end']['error']:.3f}, {took:.0f} s; {_time(rest)} left"
                    )

    def _say(self, text: str) -> None:
        if self.show:
            print(text, file=sys.stderr, flush=True)

    def _used(self) -> list[str]:
        return list(dict.fromkeys(m for d in self.config.directions for m in self.config.ends(d)))

    def _pairs(self) -> list[tuple[str, str]]:
        used = self._used()
        return [(a, b) for i, a in enumerate(used) for b in used[i:]] if self.config.cka_depths else []

    def _baselines_done(self, name: str, seed: int) -> bool:
        keys = [_model_key(name, m, seed) for m in self._used()]
        maps = (_cka_key(name, a, b, seed, self.config.cka_depths) for a, b in self._pairs())
        return all(self.run.has(k) for k in [*keys, *maps])

    def _seeded(self, name: str, seed: int, mine: Sequence[Cell]) -> SeededTask:
        task, config = self.tasks[name], self.config
        store = self._by_task.get(name) or FeatureStore(
            self.root,
            self.models,
            task.pictures,
            config.cut,
            self.counts,
            bf16=config.precision == "bf16",
            limit_gb=config.cache_limit_gb,
            picture_mb=config.picture_mb,
            show=self.show,
        )
        store = self._by_task[name] = self._stores.setdefault(store.fingerprint, store)
        division = draw(name, task, config.tasks[name], seed)
        depths = self._depths(mine)
        learn, title = [*division.train, *division.validation], f"{name}, seed {seed}: features"
        store.ensure(learn, depths, f"{title} to train on")
        mapped = set(division.test[: config.cka_pictures])
        mapping = not all(self.run.has(_cka_key(name, a, b, seed, config.cka_depths)) for a, b in self._pairs())
        wider = {m: sorted({*d, *config.cka_depths}) if mapping else d for m, d in depths.items()}
        store.ensure([r for r in division.test if r in mapped], wider, f"{title} for the map")
        store.ensure([r for r in division.test if r not in mapped], depths, f"{title} to test on")
        division = division.without(set(store.unreadable))
        store.ensure(division.test[: config.cka_pictures], wider, f"{title} for the map")  # in place of unreadable ones
        if store.unreadable:
            self._say(f"{name}: {len(store.unreadable)} pictures cannot be read and are left out")
            reasons = {store.images.name(row): reason for row, reason in store.unreadable.items()}
            write_json(self.run.path(f"unreadable-{name}.json"), reasons)
        for part, rows in vars(division).items():
            if not rows:
                raise ValueError(f"Task {name!r} has no readable {part} pictures; give readable ones.")
        seeded = SeededTask(name, task, division, store, config, self.run.folder, seed, show=self.show)
        known = {r.get("data") for r in self.run.rows() if (r["task"], r["seed"]) == (name, seed)}
        if known - {seeded.data}:
            raise ValueError(
                f"{self.run.folder} has rows of task {name!r}, seed {seed}, that saw other pictures or labels than now "
                "(some were added, renamed or not readable): put them back, or give another out folder."
            )
        return seeded

    def _depths(self, mine: Sequence[Cell]) -> dict[str, list[int]]:
        """All that these rows, and the models alone, read of each model."""
        out: dict[str, set[int]] = {name: {self.models.specs[name].depth} for name in self._used()}
        for cell in mine:
            out[cell.source] |= {*StitchSpec.parse(cell.family).reads(cell.depth)}
            stop = self.models.specs[cell.target].depth
            out[cell.target] |= {cell.enter, *(OBJECTIVES[s].depth(cell.enter, stop) for s in cell.chain)}
        return {name: sorted(depths) for name, depths in out.items()}

    def _baselines(self, seeded: SeededTask, compared: bool) -> None:
        """A linear probe of each model alone, the majority class, and the maps of agreement.

        Args:
            compared: rows are to come that are compared with the models' predictions.
        """
        for name in self._used():
            key = _model_key(seeded.name, name, seeded.seed)
            path = self._predictions(seeded, name)
            if self.run.has(key) and (not compared or load_tensors(path) is not None):
                continue
            began, spec = time.monotonic(), self.models.specs[name]
            head, patches = seeded.head(name), self.models[name].patches
            facts = seeded.train_head(
                head,
                lambda rows, name=name, last=spec.depth, patches=patches: patches(
                    seeded.store.batch(rows, {name: [last]})[name, last]
                ),
                key,
            )
            most_frequent = majority(seeded)
            score, given = measure_model(seeded, name, head)
            save_tensors(path, {"given": given.to(torch.int32)}, {})
            if self.run.has(key):  # a folder of rows alone: its predictions are made again
                self.counts.take()
                continue
            cost = model_cost(spec, self.config.grid, spec.depth)
            row = {"kind": "model", **self._common(seeded), "model": name, "score": score}
            row |= {"metric": _metric(seeded), "majority": most_frequent, "chance": _chance(seeded)}
            row |= {"classes": len(seeded.task.classes), "pictures": _sizes(seeded), "stages": {"head": facts}}
            row |= {"parameters": cost.parameters, "flops": cost.flops, "seconds": time.monotonic() - began}
            row["naive_pictures"] = _sums([facts["naive_pictures"], self.counts.take()])
            self.run.add(row, key)
            self._say(f"{key}: {row['metric']} {100 * score:.1f} % (majority {100 * most_frequent:.1f} %)")
        for a, b in self._pairs():
            key = _cka_key(seeded.name, a, b, seeded.seed, self.config.cka_depths)
            if not self.run.has(key):
                row = {"kind": "cka", **self._common(seeded), "source": a, "target": b}
                row |= {"depths": self.config.cka_depths, "cka": cka_map(seeded, a, b)}
                self.run.add({**row, "naive_pictures": self.counts.take()}, key)

    def _common(self, seeded: SeededTask) -> dict[str, Any]:
        facts = {"task": seeded.name, "seed": seeded.seed, "data": seeded.data}
        return {**facts, "device": self.models.device.type, "precision": self.config.precision}

    def _predictions(self, seeded: SeededTask, model: str) -> Path:
        name = f"{seeded.known(model)},{_model_key(seeded.name, model, seeded.seed)}"
        return self.run.path("predictions") / f"{name}.safetensors"

    def _predicted(self, seeded: SeededTask, model: str) -> Tensor:
        found = load_tensors(path := self._predictions(seeded, model))
        if found is None:
            raise ValueError(f"{path} was whole when this run began and is not now; run again, which makes it anew.")
        return found[0]["given"].long()

    def _row(self, seeded: SeededTask, cell: Cell) -> dict[str, Any]:
        stitched, head, stages = seeded.chain(cell)
        began = time.monotonic()
        self.counts.take()
        measures, given = measure(seeded, stitched, head)
        alone = [self._predicted(seeded, model) for model in (cell.source, cell.target)]
        cost, spec = stitched.cost(), self.models.specs[cell.target]
        return {
            "kind": "stitched",
            **self._common(seeded),
            **{k: v for k, v in vars(cell).items() if k != "chain"},
            "objective": name_of(cell.chain),
            "metric": _metric(seeded),
            **measures,
            **rescues(given, alone[0], alone[1], seeded.test_labels),
            "parameters": cost.parameters,
            "stitch_parameters": sum(p.numel() for p in stitched.stitch.parameters()),
            "head_parameters": (spec.width + 1) * len(seeded.task.classes),
            "flops": cost.flops,
            "stages": stages,
            "seconds": time.monotonic() - began + sum(stage["seconds"] for stage in stages.values()),
            "naive_pictures": _sums([self.counts.take(), *(stage["naive_pictures"] for stage in stages.values())]),
        }


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """Of what one row would push on its own: every stage that it stands on is its own in a naive grid."""
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))


def _chance(seeded: SeededTask) -> float | None:
    """Of guessing evenly; mIoU has no such number that is independent of the masks."""
    return 1 / len(seeded.task.classes) if seeded.task.kind == "classification" else None


def _metric(seeded: SeededTask) -> str:
    return "accuracy" if seeded.task.kind == "classification" else "mIoU"


def _sizes(seeded: SeededTask) -> dict[str, int]:
    return {part: len(rows) for part, rows in vars(seeded.division).items()}


def _model_key(task: str, model: str, seed: int) -> str:
    return f"{task},{model},alone,seed{seed}"


def _cka_key(task: str, a: str, b: str, seed: int, depths: Sequence[int]) -> str:
    return f"{task},{a}-and-{b},cka{'-'.join(map(str, depths))},seed{seed}"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
