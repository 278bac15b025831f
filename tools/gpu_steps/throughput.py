"""Steps of a fit of the ViT-L pair, with and without recomputed activations, and how many cores feed them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gpu_steps.towers import plan, random_tree
from gpu_steps.work import Work
from vst.fit.teacher import transforms
from vst.measure.matmul import matmul_rate
from vst.measure.reading import measure_reading
from vst.measure.tables import LLAVA_PICTURES, throughput_notes, throughput_rows
from vst.measure.throughput import ONE_PASS, measure_fit
from vst.results.folders import Run, atomic_path
from vst.results.tables import markdown
from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder

_SPLITS = [2, 6, 10, 14, 18, 22]
_KINDS = {"kept": False, "recomputed": True}


def run(work: Work) -> str:
    """Measure what was not measured yet."""
    splits = [6, 22] if work.dry else _SPLITS
    options = {"batch_size": 2 if work.dry else 32, "repeats": 1 if work.dry else 7}
    config = plan("pair", 4 if work.dry else 16, splits, work.dry)
    facts = {"dry": work.dry, "splits": splits, "tokens": config.grid**2, **options, "precision": "bf16"}
    run = Run(work.out, facts, resume=(work.out / "run.json").is_file(), device=work.device)
    parts = {kind: partial(_fit, run, work, config, kind, options) for kind in _KINDS if not run.has(kind)}
    if not run.has("reading"):
        parts["reading"] = partial(_reading, run, work, config)
    try:
        work.attempt(parts)
    finally:
        told = _write(run)
        work.say(told)
    return told


def _fit(run: Run, work: Work, config: VSTConfig, kind: str, options: dict[str, int]) -> None:
    side = 256 if work.dry else None
    before = matmul_rate(work.device, torch.bfloat16, side=side)
    tree = random_tree(config, work.device, torch.float32)  # as a fit holds it; its steps run under bf16 autocast
    found = measure_fit(tree, device=work.device, bf16=True, checkpointing=_KINDS[kind], show_progress=False, **options)  # type: ignore[arg-type]
    best = max(before, matmul_rate(work.device, torch.bfloat16, side=side)) / 1e12
    for row in found["rows"]:
        row["tflops_per_s"] = row["gflops"] / row["median_ms"]
        row["mfu"] = row["tflops_per_s"] / best
    run.add({"checkpointing": _KINDS[kind], "matmul_tflops": best, "fit": found}, kind)


def _reading(run: Run, work: Work, config: VSTConfig) -> None:
    folder = work.scratch / "pictures"
    make_pictures(folder, 16 if work.dry else 256)
    tree = VSTEncoder.skeleton(config)  # its preparations are asked for, not its weights
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = [
        measure_reading(folder, transforms(tree), workers=workers, batch_size=4 if work.dry else 16)
        for workers in dict.fromkeys((1, min(16, cores)))
    ]
    run.add({"pictures": "JPEG, 500 x 375, quality 90", "cores": cores, "reading": found}, "reading")


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs of the size of photographs, of blurred and fine noise, some 90 kB each; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
        fine = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (375, 500, 1), dtype=np.int16)
        path = folder / f"{number:04d}.jpg"
        if not path.exists():
            with atomic_path(path) as temporary:
                Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(temporary, "JPEG", quality=90)


def _write(run: Run) -> str:
    """The results so far, as JSON and as tables; the outcome in a line."""
    rows = run.rows()
    fits = {"recomputed" if row["checkpointing"] else "kept": row for row in rows if "fit" in row}
    reading: list[dict[str, Any]] = next((row["reading"] for row in rows if "reading" in row), [])
    results: dict[str, Any] = {"fits": list(fits.values()), "reading": reading}
    parts, told = [], []
    for kind, row in fits.items():
        found = row["fit"]
        heads, table = throughput_rows(found, LLAVA_PICTURES)
        rated = [
            [*line, f"{r['tflops_per_s']:.1f}", f"{100 * r['mfu']:.1f} %"]
            for line, r in zip(table, found["rows"], strict=True)
        ]
        parts += [f"Activations {kind}, batch {found['batch_size']}:", markdown([*heads, "TFLOP/s", "MFU"], rated)]
        parts.append(throughput_notes(found))
        first = next(r for r in found["rows"] if r["name"] == ONE_PASS)
        told.append(f"{first['pictures_per_s']:.1f} pictures/s with activations {kind}, MFU {100 * first['mfu']:.0f} %")
    if reading:
        lines = [
            [str(r["workers"]), f"{r['pictures_per_s']:.0f}", f"{r['pictures_per_s_per_worker']:.0f}"] for r in reading
        ]
        parts += ["Reading:", markdown(["workers", "pictures/s", "pictures/s a worker"], lines)]
    if reading and fits:
        fastest = max(r["pictures_per_s"] for row in fits.values() for r in row["fit"]["rows"] if r["name"] == ONE_PASS)
        results["cores_that_feed_it"] = fastest / reading[-1]["pictures_per_s_per_worker"]
        told.append(f"{results['cores_that_feed_it']:.1f} cores feed it")
        parts.append(
            f"A fit in one pass at {fastest:.1f} pictures/s is fed by {results['cores_that_feed_it']:.1f} cores."
        )
    run.finish(results)
    with atomic_path(run.path("tables.md")) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return "; ".join(told) or "nothing was measured"
