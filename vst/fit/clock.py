"""Where a fit's time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """Seconds by phase and in all, with those of the calls before that led to the state gone on from."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._before: dict[str, float] = {}
        self._spent: dict[str, float] = {}
        self._running: dict[str, float] = {}  # when a phase began

    def go_on(self, before: Mapping[str, float]) -> None:
        """Take over what :meth:`spent` gave when a state was saved."""
        self._before, self._spent = dict(before), {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is of this phase."""
        self._running[name] = time.monotonic()
        try:
            yield
        finally:
            self._spent[name] = time.monotonic() - self._running.pop(name)

    def spent(self) -> dict[str, float]:
        """Seconds up to now by phase, and ``total``."""
        now = time.monotonic()
        here = {**self._spent, **{name: now - began for name, began in self._running.items()}}
        here["total"] = now - self._began
        phases = dict.fromkeys([*self._before, *here])
        return {phase: self._before.get(phase, 0.0) + here.get(phase, 0.0) for phase in phases}
