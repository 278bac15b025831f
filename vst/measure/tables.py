"""What measured times look like: tables of latency, of a fit's steps, and of more processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vst.results.tables import markdown, table

LLAVA_PICTURES = 558_000  # of LLaVA-1.5's first stage
HeadsAndCells = tuple[list[str], list[list[str]]]


def latency_rows(rows: Sequence[Mapping[str, Any]]) -> HeadsAndCells:
    """Headings and cells of rows of ``vst.measure.latency.measure_tree``; intervals hold the true median with 95 %."""
    heads = [
        "tower", "median ms", "time / all in full (95 %)", "FLOPs / all in full", "time over FLOPs", "pictures/s",
        "GFLOP/s", "peak MB",
    ]  # fmt: skip
    return heads, [
        [
            r["name"],
            f"{r['median_ms']:.1f}",
            _ratio(r),
            f"{r['flops_ratio']:.3f}",
            f"{100 * (r['ratio'] / r['flops_ratio'] - 1):+.1f} %",
            f"{r['images_per_s']:.2f}",
            f"{r['gflops_per_s']:.0f}",
            "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}",
        ]
        for r in rows
    ]


def latency_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of one batch size and dtype."""
    table(f"Latency of one call, interleaved: batch {rows[0]['batch_size']}, {rows[0]['dtype']}", *latency_rows(rows))


def throughput_rows(results: Mapping[str, Any], pictures: int) -> HeadsAndCells:
    """Headings and cells of ``vst.measure.throughput.measure_fit``, with the hours of one epoch over ``pictures``."""
    heads = [
        "way", "median ms", "time / one pass (95 %)", "GFLOPs a step", "saved MB", "working MB", "pictures/s",
        f"hours / {pictures:,}",
    ]  # fmt: skip
    return heads, [
        [
            r["name"],
            f"{r['median_ms']:.0f}",
            _ratio(r),
            f"{r['gflops']:.1f}",
            f"{r['saved_mb']:.0f}",
            f"{r['working_mb']:.0f}",
            f"{r['pictures_per_s']:.2f}",
            _hours(r, pictures),
        ]
        for r in results["rows"]
    ]


def throughput_notes(results: Mapping[str, Any]) -> str:
    """What the rows of a fit come to, in a sentence."""
    pays = results["cache_pays_from"]
    return (
        f"one pass over separate runs: {results['time_ratio']:.3f} ({results['time_ratio_low']:.3f} .. "
        f"{results['time_ratio_high']:.3f}) of their time, {results['flops_ratio']:.3f} of their FLOPs: "
        f"{results['over']:.3f} times what arithmetic allows; targets on disk ({results['cache_mb']:.2f} MB a picture) "
        f"{'do not pay' if pays is None else f'pay from epoch {pays}'}; saved: activations kept for the backward pass; "
        "working: what a step holds beside weights, pictures and AdamW's state; the disk is the system's page cache"
    )


def ridge_rows(results: Mapping[str, Any]) -> HeadsAndCells:
    """Headings and cells of ``vst.measure.throughput.measure_ridge``."""
    heads = ["branch", "widths", "s / million tokens", "GFLOP/s", "solving s", "MB held"]
    return heads, [
        [
            r["branch"],
            " -> ".join(map(str, r["widths"])),
            f"{r['seconds_per_million']:.1f}",
            f"{r['gflops_per_s']:.0f}",
            f"{r['solve_s']:.2f}",
            f"{r['sums_mb']:.1f}",
        ]
        for r in results["ridge"]
    ]


def throughput_table(results: Mapping[str, Any], pictures: int) -> None:
    """Print what ``vst.measure.throughput.measure_fit`` found."""
    title = f"Steps of a fit, interleaved: batch {results['batch_size']}"
    table(title, *throughput_rows(results, pictures), throughput_notes(results))
    table("Closed-form start of one stitch, streamed", *ridge_rows(results))


def scaling_rows(results: Mapping[str, Any], pictures: int) -> HeadsAndCells:
    """Headings and cells of ``vst.measure.scaling.measure_scaling``, with the hours of one epoch over ``pictures``."""
    heads = ["processes", "median ms", "pictures/s", f"hours / {pictures:,}"]
    return heads, [
        [str(r["processes"]), f"{r['median_ms']:.0f}", f"{r['pictures_per_s']:.2f}", _hours(r, pictures)]
        for r in results["rows"]
    ]


def scaling_notes(results: Mapping[str, Any]) -> str:
    """What more processes brought, in a sentence."""
    return (
        f"speed-up {results['speed_up']:.2f} ({results['speed_up_low']:.2f} .. {results['speed_up_high']:.2f}), "
        f"{100 * results['efficiency']:.0f} % of the processes; batch {results['batch_size']} in all, "
        f"{results['threads']} thread(s) a process, of one alone as well"
    )


def scaling_table(results: Mapping[str, Any], pictures: int) -> None:
    """Print what ``vst.measure.scaling.measure_scaling`` found."""
    table("Steps of a fit, interleaved", *scaling_rows(results, pictures), scaling_notes(results))


def runtimes_rows(found: Mapping[str, Any]) -> HeadsAndCells:
    """Headings and cells of ``vst.measure.runtimes.measure_runtimes``."""
    first = found["rows"][0]
    heads = [
        "way", "dtype", "median ms", f"time / {first['way']} {first['dtype']} (95 %)", "pictures/s", "tokens differ by",
        "first call s",
    ]  # fmt: skip
    return heads, [
        [
            r["way"],
            r["dtype"],
            f"{r['median_ms']:.1f}",
            _ratio(r),
            f"{r['images_per_s']:.2f}",
            f"{r['difference']:.0e}" if r["difference"] else "0",
            f"{r['prepare_s']:.1f}",
        ]
        for r in found["rows"]
    ]


def runtimes_notes(found: Mapping[str, Any]) -> str:
    """What was not measured, and why, in a sentence; empty where all was."""
    return "".join(f"left out: {name} ({why}); " for name, why in found["left_out"].items()).removesuffix("; ")


def runtimes_table(found: Mapping[str, Any]) -> None:
    """Print what ``vst.measure.runtimes.measure_runtimes`` found."""
    title = f"One call at split {found['split']}, interleaved: batch {found['batch_size']}, {found['device']}"
    table(title, *runtimes_rows(found), runtimes_notes(found) or None)


def timings_markdown(results: Any, pictures: int = LLAVA_PICTURES) -> str:
    """The tables of ``results`` of a run of vst latency, runtimes or throughput, as Markdown."""
    if "runtimes" in results:
        parts = []
        for found in results["runtimes"]:
            title = f"split {found['split']}, batch {found['batch_size']}, {found['device']}:"
            parts += [title, markdown(*runtimes_rows(found)), runtimes_notes(found)]
        return "\n\n".join(filter(None, parts))
    if isinstance(results, list):
        parts = []
        for dtype, batch in dict.fromkeys((r["dtype"], r["batch_size"]) for r in results):
            rows = [r for r in results if (r["dtype"], r["batch_size"]) == (dtype, batch)]
            parts += [f"batch {batch}, {dtype}:", markdown(*latency_rows(rows))]
        return "\n\n".join(parts)
    if "speed_up" in results:
        return "\n\n".join([markdown(*scaling_rows(results, pictures)), scaling_notes(results)])
    steps = [markdown(*throughput_rows(results, pictures)), throughput_notes(results)]
    return "\n\n".join([*steps, markdown(*ridge_rows(results))])


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.3f} ({row['ratio_sure_low']:.3f} .. {row['ratio_sure_high']:.3f})"


def _hours(row: Mapping[str, Any], pictures: int) -> str:
    return f"{pictures / row['pictures_per_s'] / 3600:.1f}"
