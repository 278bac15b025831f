"""SIGTERM and SIGHUP, as clusters send them, and Ctrl-C: a run ends as it was told to, with a line on how to go on.

While it trains, it saves at its next step first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_listening = 0
_advice = "The same call with --resume (resume=True) goes on from there."
_said = False
GOING_ON: set[Callable[..., None]] = set()
"""Commands that :func:`goes_on` marks."""


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which take Ctrl-C's way out: whatever is half done is cleaned up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Stop:
    """Whether the run was told to stop; made by :func:`stopping`.

    Attributes:
        signal: number of the signal, 0 if there was none.
        saved: where the run was saved, for the one line that is told; None where that is another process' to tell.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.saved: str | None = None

    def asked(self, device: torch.device | str) -> bool:
        """Whether any process of the job was told to stop. All processes ask after the same step, and so agree.

        Args:
            device: on which the processes exchange tensors.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            told = torch.tensor(self.signal, device=device)
            dist.all_reduce(told, dist.ReduceOp.MAX)
            self.signal = int(told)
        return self.signal != 0


@contextmanager
def stopping() -> Iterator[Stop]:
    """Note SIGTERM and SIGHUP instead of obeying them; at the end of the block the one that came is obeyed.

    The block asks after every step (``Stop.asked``), saves if so and leaves. What obeyed the signals before (the
    process' end, or a handler of the caller's) does so then, and ``SystemExit`` is raised where the process lives on;
    if the block raises, what it raised goes on instead.

    Signals that are ignored (``nohup``) stay ignored. Further ones change nothing: a launcher hands on what its
    processes have been told already. Processes that are forked inside the block, such as a data loader's workers, take
    no notice of either signal, since a step that is to be saved still needs them; they end with their parent. Outside
    the main thread, to which Python delivers signals, nothing is noted.
    """
    global _listening
    stop, before = Stop(), {}
    if threading.current_thread() is threading.main_thread():
        before = {s: signal.getsignal(s) for s in SIGNALS}
        before = {s: handler for s, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def note(number: int, frame: Any) -> None:
        stop.signal = stop.signal or number

    for number in before:
        signal.signal(number, note)
    _listening += 1
    try:
        yield stop
    finally:
        _listening -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal:
        _obey(stop)


def _obey(stop: Stop) -> None:
    if stop.saved is not None:
        _say(f"Stopped by {signal.Signals(stop.signal).name}; saved {stop.saved}.")
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), stop.signal)
    raise SystemExit(128 + stop.signal)  # where a handler of the caller's lets the process live


@contextmanager
def ending() -> Iterator[Callable[[str], None]]:
    """End a command by the signal that it was sent (SIGTERM, SIGHUP or Ctrl-C), with one line and no traceback.

    Of several processes each ends at once, as their launcher expects; the first one alone speaks. What the block is
    given sets the line's advice on how to go on.
    """
    global _advice, _said
    before, _said, caught = _advice, False, []
    if threading.current_thread() is threading.main_thread() and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        caught = [s for s in SIGNALS if signal.getsignal(s) is signal.SIG_DFL]

    def advise(advice: str) -> None:
        global _advice
        _advice = advice

    advise("")
    for number in caught:
        signal.signal(number, _end)
    try:
        yield advise
    except KeyboardInterrupt as error:
        number = getattr(error, "number", signal.SIGINT)
        if not _said and os.environ.get("RANK", "0") == "0":
            _say(f"Stopped by {signal.Signals(number).name}.")
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        raise SystemExit(128 + number) from None  # where the signal is blocked
    finally:
        _advice = before
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: Any) -> None:
    raise _Ended(number)


def goes_on(function: Callable[..., None]) -> Callable[..., None]:
    """Mark a command of which a second call goes on where the first was stopped, without an option that says so."""
    GOING_ON.add(function)
    return function


def _say(what: str) -> None:
    global _said
    _said = True
    print(f"{what} {_advice}".rstrip())


def _in_child() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:  # a forked process, such as a loader's worker, has nothing to say
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_in_child)
