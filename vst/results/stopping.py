"""SIGTERM and SIGHUP, as clusters send them: a run saves at its next step, and then ends as it was told to."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
_listening = 0


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
        told = f"Stopped by {signal.Signals(stop.signal).name}; saved {stop.saved}."
        print(f"{told} The same call with --resume (resume=True) goes on from there.")
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), stop.signal)
    raise SystemExit(128 + stop.signal)  # where a handler of the caller's lets the process live


def _in_child() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


os.register_at_fork(after_in_child=_in_child)
