"""Closed forms from sums against least squares in fp64, whatever precision is allowed around them."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from vst.fit.similarity import CKASums, FrechetSums
from vst.tree.ridge import RidgeSums, products

AROUND = {
    "nothing": nullcontext,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(params=["highest", "medium"])
def allowed(request):
    """What ``torch.set_float32_matmul_precision`` allows: medium is bf16 on a CPU that has it, and on a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def collinear():
    """Two depths of a trunk, as a stitch that reads both sees them: the later one is the earlier with a little more.

    The answer is in the little more alone, which products in bf16 lose.
    """
    rng = np.random.default_rng(0)
    early, more = rng.normal(size=(4000, 12)), 0.03 * rng.normal(size=(4000, 12))
    x, y = np.concatenate([early, early + more], 1), more @ rng.normal(size=(12, 5)) * 30
    return x, y


@pytest.mark.parametrize("around", AROUND)
def test_a_map_between_correlated_channels_is_that_of_least_squares(around, allowed):
    x, y = collinear()
    sums = RidgeSums()
    with AROUND[around]():
        for at in range(0, 4000, 500):
            sums.update(torch.from_numpy(x[at : at + 500]).float(), torch.from_numpy(y[at : at + 500]).float())
    fit = sums.solve(1e-7)
    found = ((torch.from_numpy(x) - fit.x_mean) / fit.x_std) @ fit.weight.double().T * fit.y_std + fit.y_mean
    wanted = (
        np.concatenate([x, np.ones((4000, 1))], 1)
        @ np.linalg.lstsq(np.concatenate([x, np.ones((4000, 1))], 1), y, rcond=None)[0]
    )
    assert float(((found.numpy() - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()) < 1e-3
    assert fit.explained == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("around", AROUND)
def test_distances_and_agreement_are_those_of_full_precision(around, allowed):
    x, y = (torch.from_numpy(part).float() for part in collinear())
    plain, given = [], []
    for out, context in ((plain, nullcontext), (given, AROUND[around])):
        frechet, cka = FrechetSums(), CKASums()
        with context():
            frechet.update(x + 0.01, x)
            cka.update(x, y)
        out += [frechet.result(), cka.result()]
    assert given == pytest.approx(plain, rel=1e-5, abs=1e-6)
    with AROUND[around]():
        assert torch.allclose(products(x, y), x.double().T @ y.double(), rtol=1e-4, atol=1e-3)
