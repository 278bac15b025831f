"""One progress display: a bar with time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_LINE_EVERY_S = 15.0


class Progress:
    """Counts steps of a task; made by :func:`progress`."""

    def __init__(self, title: str, total: int, show: bool) -> None:
        self.title, self.total, self.show, self.done = title, total, show, 0
        self._began = self._said = time.monotonic()
        self._bar = None
        self._at_start = 0
        if show and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich

            self._bar = Rich(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(title, total=total, note="")
            self._bar.start()

    def skip(self, steps: int) -> None:
        """Count steps that were done before (a resumed run) without counting their time."""
        self.done = self._at_start = steps
        if self._bar is not None:
            self._bar.update(self._task, completed=steps)

    def step(self, note: str = "", steps: int = 1) -> None:
        """Count steps; ``note`` is shown beside them."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note)
        elif self.show and (time.monotonic() - self._said > _LINE_EVERY_S or self.done == self.total):
            self._said = time.monotonic()
            spent = self._said - self._began
            left = spent / max(self.done - self._at_start, 1) * (self.total - self.done)
            print(f"{self.title}: {self.done}/{self.total}, {left:.0f} s left  {note}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def progress(title: str, total: int, show: bool = True) -> Iterator[Progress]:
    """A :class:`Progress` for a block of code."""
    bar = Progress(title, total, show)
    try:
        yield bar
    finally:
        bar.close()


def track(items: Iterable[T], title: str, total: int, show: bool = True) -> Iterator[T]:
    """Iterate with a progress display."""
    with progress(title, total, show) as bar:
        for item in items:
            yield item
            bar.step()
