"""Latency of trees of ViT-L beside their models in full, by tokens, batch and execution: the telling ones first."""

from __future__ import annotations

import gc
import traceback
from itertools import product
from typing import Any, NamedTuple

import torch

from gpu_steps.goals import judged, lines
from gpu_steps.towers import plan, random_full, random_tree
from gpu_steps.work import Incomplete, Work, sentence
from vst.measure.latency import measure_tree
from vst.measure.matmul import matmul_rate
from vst.measure.tables import latency_rows
from vst.results.folders import Run, atomic_path
from vst.results.tables import markdown

_REPEATS = {1: 41, 8: 31, 32: 15, 128: 9}
_SPLITS = [6, 14, 22]


class Cell(NamedTuple):
    """One measurement: towers that are timed round by round against all models in full, eager."""

    tree: str
    grid: int
    batch: int
    execution: str

    @property
    def key(self) -> str:
        """Of its row."""
        return f"{self.tree}-{self.grid**2}tokens-batch{self.batch}-{self.execution}"


def cells(dry: bool, device: str) -> list[Cell]:
    """What is measured, in order: a time limit cuts the end off."""
    if dry:
        ways = ("eager", "graphs", "compiled-graphs") if device == "cuda" else ("eager", "streams")
        return [Cell("pair", 4, batch, way) for batch, way in product((1, 2), ways)] + [Cell("four", 4, 1, ways[0])]
    grids, ways = (16, 24), ("eager", "graphs", "compile", "compiled-graphs")
    parts = [
        product(["pair"], grids, (32, 1), ways[:2]),
        product(["pair"], grids, (128,), ways[:1]),
        product(["four"], grids, (32, 1), ways[:2]),
        product(["pair"], grids, (32, 1), ways[2:]),
        product(["pair", "four"], grids, (32, 1, 128, 8), ways),
    ]
    return list(dict.fromkeys(Cell(*cell) for part in parts for cell in part))


def run(work: Work) -> str:
    """Measure what was not measured yet."""
    dtype, wanted = torch.bfloat16, cells(work.dry, work.device)
    config = {"dry": work.dry, "dtype": "bfloat16", "splits": _SPLITS, "repeats": {} if work.dry else _REPEATS}
    run = Run(work.out, config, resume=(work.out / "run.json").is_file(), device=work.device)
    failed: dict[str, str] = {}
    towers: dict[str, Any] = {}
    at = None
    side = 256 if work.dry else None
    _rate(run, work, dtype, side)
    for cell in (c for c in wanted if not run.has(c.key)):
        if (cell.tree, cell.grid) != at:
            towers.clear()
            _let_go(work)
            at, config_of = (cell.tree, cell.grid), plan(cell.tree, cell.grid, _SPLITS, work.dry)
            towers = {"tree": random_tree(config_of, work.device, dtype).fold()}  # as one serves it
            towers["full"] = random_full(config_of, work.device, dtype)
        try:
            rows = measure_tree(
                **towers, batch_size=cell.batch, repeats=3 if work.dry else _REPEATS[cell.batch], device=work.device,
                dtype=dtype, execution=cell.execution, show_progress=False,
            )  # fmt: skip
            run.add({**cell._asdict(), "tokens": cell.grid**2, "towers": rows}, cell.key)
        except Exception as error:  # such as memory that is not enough for this one
            traceback.print_exc()
            failed[cell.key] = sentence(error)
        if cell.execution != "compile":
            torch.compiler.reset()  # what one cell compiled is used by the next one alone, of the same shapes
        _let_go(work)
        _write(run, failed)
        work.say(f"{sum(run.has(c.key) for c in wanted)} of {len(wanted)} measured; last: {cell.key}")
    _rate(run, work, dtype, side)
    best, goals = _write(run, failed)
    told = f"{len(wanted) - len(failed)} of {len(wanted)} measured; matrix products reach {best:.1f} TFLOP/s"
    if goals:
        told += f"; {sum(goal['reached'] for goal in goals)} of {len(goals)} goals reached"
    if failed:
        raise Incomplete("; ".join([told, *(f"{key}: {why}" for key, why in failed.items())]))
    return told


def with_rates(rows: list[dict[str, Any]], best: float) -> list[dict[str, Any]]:
    """Rows of ``measure_tree`` with ``tflops_per_s`` and ``mfu``, its share of ``best`` (TFLOP/s)."""
    return [{**r, "tflops_per_s": r["gflops_per_s"] / 1e3, "mfu": r["gflops_per_s"] / 1e3 / best} for r in rows]


def _rate(run: Run, work: Work, dtype: torch.dtype, side: int | None) -> None:
    """Before and after all else: a machine's clocks may differ between the two."""
    number = sum("matmul_tflops" in row for row in run.rows())
    found = matmul_rate(work.device, dtype, side=side, repeats=3 if work.dry else 20) / 1e12
    run.add({"matmul_tflops": found}, f"matmul-{number}")


def _write(run: Run, failed: dict[str, str]) -> tuple[float, list[dict[str, Any]]]:
    """The results so far, as JSON and as tables; the matrix product's TFLOP/s, and the goals."""
    rows = run.rows()
    rates = [row["matmul_tflops"] for row in rows if "matmul_tflops" in row]
    found = [{**row, "towers": with_rates(row["towers"], max(rates))} for row in rows if "towers" in row]
    goals = judged(found, max(rates))
    run.finish({"matmul_tflops": rates, "cells": found, "failed": failed, "goals": goals})
    parts = [f"A bf16 matrix product reaches {max(rates):.1f} TFLOP/s here; MFU is over that."]
    if goals:
        parts.append(markdown(["goal", "found", "bound", "reached"], lines(goals)))
    for cell in found:
        heads, table = latency_rows(cell["towers"])
        rated = [
            [*line, f"{r['tflops_per_s']:.1f}", f"{100 * r['mfu']:.1f} %"]
            for line, r in zip(table, cell["towers"], strict=True)
        ]
        title = f"{cell['tree']}, {cell['tokens']} tokens, batch {cell['batch']}, {cell['execution']}:"
        parts += [title, markdown([*heads, "TFLOP/s", "MFU"], rated)]
    with atomic_path(run.path("tables.md")) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return max(rates), goals


def _let_go(work: Work) -> None:
    gc.collect()
    if work.device == "cuda":
        torch.cuda.empty_cache()
