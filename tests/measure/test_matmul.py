"""The rate of matrix products, against FLOPs as torch counts them and a clock of the test's own."""

import pytest
import torch

from vst.measure import matmul
from vst.measure.cost import flops_of
from vst.measure.matmul import matmul_rate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_is_what_was_counted_over_the_fastest_round(monkeypatch, dtype):
    counted = []

    def clock(calls, repeats, device):
        (call,) = calls.values()
        counted.append(flops_of(call))
        return {name: [5.0, 2.0, 3.0] for name in calls}  # milliseconds

    monkeypatch.setattr(matmul, "timed_rounds", clock)
    assert matmul_rate("cpu", dtype, side=24) == pytest.approx(counted[0] / 2e-3)


def test_it_is_measured(device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    side = 256 if device == "cpu" else 4096
    rate = matmul_rate(device, dtype, side=side, repeats=3)
    # no CPU does less than 10 MFLOP/s, and no GPU with bf16 less than 10 TFLOP/s
    assert (1e7 if device == "cpu" else 1e13) < rate < 1e17


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="side is 0"):
        matmul_rate("cpu", side=0)
    with pytest.raises(ValueError, match="device is 'tpu'"):
        matmul_rate("tpu")
    with pytest.raises(ValueError, match="dtype is"):
        matmul_rate("cpu", "int8")
