"""The demo's HTML page: one self-contained file with the curve, the tables, predicted masks and feature maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vst.demo.config import MODELS
from vst.demo.division import SCENES, TaskData
from vst.demo.pictures import picture_rows
from vst.demo.results import unpack
from vst.demo.tables import STITCH_NOTE, ahead_rows, cost_rows, detail_rows, error_rows, fit_rows, notes, score_rows
from vst.measure.latency import ALL_IN_FULL
from vst.results.folders import Run, atomic_path
from vst.results.page import STYLE, data_url, html_table, png

# One colour a class: background, then the emoji's categories in alphabetical order.
PALETTE = np.array(
    [(238, 240, 243), (230, 85, 13), (33, 113, 181), (252, 187, 40), (106, 61, 154), (49, 163, 84), (227, 26, 140),
     (0, 150, 160), (120, 84, 52)],
    np.uint8,
)  # fmt: skip


def write_page(
    run: Run,
    results: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    task: TaskData,
    columns: Mapping[str, np.ndarray],
) -> None:
    """Write ``index.html`` into the run's folder.

    Args:
        run: holds ``curve.png``.
        results: of the demo. rows: of the run, with the masks that were predicted for the first seed's first scenes.
        task: the scenes.
        columns: by heading, RGB feature maps ``[scenes, side, side, 3]`` in 0..1 of the same scenes.
    """
    trunk, branch = MODELS[results["trunk"]], MODELS[results["branch"]]
    count = len(next(iter(columns.values())))
    shown: dict[str, list[Image.Image]] = {"scene": [p.resize((112, 112)) for p in task.test[:count]]}
    shown["ground truth"] = [_mask(m) for m in task.test_labels[:count].numpy()]
    shown |= {name: [_mask(m) for m in masks[:count]] for name, masks in _predicted(results, rows).items()}
    maps = {name: [_image(m) for m in values] for name, values in columns.items()}
    legend = " ".join(
        f'<span class="key"><i style="background:rgb{tuple(int(v) for v in colour)}"></i>{html.escape(name)}</span>'
        for colour, name in zip(PALETTE, task.classes, strict=False)
    )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stitch tree: what is kept of two models' gain</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}
.plot{{max-width:1000px}} .key{{display:inline-block;margin-right:.9rem;font-size:.8rem;color:#5a6675}}
.key i{{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;margin-right:.3rem;vertical-align:-.1rem}}
.maps img{{width:96px;height:96px}}</style></head><body>
<h1>Two encoders, one trunk</h1>
<p>{html.escape(trunk)} sees the picture; at the split depth a stitch hands its tokens to the later blocks of
{html.escape(branch)}. The deeper the split, the less is paid for the second model. {_finding(results)}</p>
<img class="plot" src="{data_url(run.path("curve.png"))}" alt="share of the two-model gain over the extra cost, by split depth">
<h2>The towers</h2>
{html_table(*score_rows(results))}
<p class="note">{html.escape(notes(results))} Majority class: {_majority(results)}.</p>
{html_table(*cost_rows(results))}
<h2>What each tower makes of a scene</h2>
<p>Scenes of the test: emoji and a drawing style that neither stitches nor probes saw before. A linear head reads each
tower's tokens.</p>
{_pictures(shown)}
<p>{legend}</p>
<h2>What the branch sees</h2>
<p>Three principal directions of the features as red, green and blue, for the same scenes. The branch's own map and the
stitched ones share directions and scale: the same colour is the same feature. The trunk's has directions of its own.</p>
{_pictures({"scene": shown["scene"], **maps})}
<p class="note"><small>Maps are drawn at a finer grid than the stitches were fitted at: a stitch maps token by token.</small></p>
<h2>In detail</h2>
{html_table(*detail_rows(results))}
<p class="note">Scenes; means over seeds, in percent.</p>
{html_table(*error_rows(results), text=(1,))}
<p class="note">Stitches on held-out pictures: {html.escape(STITCH_NOTE)}.</p>
{_ahead(results)}
{html_table(*fit_rows(results))}
<p class="note">Fits, on the machine that ran them; the trunk's own error is that of its features to the published
model's, where it was tuned.</p>
{_worth(run, results)}
<p class="note"><small>The DINOv2 weights were trained further for saliency by their publisher, and both models are small;
numbers of this pair say nothing about larger models, photographs or language models.</small></p>
</body></html>"""
    with atomic_path(run.path("index.html")) as path:
        path.write_text(page, encoding="utf-8")


def _ahead(results: Mapping[str, Any]) -> str:
    heads, rows = ahead_rows(results)
    return html_table(heads, rows, text=(1,)) if rows else ""


def _worth(run: Run, results: Mapping[str, Any]) -> str:
    """What pictures are worth, where recipes differ in these."""
    heads, rows = picture_rows(results)
    if not rows:
        return ""
    plot = f'<img class="plot" src="{data_url(run.path("pictures.png"))}" alt="share of the gain and errors over pictures">'
    return f"<h2>What pictures are worth</h2>\n{plot}\n{html_table(heads, rows)}"


def _finding(results: Mapping[str, Any]) -> str:
    """What the numbers of the scenes say, in a sentence."""
    full = next(r for r in results["towers"] if r["name"] == ALL_IN_FULL)["share"][SCENES]
    if full["share"] is None:
        return "On the scenes, the gain of both models over one cannot be told from zero in this run."
    splits = [r for r in results["towers"] if r["kind"] == "split" and r["objective"] == results["objective"]]
    shallow, deep = min(splits, key=lambda r: r["split"]), max(splits, key=lambda r: r["split"])
    said = [
        f"split {r['split']} keeps {100 * r['share'][SCENES]['share']:.0f} % of it for {100 * r['extra_flops']:.0f} % of "
        "the second model's cost"
        for r in (shallow, deep)
    ]
    one = html.escape(results["better"][SCENES])
    return f"On the scenes both in full gain {100 * full['gain']:.1f} points of mIoU over {one}: {said[0]}, {said[1]}."


def _predicted(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Masks by heading: the trunk alone, the tree at a deep and a middle split, both in full."""
    first = results["seeds"][0]
    own = {r["objective"]: r["towers"] for r in rows if r.get("seed") == first and "towers" in r}
    trees, models = own[results["objective"]], own[None]
    names = sorted(trees, key=lambda name: int(name.removeprefix("VST-")))
    middle, deep = names[(len(names) - 1) // 2], names[-1]
    alone = f"{results['trunk']} alone"
    chosen = {alone: models[alone], deep: trees[deep], middle: trees[middle], "both in full": models[ALL_IN_FULL]}
    return {name: unpack(tower[SCENES]["masks"]) for name, tower in chosen.items()}


def _majority(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{100 * value:.1f} % ({task})" for task, value in results["majority"].items())


def _pictures(columns: Mapping[str, Sequence[Image.Image]]) -> str:
    """A table of pictures: a column each, a line for every scene."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    lines = "".join(
        "<tr>"
        + "".join(
            f'<td><img src="{png(image)}" alt="{html.escape(name)}"></td>'
            for name, image in zip(columns, line, strict=True)
        )
        + "</tr>"
        for line in zip(*columns.values(), strict=True)
    )
    return f'<div class="maps"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _mask(values: np.ndarray) -> Image.Image:
    return Image.fromarray(PALETTE[values])


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8))
