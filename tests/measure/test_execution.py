"""Every execution gives the tower's tokens."""

import subprocess
import sys

import pytest
import torch

from vst import VSTEncoder
from vst.measure.execution import CAPTURED, EXECUTIONS, runner
from vst.measure.latency import measure_tree
from vst.tree.baseline import FullEncoders, FullTower

CUDA = [pytest.param(execution, marks=pytest.mark.cuda) for execution in ("streams", "graphs")]


def test_all_are_tested():
    assert set(EXECUTIONS) == {"eager", "streams", "graphs", *COMPILED["cuda"]}
    assert set(CAPTURED) < set(EXECUTIONS)


@pytest.mark.parametrize("execution", ["eager", "streams"])
def test_tokens_on_a_cpu(tree_of, execution):
    check_tokens(tree_of("dinov2", "siglip"), execution)


@pytest.mark.parametrize("execution", CUDA)
def test_tokens_on_a_gpu(tree_of, execution):
    check_tokens(tree_of("dinov2", "siglip").to("cuda"), execution, batches=(1, 2))


@torch.no_grad()
def check_tokens(tree, execution, batches=(2,)):
    """At each split and batch size, on new pictures and on new weights in their old place."""
    device = next(tree.parameters()).device
    full = FullEncoders.load(tree.config).to(device)
    tower = FullTower.from_config(tree.config).to(device)
    call, whole, one = runner(tree, execution), runner(full, execution), runner(tower, execution)
    sides = {n: m.image_size for n, m in full.models.items()}
    kept = []
    for scale in (1.0, 1.05):
        for p in (*tree.parameters(), *full.parameters(), *tower.parameters()):
            p.mul_(scale)
        for batch in batches:
            for _ in range(2):
                pixels = torch.randn(batch, 3, tree.image_size, tree.image_size, device=device)
                kept += [(call(pixels, split=split), tree(pixels, split=split)) for split in tree.splits]
                kept.append((one(pixels), tower(pixels)))
                each = {n: torch.randn(batch, 3, side, side, device=device) for n, side in sides.items()}
                kept.append((whole(each), full(each)))
    for tokens, expected in kept:  # after all calls: no later one wrote over an earlier one's tokens
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    with torch.enable_grad():
        assert execution == "eager" or not call(pixels).requires_grad


COMPILED = {"cpu": ("compile",), "cuda": ("compile", "compiled-graphs")}


@pytest.mark.slow
def test_compiled(tree_of, tmp_path, device):
    """In a process of its own: torch's compiler wants setuptools before anything imports the old distutils."""
    tree_of("dinov2", "siglip").save_pretrained(tmp_path / "tree")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path / "tree"), device], capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0, done.stderr


def check_compiled(path, device):
    torch.backends.cudnn.allow_tf32 = False
    tree = VSTEncoder.from_pretrained(path).to(device)
    for execution in COMPILED[device]:
        check_tokens(tree, execution, batches=(1, 2) if execution in CAPTURED else (2,))  # compiling takes long
        rows = measure_tree(tree, device=device, repeats=1, execution=execution, show_progress=False)
        assert [r["name"] for r in rows if r["kind"] == "full"] == ["all in full", f"all in full, {execution}"]
        hidden = [r["execution"] == "compile" and device == "cpu" for r in rows]
        assert [r["peak_mb"] is None for r in rows] == hidden


def test_what_cannot_be(tree_of):
    tree = tree_of("dinov2", "clip")
    with pytest.raises(ValueError, match="execution is 'fast'; expected eager, streams, graphs, compile, compiled"):
        runner(tree, "fast")
    for execution in CAPTURED:
        with pytest.raises(ValueError, match="on cpu, but graphs need CUDA: move it first, or use streams or compile"):
            runner(tree, execution)


if __name__ == "__main__":
    check_compiled(*sys.argv[1:])
