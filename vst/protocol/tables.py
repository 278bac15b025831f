"""Rows as tables in the paper's form: depth across, direction down; mean and standard deviation over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vst.protocol.marks import legend, letters
from vst.results.tables import markdown, spread

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A table to print or to show.

    Attributes:
        title: above it. columns: headings. rows: cells, as text. note: below it.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        """As Markdown."""
        body = markdown(self.columns, self.rows)
        return f"### {self.title}\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


# name, what of a row, digits, factor
MEASURES: dict[str, tuple[Callable[[Row], float], int, float, str]] = {
    "seam error": (lambda r: r["seam"]["error"], 3, 1, "relative, at the stitch's output"),
    "end error": (lambda r: r["end"]["error"], 3, 1, "relative, at the target's last block"),
    "end error by channel": (lambda r: r["end"]["channel_error"], 3, 1, "every channel in its own units"),
    "end cosine": (lambda r: r["end"]["cosine"], 3, 1, "mean over tokens"),
    "distance": (lambda r: r["distance"], 3, 1, "of the tail's inputs from the target's own (0 equal)"),
    "rescued %": (lambda r: r["rescue"] / max(r["both_wrong"], 1), 1, 100, "right, of those both models get wrong"),
    "interfered %": (
        lambda r: r["interference"] / max(r["both_right"], 1),
        1,
        100,
        "wrong, of those both models get right",
    ),
    "seconds": (lambda r: r["seconds"], 0, 1, "of all stages and measures, on the machine of the run"),
}


def stitched_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of stitched models."""
    return [r for r in rows if r["kind"] == "stitched"]


def kinds(rows: Sequence[Row], name: str) -> list[Any]:
    """Values of a field, in the order in which they first occur."""
    return list(dict.fromkeys(r[name] for r in rows))


def score_tables(rows: Sequence[Row]) -> list[Table]:
    """For each task and family: a block of directions for each objective, depths across; and the models alone."""
    out = []
    for task in kinds(rows, "task"):
        mine = [r for r in stitched_rows(rows) if r["task"] == task]
        models = [r for r in rows if r["kind"] == "model" and r["task"] == task]
        for family in kinds(mine, "family"):
            part = [r for r in mine if r["family"] == family]
            depths = sorted(set(kinds(part, "depth")))
            body = []
            for objective in kinds(part, "objective"):
                for a, b in dict.fromkeys((r["source"], r["target"]) for r in part):
                    cells = [_at(part, objective, a, b, depth) for depth in depths]
                    if any(cells):
                        shown = (spread([r["score"] for r in cell], 1, 100) + letters(cell) for cell in cells)
                        body.append([objective, f"{a} into {b}", *shown])
            out.append(
                Table(
                    f"{task}: {part[0]['metric']} % by depth of the stitch ({family})",
                    ["objective", "direction", *map(str, depths)],
                    body,
                    " ".join(filter(None, [_beside(models), legend(part)])),
                )
            )
    return out


def _at(rows: Sequence[Row], objective: str, a: str, b: str, depth: int) -> list[Row]:
    place = (objective, a, b, depth)
    return [r for r in rows if (r["objective"], r["source"], r["target"], r["depth"]) == place]


def _beside(models: Sequence[Row]) -> str:
    """The controls: what each model scores alone, and what no model scores."""
    if not models:
        return ""
    parts = [
        f"{name} alone (linear probe) {spread([m['score'] for m in models if m['model'] == name], 1, 100)}"
        for name in kinds(models, "model")
    ]
    sizes, seeds = models[0]["pictures"], len(kinds(models, "seed"))
    parts.append(
        f"majority class {spread([m['majority'] for m in models if m['model'] == models[0]['model']], 1, 100)}"
    )
    if models[0]["chance"] is not None:
        parts.append(f"chance {100 * models[0]['chance']:.1f}")
    return (
        "; ".join(parts)
        + f". {models[0]['classes']} classes; {sizes['train']} training, {sizes['validation']} validation "
        f"and {sizes['test']} test pictures; {seeds} seed{'s' if seeds > 1 else ''}."
    )


def measure_tables(rows: Sequence[Row]) -> list[Table]:
    """For each task and family: every measure, a line for each direction, depth and objective."""
    out = []
    for task in kinds(rows, "task"):
        mine = [r for r in stitched_rows(rows) if r["task"] == task]
        for family in kinds(mine, "family"):
            part = [r for r in mine if r["family"] == family]
            places = dict.fromkeys((r["source"], r["target"], r["depth"]) for r in part)
            body = []
            for a, b, depth in sorted(places):
                for objective in kinds(part, "objective"):
                    at = [
                        r
                        for r in part
                        if (r["source"], r["target"], r["depth"], r["objective"]) == (a, b, depth, objective)
                    ]
                    if at:
                        values = [spread([get(r) for r in at], n, f) for get, n, f, _ in MEASURES.values()]
                        body.append([f"{a} into {b}", str(depth), objective, *values])
            notes = "; ".join(f"{name}: {what}" for name, (*_, what) in MEASURES.items())
            out.append(
                Table(
                    f"{task}: measures on the test pictures ({family})",
                    ["direction", "depth", "objective", *MEASURES],
                    body,
                    notes + ".",
                )
            )
    return out


def cost_table(rows: Sequence[Row]) -> Table:
    """Parameters and FLOPs of each stitched model beside the models alone."""
    body = [
        [f"{r['model']} alone", "", "", f"{r['parameters'] / 1e6:.1f}", "", f"{r['flops'] / 1e9:.2f}"]
        for r in {r["model"]: r for r in rows if r["kind"] == "model"}.values()
    ]
    places = {(r["source"], r["target"], r["family"], r["depth"]): r for r in stitched_rows(rows)}
    for (a, b, family, depth), r in sorted(places.items()):
        millions = [f"{r[name] / 1e6:.1f}" for name in ("parameters", "stitch_parameters")]
        body.append([f"{a} into {b}", family, str(depth), *millions, f"{r['flops'] / 1e9:.2f}"])
    columns = ["model", "stitch", "depth", "M parameters", "M of the stitch", "GFLOPs a picture"]
    return Table("Cost of one picture, without the head", columns, body)


def saving(rows: Sequence[Row], pushed: Mapping[str, int]) -> Table:
    """Pictures pushed through each model, against what the same rows would push one by one with nothing kept."""
    naive = {name: sum(r.get("naive_pictures", {}).get(name, 0) for r in rows) for name in pushed}
    body = [
        [name, f"{pushed[name]:,}", f"{naive[name]:,}", f"{naive[name] / max(pushed[name], 1):.0f}"] for name in pushed
    ]
    return Table(
        "Pictures pushed through each model",
        ["model", "pushed", "naive", "ratio"],
        body,
        "naive: every row on its own, each pass of training, choice of rates and measuring through both models; tails, "
        "which do run each time, are not counted.",
    )
