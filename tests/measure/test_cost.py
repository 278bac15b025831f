"""Cost against torch's own count, the paper's figures and sums done by hand."""

import csv
import itertools
import json

import pytest
import torch
from conftest import FAMILIES

from vst import VSTConfig
from vst.measure import benchmark as bench
from vst.measure.benchmark import BenchmarkConfig, benchmark
from vst.measure.cost import counted_flops, extra_blocks, full_cost, model_cost, tree_cost, weights_bytes
from vst.measure.latency import measure, measure_tree, median_interval
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.baseline import FullEncoders
from vst.tree.config import BranchConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.stitches import STITCHES, StitchSpec

LARGE = {"width": 1024, "depth": 24, "heads": 16, "patch": 14, "hidden": 4096, "image_size": 336}


def vit_l(name, **options):
    return VFMSpec(source=name, family="vit", **{**LARGE, **options})


def large_tree(branches, splits, stitch="mlp"):
    configs = tuple(
        BranchConfig(f"b{i}", vit_l(f"b{i}"), tuple(splits), tuple(splits), 23, StitchSpec(stitch))
        for i in range(branches)
    )
    return VSTConfig(vit_l("trunk"), configs, 24)


def test_the_papers_block_figures():
    """Two 24-block models read at the last block but one; four of them: 300 % extra fall to 117 %, 54.3 % remain."""
    two, four = large_tree(1, [14, 22]), large_tree(3, [14])
    assert 100 * extra_blocks(two, 22) == pytest.approx(100 / 23)
    assert round(100 * extra_blocks(two, 22), 1) == 4.3
    assert round(100 * extra_blocks(two, 14), 1) == 39.1
    assert round(100 * extra_blocks(four, 14)) == 117
    assert round(100 * (1 + extra_blocks(four, 14)) / 4, 1) == 54.3
    # with the d -> d -> d mlp, a sixth of a block: 5.1 % and 39.9 %
    assert round(100 * extra_blocks(two, 22, stitch=True), 1) == 5.1
    assert round(100 * extra_blocks(two, 14, stitch=True), 1) == 39.9


def test_one_block_by_hand():
    spec = vit_l("x", registers=4)
    tokens = 576 + 5
    matrices = 1024 * 3072 + 1024 * 1024 + 2 * 1024 * 4096
    assert spec.block_macs(576) == tokens * matrices + 2 * tokens * tokens * 1024


READS = {"family": "mlp_skip", "reads": 2}


@pytest.mark.parametrize("stitch", [*sorted(STITCHES), READS], ids=str)
@pytest.mark.parametrize("trunk", ["dinov2", "dinov3"])
def test_analytic_flops_are_torchs(tree_of, trunk, stitch):
    tree = tree_of(trunk, "clip", "siglip", "dinov2_registers", splits=[1, 2, 3], widths=(32, 32), stitch=stitch)
    pixels = torch.zeros(1, 3, tree.image_size, tree.image_size)
    for split in tree.splits:
        counted = counted_flops(tree, pixels, split=split)
        assert tree_cost(tree.config, split).flops == pytest.approx(counted, rel=0.01)
    unequal = dict(zip(tree.branches, (1, 3, 2), strict=True))
    assert tree_cost(tree.config, unequal).flops == pytest.approx(counted_flops(tree, pixels, split=unequal), rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_models_and_all_in_full(tiny, tree_of, family):
    tree = tree_of("dinov2", family)
    full = FullEncoders.load(tree.config)
    pixels = {n: torch.zeros(1, 3, m.image_size, m.image_size) for n, m in full.models.items()}
    assert full_cost(tree.config).flops == pytest.approx(counted_flops(full, pixels), rel=0.01)
    for name, model in full.models.items():
        alone = FullEncoders(tree.config, {name: model})
        assert model_cost(model.spec, 4, model.stop).flops == pytest.approx(counted_flops(alone, pixels), rel=0.01)
        assert model_cost(model.spec, 4, model.stop).parameters == sum(p.numel() for p in model.parameters())


def test_swiglu_blocks_are_counted():
    spec = vit_l("x", width=32, heads=2, hidden=24, mlp="swiglu", depth=2, image_size=56)
    model = VFM(spec, 4).reset_parameters()
    cost = model_cost(spec, 4, 2)
    assert cost.flops == pytest.approx(counted_flops(model, torch.zeros(1, 3, 56, 56)), rel=0.01)


@pytest.mark.parametrize("stitch", [*sorted(STITCHES), READS], ids=str)
def test_parameters_of_a_split_are_what_a_pruned_tree_holds(tree_of, tmp_path, stitch):
    options = {"stitch": stitch, "keep_trunk": stitch == "mlp", "feature_norm": stitch == "lora"}
    tree = tree_of("dinov2", "dinov3", splits=[1, 2, 3], widths=(32, 32), **options)
    folder = tree.save_pretrained(tmp_path / "tree")
    for split in (1, 2, 3):
        held = sum(v.numel() for v in VSTEncoder.from_pretrained(folder, splits=[split]).state_dict().values())
        assert tree_cost(tree.config, split).parameters == held
        assert weights_bytes(tree.config, split, torch.float16) == 2 * held


def test_each_forward_runs_what_is_paid_for(tree_of):
    """Operation counts: a change that runs the trunk twice, or a block that is not needed, fails here."""
    from torch.profiler import ProfilerActivity, profile

    tree = tree_of("dinov2", "clip", splits=[1, 2, 3])
    pixels = torch.zeros(1, 3, 56, 56)
    for split in (1, 2, 3):
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as prof:
            tree(pixels, split=split)
        attention = sum(e.count for e in prof.key_averages() if e.key == "aten::scaled_dot_product_attention")
        assert attention == 3 + (3 - split)
        assert sum(e.count for e in prof.key_averages() if e.key == "aten::conv2d") == 1


def test_full_encoders_are_the_models(tree_of, tiny):
    from vst import load_vfm

    tree = tree_of("dinov2", "siglip")
    full = FullEncoders.load(tree.config)
    pixels = {n: torch.randn(2, 3, m.image_size, m.image_size) for n, m in full.models.items()}
    tokens = full.branch_tokens(pixels)
    target = load_vfm(tiny("siglip", 48, seed=1), grid=4)
    torch.testing.assert_close(tokens["siglip"], target.patches(target.taps(pixels["siglip"], [3])[3]))
    assert full(pixels).shape == (2, tree.tokens, tree.width)
    with pytest.raises(ValueError, match="expected some of"):
        FullEncoders(tree.config, {"nobody": target})


def test_measure_interleaves_and_pairs():
    order = []
    times = measure({n: lambda n=n: order.append(n) for n in "abc"}, reference="a", repeats=4, warmup=1)
    assert order[3:6] == ["a", "b", "c"]
    assert order[6:9] == ["b", "c", "a"]
    assert len(order) == 15
    assert times["a"].ratio == 1
    assert all(t.low_ms <= t.median_ms <= t.high_ms for t in times.values())
    with pytest.raises(ValueError, match="reference is 'z'"):
        measure({"a": lambda: None}, reference="z")


def test_the_interval_of_a_median_is_the_binomials():
    """Against Conover's table for n = 15 (fourth and twelfth value) and by enumeration of all outcomes for n = 7."""
    assert median_interval([float(i) for i in range(1, 16)]) == (4, 12)
    assert median_interval([3.0, 1.0, 2.0]) == (1, 3)
    assert median_interval([5.0]) == (5, 5)
    low, high = median_interval([float(i) for i in range(7)])
    outcomes = [sum(bits) for bits in itertools.product((0, 1), repeat=7)]  # how many values lie below the median
    covered = sum(low < below <= high for below in outcomes) / len(outcomes)
    assert covered >= 0.95
    assert sum(low + 1 < below <= high - 1 for below in outcomes) / len(outcomes) < 0.95


def test_a_slower_call_is_measured_as_slower():
    import time

    calls = {"one": lambda: time.sleep(0.004), "three": lambda: time.sleep(0.012)}
    assert measure(calls, reference="one", repeats=5)["three"].ratio == pytest.approx(3, rel=0.25)


def test_measure_tree_has_a_row_for_every_tower(tree_of):
    tree = tree_of("dinov2", "clip")
    rows = measure_tree(tree, repeats=2, show_progress=False)
    assert [r["name"] for r in rows] == ["all in full", "dinov2 alone", "clip alone", "VST-1", "VST-3"]
    full = next(r for r in rows if r["kind"] == "full")
    assert full["ratio"] == full["flops_ratio"] == 1
    by_name = {r["name"]: r["flops_ratio"] for r in rows}
    assert by_name["dinov2 alone"] + by_name["clip alone"] == pytest.approx(1)
    assert by_name["VST-3"] < by_name["VST-1"] < 1


def test_other_executions_are_measured_beside_the_eager_one(tree_of):
    rows = measure_tree(tree_of("dinov2", "clip"), repeats=1, execution="streams", show_progress=False)
    full = [(r["name"], r["execution"], r["flops_ratio"]) for r in rows if r["kind"] == "full"]
    assert full == [("all in full", "eager", 1), ("all in full, streams", "streams", 1)]
    assert {r["execution"] for r in rows if r["kind"] != "full"} == {"streams"}
    assert [r["name"] for r in rows if r["kind"] == "single"] == ["dinov2 alone", "clip alone"]


def test_the_benchmark_covers_all_pairs_and_goes_on(tree_of, tmp_path, monkeypatch):
    tree, config = tree_of("dinov2", "clip"), BenchmarkConfig([1, 3], ["float32", "bfloat16"], repeats=2)
    measured = []

    def until(stop):
        def once(*args, batch_size, dtype, **options):
            if len(measured) == stop:
                raise KeyboardInterrupt
            measured.append((dtype, batch_size))
            return measure_tree(*args, batch_size=batch_size, dtype=dtype, **options)

        return once

    run = tmp_path / "run"
    monkeypatch.setattr(bench, "measure_tree", until(3))
    with pytest.raises(KeyboardInterrupt):
        benchmark(tree, config, run, show_progress=False)
    assert not (run / "results.json").exists()
    monkeypatch.setattr(bench, "measure_tree", until(None))
    rows = benchmark(tree, config, run, resume=True, show_progress=False)
    assert measured == [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 3)]
    assert json.loads((run / "results.json").read_text())["results"] == rows
    assert len(rows) == 4 * 5
    for row in rows:
        assert row["images_per_s"] == pytest.approx(row["batch_size"] / row["median_ms"] * 1e3)
        assert row["gflops_per_s"] == pytest.approx(row["gflops"] * row["images_per_s"])
        assert row["ratio_sure_low"] <= row["ratio"] <= row["ratio_sure_high"]
        assert row["peak_mb"] > row["batch_size"] * 0.01
    with open(run / "latency.csv") as file:
        assert [float(r["median_ms"]) for r in csv.DictReader(file)] == [r["median_ms"] for r in rows]
    assert (run / "latency.png").stat().st_size > 5000
    assert next(tree.parameters()).dtype == torch.float32  # the caller's tree is left as it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtypes": ["int8"]}, "dtype is 'int8'"),
        ({"batch_sizes": []}, "at least one"),
        ({"batch_sizes": [0]}, r"batch_sizes\[0\] is 0; expected 1 to"),
        ({"repeats": 0}, "at least 1"),
        ({"execution": "yes"}, "execution is 'yes'"),
    ],
)
def test_bad_benchmarks_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkConfig(**options)
