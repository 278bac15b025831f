"""What a device's matrix products reach: the rate that achieved rates are compared with."""

from __future__ import annotations

import torch

from vst.fit.precision import usable_device
from vst.measure.latency import timed_rounds
from vst.models.fields import dtype_of, whole

_SIDE = {"cuda": 8192, "cpu": 1024}
_CALLS = 4  # products a round, so that waiting for the device weighs little


def matmul_rate(
    device: torch.device | str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    side: int | None = None,
    repeats: int = 10,
) -> float:
    """FLOP/s of the fastest of several rounds of one matrix product, ``[side, side] @ [side, side]``.

    The fastest, since whatever disturbs a round makes it slower. A tower's FLOP/s over this rate is its MFU: against
    what the machine at hand reaches, not against what its data sheet promises.

    Args:
        device: auto, cpu, cuda or cuda:N.
        dtype: of both matrices and of the product.
        side: default: 8192 on a GPU, 1024 on a CPU.
        repeats: counted rounds of four products.

    Raises:
        ValueError: bad options, or a device that is not there.
    """
    place, dtype = torch.device(usable_device(device)), dtype_of(dtype)
    side = whole(_SIDE[place.type] if side is None else side, "side", (1, 2**17))
    repeats = whole(repeats, "repeats", (1, None))
    a, b = (torch.randn(side, side, device=place).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def products() -> None:
        for _ in range(_CALLS):
            torch.mm(a, b, out=out)

    (times,) = timed_rounds({"products": products}, repeats=repeats, device=place).values()
    return _CALLS * 2 * side**3 / (min(times) / 1e3)
