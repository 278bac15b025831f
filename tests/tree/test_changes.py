"""Merging of changes: the same sums on every machine."""

from fractions import Fraction

import torch

from vst.tree.changes import merged


def test_changes_are_merged_by_the_sums_they_are():
    """Against exact fractions: each entry is the fp32 number nearest to a sum whose every step is rounded to fp64."""
    generator = torch.Generator().manual_seed(0)
    weight, down, up = (torch.randn(shape, generator=generator) for shape in ((3, 5), (4, 5), (3, 4)))
    found = merged(weight, down, up)
    for i in range(3):
        for j in range(5):
            total = float(weight[i, j])
            for k in range(4):
                total = float(Fraction(total) + Fraction(float(up[i, k])) * Fraction(float(down[k, j])))
            assert float(found[i, j]) == float(torch.tensor(total, dtype=torch.float64).float())
    tall = torch.randn(300, 700, generator=generator)
    down, up = torch.randn(8, 700, generator=generator), torch.randn(300, 8, generator=generator)
    rows = torch.cat([merged(tall[i : i + 1], down, up[i : i + 1]) for i in range(300)])
    assert torch.equal(merged(tall, down, up), rows)  # however it is cut into parts
