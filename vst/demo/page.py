"""The demo's HTML page: one self-contained file with the curve, the table and feature maps."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vst.page import STYLE, data_url, png
from vst.report import towers_rows
from vst.runs import Run, atomic_path


def write_page(
    run: Run,
    results: Mapping[str, Any],
    titles: Sequence[str],
    photos: Sequence[Image.Image],
    columns: Mapping[str, np.ndarray],
) -> None:
    """Write ``index.html`` into the run's folder.

    Args:
        run: holds ``curve.png``.
        results: of the demo.
        titles, photos: of the pictures whose maps are shown.
        columns: by heading, RGB maps ``[pictures, side, side, 3]`` in 0..1.
    """
    heads, rows = towers_rows(results)
    table = "".join(
        f'<tr class="{row["kind"]}">' + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>"
        for row, cells in zip(results["towers"], rows, strict=True)
    )
    maps = "".join(
        f'<tr><td><img src="{png(photo)}" alt=""><div class="name">{html.escape(title)}</div></td>'
        + "".join(f'<td><img src="{png(_image(m[i]))}" alt="{html.escape(head)}"></td>' for head, m in columns.items())
        + "</tr>"
        for i, (title, photo) in enumerate(zip(titles, photos, strict=True))
    )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Stitch tree: accuracy against latency</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>One trunk instead of two encoders</h1>
<p>DINOv2-S sees the picture; at the split depth a trained stitch hands its tokens to the later blocks of CLIP-B/16.
The deeper the split, the less is paid for the second model.</p>
<img class="plot" src="{data_url(run.path("curve.png"))}" alt="accuracy against latency over the split depth">
<h2>The towers</h2>
<table><thead><tr>{"".join(f"<th>{html.escape(h)}</th>" for h in heads)}</tr></thead><tbody>{table}</tbody></table>
<p class="note">{html.escape(results["caption"])}. Chance (majority class): {100 * results["majority"]:.1f} %.
Latency is measured on this machine with all towers interleaved; ratios are medians of pairs.</p>
<h2>What the branch sees</h2>
<p>Three principal directions of the features as red, green and blue. CLIP's own map and the stitched ones share
directions and scale: the same colour is the same feature. DINOv2's map has directions of its own.</p>
<div class="maps"><table><thead><tr><th>picture</th>{"".join(f"<th>{html.escape(h)}</th>" for h in columns)}</tr></thead>
<tbody>{maps}</tbody></table></div>
<p class="note"><small>The pictures were held out. Maps are drawn at a finer grid than the stitches were fitted
at: a stitch maps token by token. The DINOv2 weights were trained further for saliency by their publisher; numbers
of this pair say nothing about larger models.</small></p>
</body></html>"""
    with atomic_path(run.path("index.html")) as path:
        path.write_text(page, encoding="utf-8")


def _image(values: np.ndarray) -> Image.Image:
    return Image.fromarray((values * 255).round().astype(np.uint8))
