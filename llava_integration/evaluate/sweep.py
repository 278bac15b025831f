"""The curve that the method promises: scores of trained models against what their towers cost, over the split depth."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_integration.evaluate.first_token import first_token
from llava_integration.evaluate.plot import accuracy_latency_plot
from llava_integration.models.assemble import load
from vst.measure.latency import measure
from vst.models.fields import number, whole
from vst.results.drawing import drawing
from vst.results.finished import ROWS, as_written, read_results
from vst.results.folders import Run
from vst.results.gain import share_of_gain
from vst.results.stopping import Stop, stopping
from vst.results.tables import spread, table
from vst.tree.folder import check_weights
from vst.tree.splits import Split

KINDS = {"one": "single", "full": "full", "vst": "split", "control": "control"}
"""Kind of a row to the kind of a tower in results."""


@dataclass(frozen=True)
class RowConfig:
    """One tower under its language model.

    Attributes:
        kind: one (a single model), full (all models in full), vst (a tree at a split) or control (a self-tree, tokens
            doubled); the first row of kind one and the one of kind full are what gains are measured by.
        model: folder of the trained model; ``{seed}`` stands for the seed.
        split: trunk depth to see at, or one by branch; default: the model's own.
        train: how to train it where the folder holds none: for each stage the words of ``python -m llava_integration
            train``, with ``{seed}``; empty takes what is there.
    """

    kind: str
    model: str
    split: int | dict[str, int] | None = None
    train: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"A row is of kind {self.kind!r}; expected one of {', '.join(KINDS)}.")
        if self.kind == "vst" and self.split is None:
            raise ValueError(f"The row of {self.model} is of kind vst, but names no split; give one.")


def sweep(
    out: str,
    rows: dict[str, RowConfig],
    seeds: list[int] = [0],  # noqa: B006 (never changed)
    tasks: list[str] = ["vst_easy_vqa", "vst_scenes", "vst_labels"],  # noqa: B006
    limit: int | None = None,
    batch_size: int = 4,
    repeats: int = 7,
    gpus: int = 0,
    data: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train or take models, evaluate every task, time every tower, and tell what share of the two-model gain is kept.

    Leaves results.json, curve.png and every row's own scores in out. What was done is kept: --resume goes on with the
    rest. With several GPUs rows are trained and evaluated side by side, one a GPU; times are taken at the end.

    Examples:
        python -m llava_integration sweep --config configs/llava/sweep.yaml
        python -m llava_integration sweep --config configs/llava/sweep.yaml --resume

    Args:
        out: run folder.
        rows: by name.
        seeds: of training; ``{seed}`` in rows.
        tasks: tasks of lmms-eval; those named here have a score between 0 and 1.
        limit: the first questions of each task only.
        batch_size: of the evaluation and of the timing.
        repeats: timed rounds.
        gpus: GPUs to use side by side; 0 runs rows one by one wherever the commands run by themselves.
        data: folder of the local tasks' questions.
        resume: go on with a stopped sweep.
        overwrite: start it again; trained models are taken as they are.
    """
    if not any(row.kind == "one" for row in rows.values()) or sum(row.kind == "full" for row in rows.values()) != 1:
        raise ValueError("A sweep needs at least one row of kind one and exactly one of kind full to measure gains by.")
    _check(rows, seeds, tasks, {"limit": limit, "batch_size": batch_size, "repeats": repeats}, gpus)
    config = {
        "rows": {name: asdict(row) for name, row in rows.items()}, "seeds": seeds, "tasks": tasks, "limit": limit,
        "batch_size": batch_size, "repeats": repeats, "data": data,
    }  # fmt: skip
    run = Run(out, config, resume=resume and Path(out).exists(), overwrite=overwrite)
    if overwrite:
        shutil.rmtree(run.path("scores"), ignore_errors=True)
        run.path("curve.png").unlink(missing_ok=True)
    if not run.path("results.json").is_file():
        job = _Sweep(run, rows, config)
        job.scores(gpus)
        job.times()
        run.finish(job.results())
    results = read_results(run.path("results.json"), "a sweep")
    with as_written(run.path("results.json"), "a sweep"):
        show(results)
    if not (path := run.path("curve.png")).exists():
        with drawing(path):
            accuracy_latency_plot(results, path)
    print(f"results: {run.path('results.json')}, plot: {run.path('curve.png')}")


def _check(
    rows: Mapping[str, RowConfig],
    seeds: Sequence[int],
    tasks: Sequence[str],
    counts: Mapping[str, int | None],
    gpus: int,
) -> None:
    """Refuse before any training what would end it, or have two results pass for one."""
    for name, values in (("seeds", seeds), ("tasks", tasks)):
        if not values:
            raise ValueError(f"{name} is empty; give at least one.")
        if len(set(values)) < len(values):
            raise ValueError(f"{name} is {list(values)}, which names one twice; give each once.")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}, but must be at least 1.")
    if gpus < 0:
        raise ValueError(f"gpus is {gpus}; expected a number of GPUs, or 0.")
    taken: dict[str, str] = {}
    for name, row in rows.items():
        for words in [[row.model], *row.train]:
            for word in words:
                try:
                    word.format(seed=0)
                except (LookupError, ValueError) as error:
                    raise ValueError(
                        f"The row {name!r} has {word!r}, where only {{seed}} is filled in; write other braces twice."
                    ) from error
        if len(seeds) > 1 and row.model.format(seed=0) == row.model.format(seed=1):
            raise ValueError(
                f"The row {name!r} has {len(seeds)} seeds and one model, {row.model}, so that its scores would be one "
                "score many times; put {seed} into the folder's name, or give one seed."
            )
        for seed in seeds:
            if (other := taken.setdefault(_key(name, seed), name)) != name:
                raise ValueError(f"The rows {other!r} and {name!r} would share a file; name one of them otherwise.")


class _Sweep:
    def __init__(self, run: Run, rows: Mapping[str, RowConfig], config: Mapping[str, Any]) -> None:
        self.run, self.rows, self.config = run, rows, config
        self.stop = Stop()

    def scores(self, gpus: int) -> None:
        """Every row at every seed, in processes of their own; the first failure ends the sweep once others ended."""
        wanted = [(n, s) for n in self.rows for s in self.config["seeds"] if not self.run.has(_key(n, s))]
        self._say_plan(wanted, gpus)
        free: queue.Queue[int | None] = queue.Queue()
        for gpu in range(gpus) if gpus else [None]:
            free.put(gpu)

        def one(task: tuple[str, int]) -> None:
            gpu = free.get()
            try:
                if not stop.signal:
                    self._score(*task, gpu)
            except RuntimeError:
                if not stop.signal:  # else that is why the command ended
                    raise
            finally:
                free.put(gpu)

        with stopping() as stop:
            self.stop = stop
            with ThreadPoolExecutor(max(1, gpus)) as pool:
                try:
                    for done in [pool.submit(one, task) for task in wanted]:
                        done.result()
                except KeyboardInterrupt:  # handed on, where the commands were not told by the same Ctrl-C
                    stop.signal = signal.SIGINT
                    raise
            stop.saved = f"in {self.run.folder} what was finished"

    def _say_plan(self, wanted: Sequence[tuple[str, int]], gpus: int) -> None:
        """What is to come, before the first of it begins: it may be days of work."""
        trained = [len(self.rows[n].train) for n, s in wanted if not self._model_file(n, s).is_file()]
        if gpus > 1:
            how = f"{gpus} at a time, each one process on one GPU"
        else:
            how = "one after another, each on one process; --gpus N runs N side by side"
        several = "; to train on several processes, do it before by the launch lines of docs/launch.md, and it is taken"
        print(
            f"{sum(trained)} trainings (of {sum(map(bool, trained))} models) and {len(wanted)} evaluations to do, {how}"
            f"{several if sum(trained) else ''}.",
            flush=True,
        )

    def _model_file(self, name: str, seed: int) -> Path:
        """What says that a row's model is there: a training writes it last."""
        return Path(self.rows[name].model.format(seed=seed)) / "config.json"

    def _score(self, name: str, seed: int, gpu: int | None) -> None:
        row = self.rows[name]
        model = self._model_file(name, seed).parent
        if not self._model_file(name, seed).is_file():
            if not row.train:
                raise FileNotFoundError(f"{model} holds no trained model for {name}; give its folder, or how to train.")
            for words in row.train:
                self._call(["train", *(w.format(seed=seed) for w in words), "--resume"], f"{name}, seed {seed}", gpu)
        check_weights(model)
        scores = self.run.path("scores") / _key(name, seed)
        options = {"model": model, "out": scores, "batch_size": self.config["batch_size"], "seed": seed}
        options |= {k: self.config[k] for k in ("limit", "data") if self.config[k] is not None}
        if row.split is not None:
            options["split"] = row.split
        words = ["evaluate", "--tasks", f"[{','.join(self.config['tasks'])}]"]
        for key, value in options.items():
            words += [f"--{key}", str(value)]
        self._call(words, f"{name}, seed {seed}", gpu)
        path = scores / "results.json"
        with as_written(path, "evaluate"):
            kept = {
                task: {k: v[k] for k in ("score", "metric", "n", "majority", "kinds") if k in v}
                for task, v in read_results(path, "evaluate")["tasks"].items()
            }
            for task, v in kept.items():
                number(v["score"], f"score of {task}")
                whole(v["n"], f"n of {task}", (1, None))
        self.run.add({"row": name, "seed": seed, "tasks": kept}, _key(name, seed))

    def _call(self, words: Sequence[str], title: str, gpu: int | None) -> None:
        print(f"{title}: {words[0]}", flush=True)
        env = dict(os.environ)
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        process, told = subprocess.Popen([sys.executable, "-m", "llava_integration", *words], env=env), False
        while True:
            with suppress(subprocess.TimeoutExpired):
                ended = process.wait(timeout=0.5)
                break
            if self.stop.signal and not told:  # a training saves and ends then
                told = True
                process.send_signal(self.stop.signal)
        if ended == -signal.SIGINT:  # Ctrl-C, which may have come there first
            self.stop.signal = self.stop.signal or signal.SIGINT
        if ended:
            raise RuntimeError(
                f"{title}: python -m llava_integration {' '.join(words)} ended with {ended}; what it printed "
                "says why. What was finished is kept: mend it and call again with --resume."
            )

    def times(self) -> None:
        """Towers in turns, and each one's share of the time to the first token, with the first seed's models."""
        if self.run.has("times"):
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        calls, inside = {}, {}
        for name, row in self.rows.items():
            model, processor = load(row.model.format(seed=self.config["seeds"][0]))
            model.to(device)  # type: ignore[arg-type]
            batch, repeats = self.config["batch_size"], self.config["repeats"]
            inside[name] = first_token(model, processor, split=row.split, batch_size=batch, repeats=repeats)
            tower, side = model.model.vision_tower, processor.image_processor.size["height"]
            pixels = torch.randn(batch, 3, side, side, device=device, dtype=model.dtype)
            calls[name] = _tower(tower, pixels, row.split)
            del model
        full = next(name for name, row in self.rows.items() if row.kind == "full")
        with torch.inference_mode():
            towers = measure(calls, reference=full, repeats=self.config["repeats"], device=device, show_progress=True)
        self.run.add(
            {"times": {n: {**t.to_dict(), **inside[n]} for n, t in towers.items()}, "device": device.type}, "times"
        )

    def results(self) -> dict[str, Any]:
        """Everything in one dict; ``towers`` is what plots and recommendations read."""
        with as_written(self.run.path("rows"), "a sweep", ROWS):
            return self._results(self.run.rows())

    def _results(self, stored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        times = next(r["times"] for r in stored if "times" in r)
        by_row: dict[str, dict[int, dict[str, Any]]] = {}
        for r in stored:
            if "row" in r:
                by_row.setdefault(r["row"], {})[r["seed"]] = r["tasks"]
        one = next(n for n, row in self.rows.items() if row.kind == "one")
        full = next(n for n, row in self.rows.items() if row.kind == "full")
        towers = []
        for name, row in self.rows.items():
            means = {s: statistics.mean(t["score"] for t in tasks.values()) for s, tasks in by_row[name].items()}
            values = list(means.values())
            shares = {}
            for task in self._tasks(by_row):
                scores = {n: {s: t[task]["score"] for s, t in by_row[n].items()} for n in (name, one, full)}
                gain = share_of_gain(scores[name], scores[one], scores[full], noise=self._noise(by_row[one], task))
                shares[task] = {**asdict(gain), "text": str(gain)}
            towers.append(
                {
                    "name": name, "kind": KINDS[row.kind], "split": row.split, "accuracy": statistics.mean(values),
                    "accuracy_spread": statistics.stdev(values) if len(values) > 1 else None,
                    "tasks": {t: {s: v[t]["score"] for s, v in by_row[name].items()} for t in self._tasks(by_row)},
                    "majority": {t: next(iter(by_row[name].values()))[t].get("majority") for t in self._tasks(by_row)},
                    "share": shares, **times[name],
                }
            )  # fmt: skip
        count = len(self.config["seeds"])
        limit = self.config["limit"]
        return {
            "towers": towers,
            "one": one,
            "score": "mean score over tasks, %",
            "caption": f"{', '.join(self.config['tasks'])}; {f'{limit} questions a task, ' if limit else ''}{count} "
            f"seed{'s' if count > 1 else ''}, batch {self.config['batch_size']}",
        }

    def _tasks(self, by_row: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
        return list(next(iter(next(iter(by_row.values())).values())))

    def _noise(self, tasks: Mapping[int, Mapping[str, Any]], task: str) -> float:
        """Two standard errors of a difference of two scores, as if over other questions each: an upper bound."""
        scores = [t[task] for t in tasks.values()]
        p, n = statistics.mean(t["score"] for t in scores), sum(t["n"] for t in scores)
        return 2 * (2 * max(p * (1 - p), 0.0) / n) ** 0.5


def _key(name: str, seed: int) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._+-]', '-', name)}-{seed}"


def _tower(tower: Any, pixels: torch.Tensor, split: Split | None) -> Any:
    return (lambda: tower(pixels)) if split is None else (lambda: tower(pixels, split=split))


def sweep_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table in the paper's form: score by task, extra cost, share of the gain."""
    towers = results["towers"]
    tasks = list(towers[0]["tasks"])
    one = next(r for r in towers if r["name"] == results["one"])
    heads = ["tower", *tasks, "tower time / one", "share of first token"]
    heads += [f"gain kept: {task}" for task in tasks]
    rows = []
    for r in towers:
        scores = [spread(list(r["tasks"][task].values()), 1, 100) for task in tasks]
        cost = [f"{r['ratio'] / one['ratio']:.2f}", f"{100 * r['tower_share']:.0f} %"]
        rows.append([r["name"], *scores, *cost, *(r["share"][task]["text"] for task in tasks)])
    return heads, rows


def show(results: Mapping[str, Any]) -> None:
    """Print the table of :func:`sweep_rows`."""
    heads, rows = sweep_rows(results)
    table("Sweep", heads, rows, results["caption"])
