"""Memory of calls, against sums of the tensors that must be alive at once."""

import pytest
import torch
from torch import nn

from vst.measure.memory import saved_mb, working_mb

VECTOR = 4 * 256 / 2**20  # of 256 floats, in MB


def vector():
    return torch.ones(256)


def test_what_is_freed_is_not_counted_again():
    def chain():
        x = vector()
        for _ in range(20):
            x = x + 1

    assert working_mb(chain) == pytest.approx(2 * VECTOR)


def test_views_and_writes_in_place_hold_nothing():
    def call():
        x = vector()
        y = x.view(16, 16).t()[:4].expand(3, 4, 16)
        x.add_(1)
        return y

    assert working_mb(call) == pytest.approx(VECTOR)


def test_what_was_there_before_is_not_counted():
    x = vector()
    assert working_mb(lambda: x.mul_(2)) == 0
    assert working_mb(lambda: x * 2) == pytest.approx(VECTOR)


def test_what_autograd_alone_holds_is_counted():
    x = vector().requires_grad_()

    def call():
        first = x.exp()
        second = (first * 1).exp()  # the product in between is free again
        del first
        return (second * 1).exp()

    assert working_mb(call) == pytest.approx(4 * VECTOR)  # three results of exp and the product of the last


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_layer_without_gradients(mode):
    layer = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).requires_grad_(False)
    x = torch.ones(32, 64)
    with mode():
        assert working_mb(lambda: layer(x)) == pytest.approx(4 * 2 * 32 * 256 / 2**20)  # before and after the GELU


def test_an_operator_made_of_others_counts_alike_in_inference_mode():
    x, y = torch.ones(64, 64), torch.ones(64, 64)

    def call():
        return torch.nn.functional.cosine_similarity(torch.kron(x, y[:1]), torch.kron(y, x[:1]))

    with torch.no_grad():
        expected = working_mb(call)
    with torch.inference_mode():
        assert working_mb(call) == expected


def test_kept_for_the_backward_pass():
    layer, x = nn.Linear(64, 32, bias=False), torch.ones(8, 64, requires_grad=True)
    weights = {layer.weight.untyped_storage().data_ptr()}
    # the input for the weight's gradient, the weight for the input's, the result of exp for its own
    assert saved_mb(lambda: layer(x).exp().sum(), weights) == pytest.approx(4 * 8 * (64 + 32) / 2**20)
    assert saved_mb(lambda: layer(x).exp().sum(), set()) == pytest.approx(4 * (8 * (64 + 32) + 64 * 32) / 2**20)


@pytest.mark.cuda
def test_on_a_gpu_by_the_allocator():
    assert working_mb(lambda: torch.ones(2**20, device="cuda") + 1, "cuda") == pytest.approx(8, rel=0.1)
