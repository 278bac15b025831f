"""Every execution gives the tower's tokens."""

import subprocess
import sys

import pytest
import torch

from vst import VSTEncoder
from vst.measure.execution import EXECUTIONS, runner
from vst.measure.latency import measure_tree
from vst.tree.baseline import FullEncoders

KINDS = [
    "eager",
    "streams",
    pytest.param("graphs", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
]


def test_all_are_tested():
    assert {getattr(k, "values", (k,))[0] for k in KINDS} | {"compile"} == set(EXECUTIONS)


@pytest.mark.parametrize("execution", KINDS)
def test_tokens(tree_of, execution):
    check_tokens(tree_of("dinov2", "siglip").to("cuda" if execution == "graphs" else "cpu"), execution)


def check_tokens(tree, execution):
    device = next(tree.parameters()).device
    full = FullEncoders.load(tree.config).to(device)
    call, whole = runner(tree, execution), runner(full, execution)
    for _ in range(2):
        pixels = torch.randn(2, 3, tree.image_size, tree.image_size, device=device)
        for split in tree.splits:
            torch.testing.assert_close(call(pixels, split=split), tree(pixels, split=split), atol=1e-4, rtol=1e-4)
    each = {n: torch.randn(2, 3, m.image_size, m.image_size, device=device) for n, m in full.models.items()}
    torch.testing.assert_close(whole(each), full(each), atol=1e-4, rtol=1e-4)
    assert execution == "eager" or not call(pixels).requires_grad


@pytest.mark.slow
def test_compiled(tree_of, tmp_path):
    """In a process of its own: torch's compiler wants setuptools before anything imports the old distutils."""
    tree_of("dinov2", "siglip").save_pretrained(tmp_path / "tree")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "tree")], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr


def check_compiled(path):
    tree = VSTEncoder.from_pretrained(path)
    check_tokens(tree, "compile")
    rows = measure_tree(tree, repeats=1, execution="compile", show_progress=False)
    assert [r["name"] for r in rows if r["kind"] == "full"] == ["all in full", "all in full, compile"]
    assert [r["peak_mb"] is None for r in rows] == [r["execution"] == "compile" for r in rows]


def test_an_unknown_one(tree_of):
    with pytest.raises(ValueError, match="execution is 'fast'; expected eager, streams, graphs, compile"):
        runner(tree_of("dinov2", "clip"), "fast")


if __name__ == "__main__":
    check_compiled(sys.argv[1])
