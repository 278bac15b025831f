"""``python -m llava_integration evaluate`` and ``tasks``, and ``eval/lmms.py``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llava_integration.evaluate.lmms import questions
from llava_integration.evaluate.lmms.evaluation import evaluate as run
from llava_integration.evaluate.lmms.suites import SUITES
from vst.results.finished import as_written, read_results
from vst.results.folders import Run, write_json
from vst.results.locks import LOCK


def evaluate(
    model: str,
    out: str,
    suite: str | None = None,
    tasks: list[str] | None = None,
    split: int | dict[str, int] | None = None,
    limit: int | None = None,
    batch_size: int = 4,
    blank: bool = False,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    max_new_tokens: int = 128,
    gen_kwargs: str | None = None,
    data: str | None = None,
    include: str | None = None,
    overwrite: bool = False,
) -> None:
    """Evaluate a trained model with lmms-eval; ends with an error unless every task has a score.

    The suite local (easy-VQA, emoji scenes, reading a label) needs no network; its questions are written once to
    $VST_TASKS, by default below $VST_HOME. The suite paper is VQAv2, MME, GQA, TextVQA without and with OCR hints, POPE
    and MMVP, whose data lmms-eval takes from the Hugging Face hub.

    Examples:
        python -m llava_integration evaluate --model runs/llava-demo --out runs/scores
        python -m llava_integration evaluate --model runs/llava-demo --out runs/blind --blank true --limit 200
        python eval/lmms.py --model runs/llava-7b --suite paper --batch_size 16 --out runs/llava-7b-paper
        python eval/lmms.py --model runs/llava-7b --split 14 --tasks '[mme,pope]' --out runs/llava-7b-14

    Args:
        model: folder of a trained model.
        out: run folder: config, environment, results.json, samples/TASK.json; one that is complete is only shown.
        suite: local or paper; default: local, unless tasks are given.
        tasks: tasks of lmms-eval, in place of a suite: names, groups, tags or patterns with *.
        split: trunk depth to see at, or one by branch; default: the model's own.
        limit: the first questions of each task only.
        batch_size: requests in one call of the model.
        blank: put the mean colour in place of every picture; what is still right was known without looking.
        seed: of everything that lmms-eval seeds.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the weights: auto (as saved), float32, bfloat16 or float16.
        max_new_tokens: longest answer, for tasks that name none.
        gen_kwargs: generation options over the tasks' own (max_new_tokens=16,temperature=0).
        data: folder of the local tasks' questions.
        include: folder of more task files of lmms-eval.
        overwrite: start the run in out again.
    """
    if suite is not None and tasks is not None:
        raise ValueError("Both suite and tasks are given, but a suite is a list of tasks; give one of them.")
    if suite is not None and suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; expected one of {', '.join(SUITES)}.")
    chosen = list(SUITES[suite or "local"]) if tasks is None else tasks
    options: dict[str, Any] = {"split": split, "blank": blank, "device": device, "dtype": dtype}
    options |= {"limit": limit, "batch_size": batch_size, "seed": seed, "max_new_tokens": max_new_tokens}
    options |= {"gen_kwargs": gen_kwargs, "include": include}
    folder = Path(out)
    config = {"model": model, "tasks": chosen, **options}
    fresh = not folder.is_dir() or not any(path.name != LOCK for path in folder.iterdir())
    flags: dict[str, Any] = {"resume": folder.exists() and not overwrite, "overwrite": overwrite}
    kept = Run(folder, config, **flags, device=None if device == "auto" else device)
    if (folder / "results.json").is_file():
        print(f"{out} is complete; showing what is there (--overwrite starts again).")
        with as_written(folder / "results.json", "evaluate"):
            show(read_results(folder / "results.json", "evaluate"))
        return
    shutil.rmtree(folder / "samples", ignore_errors=True)
    try:
        results = run(model, chosen, data=data, output=folder, **options)
    except BaseException:
        kept.close()
        if fresh:  # what failed leaves no run, so that the next try may have other options
            for name in ("run.json", "environment.json"):
                (folder / name).unlink(missing_ok=True)
        raise
    for task, samples in results.pop("samples").items():
        write_json(folder / "samples" / f"{task}.json", samples)
    kept.finish(results)
    show(results)
    print(f"results: {folder / 'results.json'}, every answer: {folder / 'samples'}")


def tasks(out: str | None = None, count: int = questions.COUNT, overwrite: bool = False) -> None:
    """Write the questions of the local tasks for lmms-eval, and tell how its own command line finds them.

    Examples:
        python -m llava_integration tasks
        python -m llava_integration tasks --out questions --count 100

    Args:
        out: where to; default: $VST_TASKS, else below $VST_HOME.
        count: questions a task.
        overwrite: replace questions of another number.
    """
    folder = questions.write(None if out is None else Path(out), count, overwrite=overwrite)
    found = "" if out is None else f"VST_TASKS={folder} "
    names = ",".join(questions.DATASETS)
    print(f"{count} questions a task in {folder}; for example:")
    print(
        f"{found}python -m lmms_eval --model vst_llava --model_args pretrained=FOLDER --batch_size 4 "
        f"--include_path {questions.TASKS} --tasks {names} --output_path logs"
    )


def show(results: dict[str, Any]) -> None:
    """Print the scores as a table."""
    from vst.results.tables import table

    rows = []
    for name, task in results["tasks"].items():
        rows.append((name, task["metric"], str(task["n"]), _number(task["score"]), _number(task.get("majority"))))
        if len(kinds := task.get("kinds", {})) > 1:
            for kind, own in kinds.items():
                rows.append(("", kind, str(own["n"]), _number(own["accuracy"]), _number(own["majority"])))
    model = results["model"]
    caption = f"{model.get('pretrained')}, split {model.get('split')}" + (", blanked" if model.get("blank") else "")
    table("Scores", ["task", "metric or kind", "questions", "score", "most frequent answer"], rows, caption)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
