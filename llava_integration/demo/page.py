"""The demo's HTML page: one self-contained file with scores, plots, and what the model says about pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_integration.answer.scoring import normalise
from vst.results.folders import atomic_path
from vst.results.page import STYLE, data_url, html_table, png
from vst.results.tables import spread

_SIDE = 224  # of the sampled pictures in the page, at most
_STYLE = """
.plot{display:block;margin:1.2rem 0}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:1rem}
.card{background:#fff;border:1px solid #e2e6ea;border-radius:8px;padding:.8rem;font-size:.92rem;overflow-wrap:anywhere}
.card img{width:100%;aspect-ratio:1;object-fit:contain;background:#f1f3f5;border-radius:6px;display:block}
.card p{margin:.5rem 0 .3rem} .card span{white-space:nowrap}
.card dl{display:grid;grid-template-columns:auto 1fr;gap:.1rem .7rem;margin:0}
dt{color:#5a6675} dd{margin:0} .right{color:#2f7d4f;font-weight:600} .wrong{color:#b3261e;font-weight:600}
"""
_HEADS = ["dataset", "seed", "questions", "accuracy %", "majority %", "blanked %", "over majority", "over blanked"]
_KIND_HEADS = ["dataset", "kind", "questions", "accuracy %", "majority %", "majority answer", "blanked %"]


def write_page(
    run_folder: str | Path,
    results: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    plots: Mapping[str, Path],
) -> Path:
    """Write ``index.html`` into a run's folder.

    Args:
        run_folder: where to.
        results: ``caption``; ``seeds``: rows of ``seed`` and ``datasets`` (by name what
            :func:`llava_integration.answer.scoring.score` gives); ``depths``: by dataset what
            :func:`llava_integration.train.plots.depth_curve` draws.
        samples: each with ``image`` (PIL), ``question``, ``answer``, ``expected``, ``blank`` (the answer to the blanked
            picture) and ``dataset``.
        plots: PNG or SVG files by what they show.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: a plot is missing.
        ValueError: a plot is neither PNG nor SVG.
    """
    figures = "".join(
        f'<img class="plot" src="{data_url(Path(path))}" alt="{html.escape(what)}">' for what, path in plots.items()
    )
    depths = "".join(
        f"<h2>{html.escape(name)} by split depth</h2>{html_table(*depth_rows(by))}"
        for name, by in results.get("depths", {}).items()
    )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>A language model that sees through the stitch tree</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{_STYLE}</style></head><body>
<h1>A language model that sees through the stitch tree</h1>
<p>A small language model answers questions about pictures, as LLaVA does; its eyes are the stitch tree, one shared
trunk with the later blocks of other vision models behind it. Its answers are compared with the most frequent answer
to each kind of question and with its own answers when the picture is blanked: only what lies above both was seen.</p>
{figures}
<h2>Scores</h2>
{html_table(*score_rows(results["seeds"]))}
<p class="note">{html.escape(results["caption"])}. Majority: the most frequent answer of each kind among these very
questions. Blanked: the same model, every picture replaced by the mean colour. Differences are in points, with 95 %
intervals over pictures.</p>
{depths}
<h2>By kind of question</h2>
{html_table(*kind_rows(results["seeds"]), text=(1, 5))}
<p class="note">Means over the seeds; questions are counted for each seed.</p>
<h2>What it says</h2>
<div class="grid">{"".join(_card(sample) for sample in samples)}</div>
</body></html>"""
    path = Path(run_folder) / "index.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def score_rows(seeds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of scores: a row for each dataset and seed."""
    rows = []
    for name in _names(seeds):
        for run in seeds:
            if score := run["datasets"].get(name):
                numbers = [_percent(score[key]) for key in ("accuracy", "majority", "blank")]
                differences = [_difference(score[key]) for key in ("over_majority", "over_blank")]
                rows.append([name, str(run["seed"]), str(score["n"]), *numbers, *differences])
    return _HEADS, rows


def kind_rows(seeds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of kinds: a row for each dataset and kind, means over seeds."""
    rows = []
    for name in _names(seeds):
        tables = [run["datasets"][name]["kinds"] for run in seeds if name in run["datasets"]]
        for kind in dict.fromkeys(kind for table in tables for kind in table):
            at = [table[kind] for table in tables if kind in table]
            accuracy, majority, blank = (
                _percent(float(np.mean([row[key] for row in at]))) for key in ("accuracy", "majority", "blank")
            )
            counts = _joined(str(row["n"]) for row in at)
            answers = _joined(row["majority_answer"] for row in at)
            rows.append([name, kind, counts, accuracy, majority, answers, blank])
    return _KIND_HEADS, rows


def depth_rows(depths: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table of split depths, mean +- standard deviation over seeds."""
    heads = ["split", "trained with a random split %", "trained at this split alone %"]
    splits = sorted({int(split) for key in ("random", "fixed") for split in depths[key]})
    scores = [{int(split): values for split, values in depths[key].items()} for key in ("random", "fixed")]
    cells = {split: [spread(by[split], 1, 100) if split in by else "" for by in scores] for split in splits}
    return heads, [[str(split), *cells[split]] for split in splits]


def _names(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for run in seeds for name in run["datasets"]))


def _joined(values: Any) -> str:
    return " / ".join(dict.fromkeys(values))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _difference(difference: Mapping[str, float]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.1f} ({low:+.1f} .. {high:+.1f})"


def _card(sample: Mapping[str, Any]) -> str:
    image: Image.Image = sample["image"].convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    right = normalise(sample["answer"]) == normalise(sample["expected"])
    kind, verdict = ("right", "✓ right") if right else ("wrong", "✗ wrong")
    answer, expected, blank, question, dataset = (
        html.escape(sample[key]) for key in ("answer", "expected", "blank", "question", "dataset")
    )
    return (
        f'<div class="card"><img src="{png(image)}" alt=""><p>{question}</p><dl>'
        f'<dt>answer</dt><dd>{answer} <span class="{kind}">{verdict}</span></dd>'
        f"<dt>expected</dt><dd>{expected}</dd><dt>blanked</dt><dd>{blank}</dd></dl><small>{dataset}</small></div>"
    )
