"""The demo's tables: towers by what they score and cost, stitches by how well they match."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vst.demo.division import SCENES
from vst.demo.pictures import picture_rows
from vst.demo.results import TITLES
from vst.measure.latency import ALL_IN_FULL
from vst.results.tables import markdown, spread, table

Results = Mapping[str, Any]
STITCH_NOTE = (
    "errors are relative to the target's own variance (1 = as bad as its mean); distance: of the tail's inputs from "
    "what the target feeds it (0 equal, 1 as far as a constant)"
)


def score_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: scores (mean +- deviation over seeds), share of the gain (95 % interval), what is paid."""
    heads = ["tower"]
    for title in TITLES.values():
        heads += [f"{title} %", "gain kept"]
    heads += ["extra blocks", "extra FLOPs"]
    rows = []
    for r in results["towers"]:
        cells = [r["name"]]
        for task in TITLES:
            cells += [spread(list(r["tasks"][task].values()), 1, 100), _kept(results, r, task)]
        blocks = f"{100 * r['extra_blocks']:.0f} %" if "extra_blocks" in r else ""
        extra = f"{100 * r['extra_flops']:.0f} %" if r["extra_flops"] >= 0 else ""  # a cheaper model is no extra
        rows.append([*cells, blocks, extra])
    return heads, rows


def cost_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of FLOPs and measured time (95 % interval), over the trunk alone and over both in full."""
    trunk = f"{results['trunk']} alone"
    heads = ["tower", f"FLOPs / {trunk}", "FLOPs / all in full", f"time / {trunk}", "time / all in full", "ms"]
    rows = [
        [
            r["name"],
            f"{r['trunk_flops_ratio']:.2f}",
            f"{r['flops_ratio']:.2f}",
            f"{r['trunk_ratio']:.2f} ({r['trunk_ratio_sure_low']:.2f} .. {r['trunk_ratio_sure_high']:.2f})",
            f"{r['ratio']:.2f} ({r['ratio_sure_low']:.2f} .. {r['ratio_sure_high']:.2f})",
            f"{r['median_ms']:.0f}",
        ]
        for r in results["towers"]
        if r["objective"] in (None, results["objective"])
    ]
    return heads, rows


def _kept(results: Results, row: Results, task: str) -> str:
    """Share of the gain; the gain itself in the row of all models in full, nothing in that of the one compared with."""
    share = row["share"][task]
    if row["name"] == ALL_IN_FULL:
        return gain_text(share)
    if row["name"] == results["better"][task]:
        return "0 %"
    return "-" if share["share"] is None else share["text"]


def gain_text(share: Results) -> str:
    """A gain with its interval, in points."""
    text = f"gain {points_text({'points': share['gain'], 'low': share['gain_low'], 'high': share['gain_high']})}"
    return text if share["share"] is not None else f"{text}: not distinguishable from zero"


def detail_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what else is told of the scenes: means over seeds, in percent."""
    heads = ["tower", "mIoU", "mIoU of the foreground's classes", "pixel accuracy"]
    rows = [
        [
            r["name"],
            spread(list(r["tasks"][SCENES].values()), 1, 100),
            f"{100 * r['detail']['foreground_mean_iou']:.1f}",
            f"{100 * r['detail']['pixel_accuracy']:.1f}",
        ]
        for r in results["towers"]
    ]
    return heads, rows


def error_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of how stitches match by split and objective, mean +- standard deviation over seeds."""
    heads = ["split", "objective", "seam error", "final error", "by channel", "cosine", "distance"]
    rows = []
    splits = sorted({s["split"] for f in results["fits"] for s in f["reports"]})
    objectives = list(dict.fromkeys(f["objective"] for f in results["fits"]))
    for split in splits:
        for objective in objectives:
            fits = [f for f in results["fits"] if f["objective"] == objective]
            at = [s for f in fits for s in f["reports"] if s["split"] == split]
            values = (
                [s["seam"]["error"] for s in at],
                [s["final"]["error"] for s in at],
                [s["final"]["channel_error"] for s in at],
                [s["final"]["cosine"] for s in at],
                [s["distance"] for s in at],
            )
            rows.append([str(split), objective, *map(spread, values)])
    return heads, rows


def fit_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of what fits took and, where they tuned the trunk, how far its own features have moved."""
    heads = ["objective", "steps", "pictures", "seconds of fitting", "trunk's own error", "by channel"]
    heads += [f"tuned trunk over untuned, {title}, points" for title in TITLES.values()]
    trunks = {r["objective"]: r.get("over_untuned", {}) for r in results["towers"] if r["kind"] == "tuned"}
    rows = []
    for objective in dict.fromkeys(f["objective"] for f in results["fits"]):
        fits = [f for f in results["fits"] if f["objective"] == objective]
        tuned = [f["trunk"]["own"] or {} for f in fits if f.get("trunk")]
        moved = [spread([own.get(key) for own in tuned]) if tuned else "0" for key in ("error", "channel_error")]
        counts = [str(max(f.get(key, 0) for f in fits)) for key in ("steps", "pictures")]
        over = [points_text(trunks[objective][t]) if trunks.get(objective) else "0" for t in TITLES]
        rows.append([objective, *counts, spread([f["seconds"].get("fit", 0.0) for f in fits], 0), *moved, *over])
    return heads, rows


def ahead_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: how far the recipe shown lies ahead of the others on the same pictures (95 % interval)."""
    heads = ["split", f"{results['objective']} ahead of", *(f"{title}, points" for title in TITLES.values())]
    rows = [
        [str(r["split"]), r["objective"], *(points_text(r["behind"][task]) for task in TITLES)]
        for r in results["towers"]
        if "behind" in r
    ]
    return heads, rows


def points_text(told: Results) -> str:
    """A difference of scores in points, with its interval."""
    return f"{100 * told['points']:+.1f} ({100 * told['low']:+.1f} .. {100 * told['high']:+.1f})"


def notes(results: Results) -> str:
    """What the table's columns are."""
    better = results["better"]
    one = " and ".join(f"{better[t]} ({title.split(',')[0]})" for t, title in TITLES.items())
    if len(set(better.values())) == 1:
        one = next(iter(better.values()))
    return (
        f"{results['caption']}. Gain: of both models in full over the better model alone, {one}; kept: the tower's "
        "share of it, with the 95 % interval of a bootstrap over test pictures. Extra: beyond "
        f"{results['trunk']} alone, in % of what {results['branch']} in full adds, stitches included in FLOPs. Times: "
        "medians of pairs in interleaved rounds, 95 % intervals."
    )


def scores_line(title: str, towers: Results) -> str:
    """What towers score, as soon as it is known: a line a task."""
    return "\n".join(
        f"{title}: {name} %: " + ", ".join(f"{tower} {100 * r[task]['score']:.1f}" for tower, r in towers.items())
        for task, name in TITLES.items()
    )


def detailed(results: Results) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Further tables by title, of what there is."""
    out = {"Stitches on held-out pictures": error_rows(results)}
    if (ahead := ahead_rows(results))[1]:
        out["Recipes"] = ahead
    if any(f.get("trunk") for f in results["fits"]):
        out["Fits"] = fit_rows(results)
    if (pictures := picture_rows(results))[1]:
        out["What pictures are worth"] = pictures
    return out


def demo_markdown(results: Results) -> str:
    """All tables as Markdown, for the documentation."""
    scores, costs, details = (markdown(*rows(results)) for rows in (score_rows, cost_rows, detail_rows))
    further = [markdown(*rows) for rows in detailed(results).values()]
    return "\n\n".join([scores, notes(results), costs, details, *further])


def show_results(results: Results) -> None:
    """Print the tables."""
    table("Scores", *score_rows(results))
    table("Cost", *cost_rows(results), notes(results))
    for title, rows in {**detailed(results), "Fits": fit_rows(results)}.items():
        table(title, *rows, STITCH_NOTE if rows[0] == error_rows(results)[0] else None)
