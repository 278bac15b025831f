"""What is measured, on a CPU and on a GPU: rows of towers, steps of a fit, and models that are given."""

import pytest
import torch

from vst.measure.benchmark import BenchmarkConfig, benchmark
from vst.measure.execution import CAPTURED
from vst.measure.latency import measure_tree
from vst.measure.throughput import measure_fit
from vst.tree.baseline import FullEncoders

EXECUTIONS = ["eager", "streams", *(pytest.param(e, marks=pytest.mark.cuda) for e in CAPTURED if "compiled" not in e)]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_latency_in_bf16(tree_of, device, execution):
    if execution in CAPTURED and device == "cpu":
        pytest.skip("graphs are for a GPU")
    tree = tree_of("dinov2", "clip", "siglip")
    rows = measure_tree(
        tree, batch_size=2, repeats=2, device=device, dtype=torch.bfloat16, execution=execution, show_progress=False
    )
    singles = [f"{name} alone" for name in tree.config.specs]
    full = ["all in full"] + [f"all in full, {execution}"] * (execution != "eager")
    assert [r["name"] for r in rows] == [*full, *singles, "VST-1", "VST-3"]
    assert all(r["peak_mb"] > 0 and r["images_per_s"] > 0 and r["dtype"] == "bfloat16" for r in rows)
    assert next(tree.parameters()).device.type == "cpu"  # the caller's tree stays where it was


def test_latency_command(tree_of, device, tmp_path):
    pytest.importorskip("matplotlib")
    config = BenchmarkConfig([1], ["bfloat16"], repeats=1, device=device)
    rows = benchmark(tree_of(), config, tmp_path / "run", show_progress=False)
    assert (tmp_path / "run" / "latency.png").stat().st_size > 0
    assert benchmark(tree_of(), config, tmp_path / "run", resume=True, show_progress=False) == rows


def test_models_that_are_given_are_measured(tree_of, device):
    tree = tree_of("dinov2", "clip")
    full, calls = FullEncoders.load(tree.config, pretrained=False), []
    full.models["clip"].register_forward_hook(lambda *_: calls.append(1))
    full.models["clip"].blocks["0"].register_forward_hook(lambda *_: calls.append(1))
    measure_tree(tree, repeats=1, device=device, full=full, show_progress=False)
    assert calls
    other = FullEncoders.load(tree_of("dinov2", "siglip").config, pretrained=False)
    for wrong in (other, FullEncoders(tree.config, {"clip": full.models["clip"]})):
        with pytest.raises(ValueError, match=r"expected the tree's models, \['dinov2', 'clip'\], at 4"):
            measure_tree(tree, full=wrong, show_progress=False)


def test_steps_of_a_fit_in_bf16(tree_of, device):
    kept, recomputed = (
        measure_fit(
            tree_of("dinov2", "clip", splits=(1, 2)), batch_size=2, repeats=1, device=device, bf16=True,
            checkpointing=checkpointing, show_progress=False,
        )["rows"][0]
        for checkpointing in (False, True)
    )  # fmt: skip
    assert 0 < recomputed["saved_mb"] < kept["saved_mb"]
    assert kept["gflops"] < recomputed["gflops"]
    assert min(kept["working_mb"], recomputed["working_mb"]) > 0
