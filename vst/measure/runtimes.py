"""One call of a tree in every way that a machine can run it, side by side: which of them to use there."""

from __future__ import annotations

import contextlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vst.export.programs import alone_at, export_tree, onnx_runner
from vst.fit.heldout import check_tree
from vst.fit.precision import usable_device
from vst.measure.benchmark import RoundsConfig, run_in
from vst.measure.execution import CAPTURED, EXECUTIONS, runner
from vst.measure.latency import latency_of, timed_rounds
from vst.models.fields import checked
from vst.results.finished import ROWS, as_written
from vst.results.progress import progress
from vst.tree.encoder import VSTEncoder
from vst.tree.splits import Split, split_label

FOLDED, ONNXRUNTIME = "folded", "onnxruntime"
_CAUGHT = (RuntimeError, ValueError, ImportError, OSError)  # what a way that a machine lacks raises at its first call


def ways(device: str) -> list[str]:
    """Ways of a device: ``eager``, ``folded``, executions of :mod:`vst.measure.execution`, onnxruntime on a CPU.

    All but the first run with the stitches' standardisation folded into their linear layers.
    """
    on_gpu = torch.device(device).type == "cuda"
    held = [e for e in EXECUTIONS if e not in ("eager", "streams") and (on_gpu or e not in CAPTURED)]
    return ["eager", FOLDED, *held, *([] if on_gpu else [ONNXRUNTIME])]


def measure_runtimes(
    tree: VSTEncoder,
    split: Split | None = None,
    *,
    batch_size: int = 1,
    dtypes: list[str] | None = None,
    repeats: int = 15,
    device: str = "auto",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Time a tree at one split in every way, one after another round by round.

    Args:
        tree: which; it stays as and where it is.
        split: one for all branches, one by branch name, or None for the tree's own.
        batch_size: pictures a call.
        dtypes: default: float32; onnxruntime is measured in float32 alone.
        repeats: counted rounds.
        device: of every way.
        show_progress: bars over what has to be prepared, and over the rounds.

    Returns:
        ``split`` (its label), ``batch_size``, ``device``, ``left_out`` (ways that cannot be run here: name to reason)
        and ``rows``: ``way``, ``dtype``, the fields of :class:`vst.measure.latency.Latency` (milliseconds, and ratios
        to eager in the first dtype in the same rounds), ``images_per_s``, ``prepare_s`` (seconds of the first call,
        with all that is made for it, such as compiled code or the exported file), ``difference`` (norm of the
        difference of the tokens from the reference's, over their norm).

    Raises:
        ValueError: bad options, or a device that is not there.
    """
    check_tree(tree, "measure_runtimes")
    config = RoundsConfig([batch_size], ["float32"] if dtypes is None else dtypes, repeats, device)
    where = usable_device(config.device)
    chosen = tree.config.resolve(split)
    pixels = torch.randn(batch_size, 3, tree.image_size, tree.image_size, generator=torch.Generator().manual_seed(0))
    wanted = [
        (way, dtype) for dtype in config.dtypes for way in ways(where) if way != ONNXRUNTIME or dtype == "float32"
    ]
    calls: dict[str, Callable[[], Tensor]] = {}
    made: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    reference: Tensor | None = None
    with contextlib.ExitStack() as stack, torch.no_grad():
        bar = stack.enter_context(progress("runtimes", len(wanted), show_progress))
        for way, dtype in wanted:
            name, began = f"{way}, {dtype}", time.perf_counter()
            try:
                call = stack.enter_context(_call(way, tree, chosen, pixels, getattr(torch, dtype), where))
                tokens = call().float().cpu()
            except _CAUGHT as error:
                if reference is None:  # without what all is compared with there is nothing to tell
                    raise
                told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                left_out[name] = re.sub(r"(/[^\s/'\"]+)+/", ".../", told)  # a result names no folder of a machine
                continue
            finally:
                bar.step(name)
            reference = tokens if reference is None else reference
            off = float((tokens - reference).norm() / reference.norm().clamp_min(1e-30))
            made[name] = {"way": way, "dtype": dtype, "prepare_s": time.perf_counter() - began, "difference": off}
            calls[name] = call
        times = timed_rounds(calls, repeats=repeats, device=where, show_progress=show_progress, title="runtimes")
    first, rows = next(iter(times.values())), []
    for name, own in times.items():
        found = latency_of(own, first)
        rows.append({**made[name], **found.to_dict(), "images_per_s": batch_size / found.median_ms * 1e3})
    label = split_label(chosen if len(set(chosen.values())) > 1 else next(iter(chosen.values())))
    return {"split": label, "batch_size": batch_size, "device": where, "rows": rows, "left_out": left_out}


@contextlib.contextmanager
def _call(
    way: str, tree: VSTEncoder, chosen: dict[str, int], pixels: Tensor, dtype: torch.dtype, device: str
) -> Iterator[Callable[[], Tensor]]:
    """A call of the tree in one way, which may need files for as long as it is called."""
    part = alone_at(tree, chosen, fold=way != "eager").eval().to(dtype)  # folded before a cast to fewer digits
    if way == ONNXRUNTIME:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "onnx"
            export_tree(part.cpu(), out, split=chosen, fold=False, show_progress=False)
            run = onnx_runner(out / "tree.onnx", threads=torch.get_num_threads())
            yield lambda: run(pixels)[0]
        return
    own = pixels.to(device, dtype)
    call = runner(part.to(device), "eager" if way == FOLDED else way)
    yield lambda: call(own)


def compare_runtimes(
    tree: VSTEncoder,
    config: RoundsConfig,
    split: Split | None = None,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """:func:`measure_runtimes` for every batch size; with a folder, leave results.json in it.

    Args:
        tree: which.
        config: what is measured; the first dtype's eager call is the reference.
        split: as of :func:`measure_runtimes`.
        folder: run folder; None keeps nothing.
        resume: go on with a stopped run: batch sizes that were measured are not measured again.
        overwrite: replace the run in the folder.
        show_progress: bars.

    Raises:
        ValueError: bad options, or a device that is not there.
    """
    check_tree(tree, "compare_runtimes")
    checked(config, RoundsConfig, "config")
    device = usable_device(config.device)
    facts = {"tree": tree.config.to_dict(), "at": tree.config.resolve(split), **asdict(config), "device": device}
    run = run_in(folder, facts, device, resume=resume, overwrite=overwrite)
    results = []
    for batch in config.batch_sizes:
        key = f"batch{batch}"
        if run is not None and run.has(key):
            with as_written(run.path("rows"), "vst runtimes", ROWS):
                results.append(next(r["found"] for r in run.rows() if r["key"] == key))
            continue
        found = measure_runtimes(
            tree, split, batch_size=batch, dtypes=config.dtypes, repeats=config.repeats, device=device,
            show_progress=show_progress,
        )  # fmt: skip
        if run is not None:
            run.add({"key": key, "found": found}, key)
        results.append(found)
    if run is not None:
        run.finish({"runtimes": results})
    return results
