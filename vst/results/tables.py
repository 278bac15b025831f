"""Tables: on the terminal, and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str | None = None) -> None:
    """Print a table: the first column to the left, the others to the right, floats with three digits."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    console = Console()
    console.width = max(console.width, 120)
    console.print(shown)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *rows])


def spread(values: Sequence[float | None], digits: int = 3, factor: float = 1) -> str:
    """Mean, and standard deviation where there are two or more; a dash for none (None: not a number in a row)."""
    scaled = [factor * v for v in values if v is not None]
    if not scaled:
        return "-"
    deviation = f" +- {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):.{digits}f}{deviation}"
