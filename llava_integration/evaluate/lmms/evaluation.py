"""Evaluate a model on lmms-eval's tasks from Python: scores or an error, never a failure that looks like a success."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_integration.answer.ask import Question
from llava_integration.answer.scoring import majority
from llava_integration.evaluate.lmms.questions import DATASETS, write, written
from llava_integration.evaluate.lmms.suites import manager
from vst.models.fields import whole


class EvaluationFailed(RuntimeError):
    """lmms-eval stopped, or left a task without a score."""


def evaluate(
    model: str | Path | Any,
    tasks: Sequence[str] = tuple(DATASETS),
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    data: str | Path | None = None,
    include: str | None = None,
    gen_kwargs: str | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks of lmms-eval.

    Questions of local tasks are written where they are missing
    (:func:`llava_integration.evaluate.lmms.questions.write`).

    Args:
        model: folder of a trained model, or a model object of lmms-eval.
        tasks: names, groups, tags or patterns with ``*``.
        limit: the first questions of each task only.
        seed: of everything that lmms-eval seeds.
        batch_size: requests in one call of the model.
        data: folder of the local tasks' questions; default: ``$VST_TASKS`` or below ``$VST_HOME``.
        include: folder of more task files.
        gen_kwargs: generation options over the tasks' own, such as ``max_new_tokens=16,until=.``.
        output: folder for files that tasks write by themselves (submissions); default: the working folder's ``logs``.
        options: of :class:`llava_integration.evaluate.lmms.model.VSTLlava` (``split``, ``device``, ``dtype``,
            ``blank``, ``max_new_tokens``, ``show``); only for a folder.

    Returns:
        For JSON: ``tasks``, by name ``score`` (its first metric, named by ``metric``), ``n``, ``metrics``, ``stderr``
        and for local tasks ``majority`` (the score of the most frequent answer to each kind), ``pictures`` and
        ``kinds``; ``model``, the record of :func:`llava_integration.evaluate.lmms.record.describe`; ``settings``:
        lmms-eval's config, generation options and versions of tasks; ``samples``, by task one entry a question with
        ``id``, ``answer``, ``target`` and its metrics, in local tasks also ``question``, ``kind`` and ``picture``.

    Raises:
        EvaluationFailed: lmms-eval failed, or a task has no score or not as many answers as questions.
        ValueError: an unknown task or option.
        FileNotFoundError: the folder holds no model.
        ImportError: lmms-eval is not installed.
    """
    try:
        from lmms_eval.evaluator import simple_evaluate
    except ImportError as error:
        raise ImportError(f'Evaluation needs lmms-eval ({error}): pip install "vfm-stitch-tree[lmms]".') from error
    limit = None if limit is None else whole(limit, "limit", (1, None))
    batch_size = whole(batch_size, "batch_size", (1, None))
    if not tasks:
        raise ValueError("No task is named; give at least one.")
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(f"tasks is {tasks!r}, but must be a list of names.")
    if include is not None and not Path(include).is_dir():
        raise FileNotFoundError(f"There is no folder of task files {include}; give one, or none (include).")
    index = manager(tasks, include)
    chosen = sorted(index.match_tasks(list(tasks)))
    lm = _model(model, batch_size, options)
    with _questions_in(data, _local(index, chosen)):
        try:
            found = simple_evaluate(
                model=lm,
                tasks=chosen,
                task_manager=index,
                batch_size=batch_size,
                limit=limit,
                gen_kwargs=gen_kwargs,
                log_samples=True,
                bootstrap_iters=0,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                # What tasks ask of lmms-eval's command line.
                cli_args=Namespace(
                    output_path=str(output or "logs"), process_with_media=False, reasoning_tags=None, tasks=chosen
                ),
            )
        except Exception as error:
            raise EvaluationFailed(f"lmms-eval failed on {', '.join(chosen)}: {_cause(error)}") from error
    return _results(found, getattr(lm, "record", {"model": type(lm).__name__}), limit, list(tasks))


def _model(model: Any, batch_size: int, options: Mapping[str, Any]) -> Any:
    from lmms_eval.api.model import lmms

    if isinstance(model, lmms):
        if options:
            raise ValueError(f"{min(options)} is given, but the model is loaded already; give its folder instead.")
        return model
    from llava_integration.evaluate.lmms.model import VSTLlava

    return VSTLlava(str(model), batch_size=batch_size, **options)


def _local(index: Any, names: Sequence[str]) -> set[str]:
    """The local tasks among names, groups and tags."""
    out = {name for name in names if name in DATASETS}
    for name in names:
        members = index.task_index[name].get("task")
        out |= {task for task in members if task in DATASETS} if isinstance(members, list) else set()
    return out


@contextmanager
def _questions_in(data: str | Path | None, tasks: set[str]) -> Iterator[None]:
    """Write what is missing of local tasks' questions, and let the task files find them."""
    before = os.environ.get("VST_TASKS")
    if data is not None:
        os.environ["VST_TASKS"] = str(data)
    try:
        if missing := [task for task in sorted(tasks) if not written(task)]:
            write(tasks=missing)
        yield
    finally:
        if data is not None:
            if before is None:
                del os.environ["VST_TASKS"]
            else:
                os.environ["VST_TASKS"] = before


def _cause(error: BaseException) -> str:
    """The error under tenacity's, which lmms-eval retries with, in one line."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None and attempt.exception() is not None:
        return _cause(attempt.exception())
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:600]}" if text else type(error).__name__


def _results(
    found: dict[str, Any] | None, record: Mapping[str, Any], limit: int | None, order: Sequence[str]
) -> dict[str, Any]:
    if not found or not found.get("samples"):
        raise EvaluationFailed("lmms-eval came back without results.")
    tasks, samples = {}, {}
    for name in sorted(found["samples"], key=lambda name: order.index(name) if name in order else len(order)):
        logged = found["samples"][name]
        whole = found["n-samples"][name]["original"]
        expected = whole if limit is None else min(limit, whole)
        answered = sum(all(entry["resps"]) for entry in logged)  # a request without an answer has an empty list
        if answered != expected:
            raise EvaluationFailed(f"{name} has answers to {answered} of {expected} questions.")
        tasks[name] = _scores(name, found["results"].get(name, {}), found["configs"][name], len(logged))
        samples[name] = [_sample(entry) for entry in logged]
        if name in DATASETS:
            tasks[name] |= _by_kind(samples[name])
    config = {k: v for k, v in found["config"].items() if k != "resolved_cli_args"}
    generation = {name: found["configs"][name].get("generation_kwargs") for name in tasks}
    settings = {"config": config, "generation_kwargs": generation, "versions": found["versions"]}
    return {"tasks": tasks, "model": dict(record), "settings": settings, "samples": samples}


def _scores(name: str, results: Mapping[str, Any], config: Mapping[str, Any], n: int) -> dict[str, Any]:
    metrics, stderr = {}, {}
    for key, value in results.items():
        metric = key.partition(",")[0]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or "," not in key:
            continue
        if metric.endswith("_stderr_clt"):
            stderr[metric.removesuffix("_stderr_clt")] = float(value)
        elif "_stderr" not in metric:
            metrics[metric] = float(value)
    wanted = [entry["metric"] for entry in config.get("metric_list") or [] if isinstance(entry["metric"], str)]
    main = next((metric for metric in [*wanted, *metrics] if metric in metrics), None)
    if main is None or not all(math.isfinite(value) for value in metrics.values()):
        raise EvaluationFailed(f"{name} ended without a score; lmms-eval gave {dict(results)}.")
    return {"score": metrics[main], "metric": main, "n": n, "metrics": metrics, "stderr": stderr}


def _sample(entry: Mapping[str, Any]) -> dict[str, Any]:
    answer = entry["filtered_resps"]
    out = {"id": entry["doc_id"], "answer": answer[0] if len(answer) == 1 else answer, "target": entry["target"]}
    doc = entry["doc"]
    out |= {key: doc[key] for key in ("question", "kind", "picture") if isinstance(doc.get(key), str)}
    standard = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash"}
    return out | {k: v for k, v in entry.items() if k not in standard and isinstance(v, (int, float))}


def _by_kind(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    questions = [Question(Path(s["picture"]), s["question"], s["target"], s["kind"]) for s in samples]
    often, best = majority(questions)
    kinds = {}
    for kind, answer in best.items():
        rows = [i for i, s in enumerate(samples) if s["kind"] == kind]
        kinds[kind] = {
            "n": len(rows),
            "accuracy": sum(samples[i]["exact_match"] for i in rows) / len(rows),
            "majority": float(often[rows].mean()),
            "majority_answer": answer,
        }
    return {"majority": float(often.mean()), "pictures": len({q.image for q in questions}), "kinds": kinds}
