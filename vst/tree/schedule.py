"""Who runs the branches of a tree: by default the caller, one after another."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor


class Schedule(Protocol):
    """What :meth:`vst.tree.encoder.VSTEncoder.walk` and the models in full hand each branch's work to."""

    def fork(self, name: str, *inputs: Tensor) -> AbstractContextManager[None]:
        """Around the work of one branch, which uses ``inputs``."""

    def join(self, *outputs: Tensor) -> None:
        """After the last branch: from here on ``outputs`` are used."""


class InTurn:
    """One branch after another."""

    def fork(self, name: str, *inputs: Tensor) -> AbstractContextManager[None]:
        """Nothing."""
        return nullcontext()

    def join(self, *outputs: Tensor) -> None:
        """Nothing."""


IN_TURN = InTurn()
