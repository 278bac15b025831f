"""Every execution gives the tower's tokens."""

import pytest
import torch

from vst.baseline import FullEncoders
from vst.execution import EXECUTIONS, executed
from vst.latency import measure_tree

KINDS = [
    "eager",
    "streams",
    pytest.param("graphs", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    pytest.param("compile", marks=pytest.mark.slow),
]


def test_all_are_tested():
    assert {getattr(k, "values", (k,))[0] for k in KINDS} == set(EXECUTIONS)


@pytest.mark.parametrize("execution", KINDS)
def test_tokens(tree_of, execution):
    device = "cuda" if execution == "graphs" else "cpu"
    tree = tree_of("dinov2", "siglip").to(device)
    full = FullEncoders.load(tree.config).to(device)
    call, whole = executed(tree, execution), executed(full, execution)
    for _ in range(2):
        pixels = torch.randn(2, 3, tree.image_size, tree.image_size, device=device)
        for split in tree.splits:
            torch.testing.assert_close(call(pixels, split=split), tree(pixels, split=split), atol=1e-4, rtol=1e-4)
    each = {n: torch.randn(2, 3, m.image_size, m.image_size, device=device) for n, m in full.models.items()}
    torch.testing.assert_close(whole(each), full(each), atol=1e-4, rtol=1e-4)
    assert execution == "eager" or not call(pixels).requires_grad


@pytest.mark.slow
def test_compiled_towers_are_measured(tree_of):
    rows = measure_tree(tree_of("dinov2", "clip"), repeats=1, execution="compile", show_progress=False)
    assert [r["name"] for r in rows if r["kind"] == "full"] == ["all in full", "all in full, compile"]
    assert [r["peak_mb"] is None for r in rows] == [r["execution"] == "compile" for r in rows]


def test_an_unknown_one(tree_of):
    with pytest.raises(ValueError, match="execution is 'fast'; expected eager, streams, graphs, compile"):
        executed(tree_of("dinov2", "clip"), "fast")
