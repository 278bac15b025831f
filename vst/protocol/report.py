"""The report of a run: results.json, tables.md, pictures and one HTML page, all drawn from the rows."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vst.models.spec import VFMSpec
from vst.protocol import findings as rules
from vst.protocol.cells import in_names
from vst.protocol.chains import parse_chain, place_of
from vst.protocol.config import ProtocolConfig
from vst.protocol.features import Counts
from vst.protocol.plots import cka_picture, curves, training_curves
from vst.protocol.tables import Table, cost_table, kinds, measure_tables, saving, score_tables, stitched_rows
from vst.results.drawing import drawing
from vst.results.finished import ROWS, as_written
from vst.results.folders import Run, atomic_path, read_json
from vst.results.page import STYLE, data_url, html_table
from vst.results.tables import table


def write_report(run: Run, config: ProtocolConfig, specs: Mapping[str, VFMSpec]) -> dict[str, Any]:
    """Write the report of all rows that a run's folder holds; returns the results."""
    rows = run.rows()
    pushed = Counts(run.path("pushed.json")).pushed
    with as_written(run.path("rows"), "vst protocol", ROWS):
        shown = sorted(rows, key=row_place)  # a grid that grew in another order gives the same report
        verdicts = rules.findings(shown, config.tolerated_drop)
        scores = score_tables(shown)
        tables = [*scores, *measure_tables(shown), cost_table(shown), saving(rows, pushed)]
    with atomic_path(run.path("tables.md")) as path:
        path.write_text(_markdown(verdicts, tables), encoding="utf-8")
    results = {
        "axes": read_json(run.path("axes.json")),
        "findings": [v.to_dict() for v in verdicts],
        "pushed_pictures": pushed,
        "rows": rows,
    }
    run.finish(results)
    for scored in scores:
        table(scored.title, scored.columns, scored.rows, scored.note)
    for v in verdicts:
        print(f"{v.finding}. {v.sentence}")
    pictures = _pictures(run, shown)
    with atomic_path(run.path("index.html")) as path:
        path.write_text(_page(config, specs, verdicts, tables, pictures), encoding="utf-8")
    print(f"results: {run.path('results.json')}\npage:    {run.path('index.html')}")
    return results


def row_place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Task by task and family by family; short chains first, directions between two models before self-stitches."""
    chain = place_of(parse_chain(row["objective"])) if row["kind"] == "stitched" else ()
    ends = row.get("source", ""), row.get("target", "")
    names = row["task"], row["kind"], row.get("family", ""), row.get("model", "")
    return *names, chain, ends[0] == ends[1], ends, row.get("depth", 0), row["seed"]


def _pictures(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    paths = []
    for task in kinds(rows, "task"):
        for family in kinds([r for r in stitched_rows(rows) if r["task"] == task], "family"):
            for what, draw in (("scores", curves), ("training", training_curves)):
                paths.append(path := run.path(f"{what}-{task}-{in_names(family)}.png"))
                with drawing(path):
                    draw(rows, task, family, path)
        if any(r["kind"] == "cka" and r["task"] == task for r in rows):
            paths.append(path := run.path(f"cka-{task}.png"))
            with drawing(path):
                cka_picture(rows, task, path)
    return [path for path in paths if path.exists()]


def _markdown(verdicts: Sequence[rules.Verdict], tables: Sequence[Table]) -> str:
    lines = [f"{v.finding}. {v.sentence}" for v in verdicts]
    return "\n".join(["### The findings", "", *lines, "", *(t.markdown() for t in tables)])


def _page(
    config: ProtocolConfig,
    specs: Mapping[str, VFMSpec],
    verdicts: Sequence[rules.Verdict],
    tables: Sequence[Table],
    pictures: Sequence[Path],
) -> str:
    """One self-contained page."""
    random = "" if config.pretrained else " (random weights)"
    models = "; ".join(
        f"{n}: {config.models[n]}{random}, {s.depth} blocks of width {s.width}, patch {s.patch}"
        for n, s in specs.items()
    )
    said = "".join(f"<li><b>{html.escape(v.verdict)}</b>: {html.escape(v.sentence)}</li>" for v in verdicts)
    seen = "".join(
        f'<div><img style="max-width:100%" src="{data_url(p)}" alt="{html.escape(p.stem)}"></div>' for p in pictures
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The stitching protocol</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>Which models stitch, where, how</h1>
<p>{html.escape(models)}; grid {config.grid} x {config.grid}.</p>
<h2>The findings, by rule</h2><ol style="list-style:none;padding:0">{said}</ol>
<p class="note">Rules: see docs/protocol.md and vst/protocol/findings.py. Tolerated drop of the second:
{100 * config.tolerated_drop:.1f} points.</p>
{"".join(_html(t) for t in tables[:1])}{seen}{"".join(_html(t) for t in tables[1:])}
</body></html>"""


def _html(shown: Table) -> str:
    table_ = html_table(shown.columns, shown.rows)
    return f'<h2>{html.escape(shown.title)}</h2>{table_}<p class="note">{html.escape(shown.note)}</p>'
