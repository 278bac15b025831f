"""Branches that run at the same time on one GPU: streams that fork at the split, and graphs that launch it all at once.

At a batch of one a ViT-L cannot fill a large GPU and its kernels are over sooner than the next ones are launched; so
branches have to overlap, and launching has to cost nothing. ``streams`` gives each branch a CUDA stream of its own from
the depth where it leaves the trunk; ``graphs`` captures such a forward pass once and replays it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vst.tree.baseline import FullEncoders, FullTower
from vst.tree.encoder import VSTEncoder
from vst.tree.splits import Split

MODES = ("streams", "graphs")
_WARMUP = 3  # calls before a capture, as torch's documentation of CUDA graphs asks for
_KEPT = 8  # graphs: each holds memory for its own activations


class Streams:
    """Side streams by name, and the fork and join around them; on a CPU everything runs in turn.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: dict[str, Any] = {}
        self._open: list[Any] = []

    @contextmanager
    def fork(self, name: str, *inputs: Tensor) -> Iterator[None]:
        """Work inside starts when all that was asked of the current stream before is done.

        Args:
            name: of the side stream.
            inputs: tensors of the current stream that are used inside.
        """
        if self.device.type != "cuda":
            yield
            return
        if name not in self._side:
            self._side[name] = torch.cuda.Stream(self.device)
        side = self._side[name]
        side.wait_stream(torch.cuda.current_stream(self.device))
        for x in inputs:
            x.record_stream(side)  # else the allocator could give its memory away while it is read there
        self._open.append(side)
        with torch.cuda.stream(side):
            yield

    @contextmanager
    def joined(self) -> Iterator[None]:
        """What was forked inside is joined at the end, or forgotten where an error ends it."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.clear()

    def join(self, *outputs: Tensor) -> None:
        """The current stream waits for all forks; ``outputs`` of theirs are used there from now on."""
        if self.device.type != "cuda":
            return
        main = torch.cuda.current_stream(self.device)
        for side in self._open:
            main.wait_stream(side)
        for x in outputs:
            x.record_stream(main)
        self._open.clear()


class Overlapped(nn.Module):
    """A tree, or its models in full, with branches that run at the same time; called as the tree is.

    Tokens are the tree's own, to the rounding of the same kernels. For inference, by one thread at a time: no gradient
    flows.

    Args:
        tower: a tree or models in full.
        mode: streams or graphs. A graph is captured at its first call for every shape, dtype, split, fusion and kind of
            autocast, and the last eight are kept; moving or casting the tower through this module drops them all.
            A graph reads the weights where they were: what is written into them is seen, but do not move or cast the
            tower behind its back. The graphs share their working memory, so call it from one stream at a time.

    Raises:
        ValueError: an unknown mode, or graphs without a CUDA device.
    """

    def __init__(self, tower: VSTEncoder | FullEncoders, mode: str = "streams") -> None:
        super().__init__()
        self.tower, self.mode = tower, mode
        if mode not in MODES:
            raise ValueError(f"overlap is {mode!r}; expected {' or '.join(MODES)}.")
        self._settle()
        if mode == "graphs" and self.device.type != "cuda":
            raise ValueError(
                f"The tower is on {self.device.type}, but graphs need CUDA: move it first, or use streams or compile."
            )

    def _settle(self) -> None:
        self.device = next(self.tower.parameters()).device
        self._streams = Streams(self.device)
        self.forget()

    def forget(self) -> None:
        """Drop all captured graphs with their memory; the next call captures anew."""
        self._graphs: OrderedDict[Any, tuple[Any, Any, Tensor]] = OrderedDict()
        self._side: Any = None  # the stream of all captures: memory of the pool is given again to its own stream alone
        self._pool: Any = None

    def _apply(self, fn: Any, recurse: bool = True) -> Overlapped:
        super()._apply(fn, recurse)
        self._settle()
        return self

    @torch.no_grad()
    def forward(self, pixels: Tensor | Mapping[str, Tensor], split: Split | None = None) -> Tensor:
        """Fused tokens, as the tower gives them."""
        if isinstance(self.tower, FullTower):
            pixels = self.tower.each(pixels)  # type: ignore[arg-type]  # not in a graph: it makes constants
        if self.mode == "streams":
            return self._run(pixels, split)
        return self._replay(pixels, split)

    def _run(self, pixels: Any, split: Split | None) -> Tensor:
        tower, streams = self.tower, self._streams
        with streams.joined():
            if isinstance(tower, VSTEncoder):
                return tower.fuse(list(tower.walk(pixels, [split], streams)[0].values()))
            return tower.fused(list(tower.branch_tokens(pixels, streams).values()))

    def _replay(self, pixels: Any, split: Split | None) -> Tensor:
        given = dict(pixels) if isinstance(pixels, Mapping) else {"": pixels}
        config = self.tower.config
        chosen = tuple(sorted(config.resolve(split).items())) if isinstance(self.tower, VSTEncoder) else None
        cast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        fusion = (config.fusion, config.fusion_weights, config.normalise)
        key = (chosen, fusion, cast, tuple((n, tuple(p.shape), p.dtype) for n, p in given.items()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(given, split, isinstance(pixels, Mapping), cast)
            while len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph, held, out = self._graphs[key]
        for name, p in given.items():
            held[name].copy_(p)
        with torch.cuda.device(self.device):
            graph.replay()
            return out.clone()  # the next replay writes over it, be it of another graph: they share memory

    @torch.inference_mode(False)  # else what is held could not be written to by a later call outside of it
    @torch.no_grad()
    def _capture(
        self, given: dict[str, Tensor], split: Any, by_name: bool, cast: torch.dtype | None
    ) -> tuple[Any, dict[str, Tensor], Tensor]:
        held = {n: torch.empty_like(p, device=self.device).copy_(p) for n, p in given.items()}
        call = partial(self._run, held if by_name else held[""], split)
        if self._pool is None:
            self._side, self._pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        # Without autocast's cache of cast weights: it is emptied after the call, and replays would read freed memory.
        # Where none is on it stays untouched: what was compiled before would be compiled again under it.
        autocast = nullcontext() if cast is None else torch.autocast("cuda", dtype=cast, cache_enabled=False)
        graph, side = torch.cuda.CUDAGraph(), self._side
        with torch.cuda.device(self.device), autocast:
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(_WARMUP):
                    call()
            torch.cuda.current_stream(self.device).wait_stream(side)
            # other threads, such as a loader that pins memory, may go on with what a capture forbids
            with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                out = call()
        return graph, held, out
