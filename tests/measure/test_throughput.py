"""What fitting takes: FLOPs against sums done by hand, memory against what checkpointing must save."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch

from vst import VSTEncoder, cli
from vst.fit.cache import TargetCache
from vst.fit.matching import Matcher
from vst.fit.teacher import Teacher
from vst.measure.cost import fit_flops, tree_cost
from vst.measure.inspect import inspect_tree
from vst.measure.scaling import check_division, measure_scaling
from vst.measure.throughput import Batch, FitStep, first_paying_epoch, measure_fit, measure_ridge
from vst.tree.stitches import STITCHES, StitchSpec


@pytest.fixture
def tree(tree_of):
    return tree_of("dinov2", "clip", splits=(1, 2, 3))


def test_flops_of_a_step_on_paper(tree):
    """What torch counts in a step, forward and backward, is what the closed form says."""
    found = measure_fit(tree, batch_size=2, repeats=2, show_progress=False)
    rows = {r["name"]: r for r in found["rows"]}
    config, picture = tree.config, 2  # two pictures

    def on_paper(splits, cached=False):
        return picture * fit_flops(config, splits, cached=cached) / 1e9

    assert rows["all depths in one pass"]["gflops"] == pytest.approx(on_paper([1, 2, 3]), rel=0.03)
    assert rows["all depths, reading targets"]["gflops"] == pytest.approx(on_paper([1, 2, 3], cached=True), rel=0.03)
    for split in (1, 2, 3):
        assert rows[f"split {split} alone"]["gflops"] == pytest.approx(on_paper([split]), rel=0.03)
    assert rows["all depths, writing targets"]["gflops"] == rows["all depths in one pass"]["gflops"]
    assert found["flops_ratio"] == pytest.approx(on_paper([1, 2, 3]) / sum(on_paper([s]) for s in (1, 2, 3)), rel=0.03)
    assert found["over"] == pytest.approx(found["time_ratio"] / found["flops_ratio"])
    assert found["time_ratio_low"] <= found["time_ratio"] <= found["time_ratio_high"]


@pytest.mark.parametrize("family", sorted(STITCHES))
def test_the_paper_covers_every_family_to_the_share_of_its_stitches(tree_of, family):
    """Half a forward pass of the stitches, more or less."""
    tree = tree_of("dinov2", "dinov2", splits=(1, 2), widths=(32, 32), stitch=family)
    counted = measure_fit(tree, batch_size=1, repeats=1, show_progress=False)["rows"][0]["gflops"] * 1e9
    stitches = sum(tree_cost(tree.config, s).stitches for s in tree.splits)
    assert abs(counted - fit_flops(tree.config)) < 1.2 * stitches


def test_a_plan_counts_what_each_branch_holds(tree_of):
    """Splits that branches do not share: one pass is no more than the sum of separate runs, and both are told."""
    apart = tree_of("dinov2", "clip", "siglip", splits={"clip": [1, 2], "siglip": [3]})
    alone = [fit_flops(apart.config, [s]) for s in (1, 2, 3)]
    assert max(alone) < fit_flops(apart.config) < sum(alone)
    only = tree_of("dinov2", "siglip", splits=(3,))
    assert fit_flops(apart.config, [3]) == fit_flops(only.config)
    assert fit_flops(apart.config, [3], cached=True) < fit_flops(apart.config, [3])
    inspect_tree(apart.config, torch.float16)
    with pytest.raises(ValueError, match="Split 4 was asked for; expected some of"):
        fit_flops(apart.config, [4])


def test_checkpointing_bounds_what_is_kept(tree):
    kept, recomputed = (
        {r["name"]: r["saved_mb"] for r in measure_fit(tree, repeats=1, checkpointing=c, show_progress=False)["rows"]}
        for c in (False, True)
    )
    assert recomputed["split 1 alone"] < 0.6 * kept["split 1 alone"]
    # of a checkpointed block its input alone is kept: a second one adds [B, T, D] in fp32
    more = recomputed["split 1 alone"] - recomputed["split 2 alone"]
    assert more * 2**20 == pytest.approx(4 * 17 * 48 * 4, rel=0.2)
    assert not any(branch.tail.checkpointing for branch in tree.branches.values())


def test_a_matcher_of_some_splits_is_a_part_of_the_whole(tree):
    teacher = Teacher(tree)
    whole, part = Matcher(teacher), Matcher(teacher, splits=[2])
    pixels, own = torch.randn(2, 3, 56, 56), torch.randn(2, 3, 56, 56)
    target = {"clip": whole.wanted("clip", teacher.target("clip", own))}
    assert part.keys == [("clip", 2)]
    assert teacher.taps(pixels, part.keys).keys() == {2}
    assert torch.equal(part(teacher.taps(pixels, part.keys), target)[0], whole(teacher.taps(pixels), target)[1])


def test_the_command(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tree.save_pretrained(tmp_path / "tree")
    words = ["throughput", "--path", str(tmp_path / "tree"), "--repeats", "1", "--out", str(tmp_path / "run")]
    cli.main([*words, "--pictures", "3600", "--cache", str(tmp_path)])
    out = capsys.readouterr().out
    assert "hours / 3,600" in out
    assert "times what arithmetic allows" in " ".join(out.split())
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["rows"]
    assert [r["splits"] for r in rows] == [[1, 2, 3], [1, 2, 3], [1, 2, 3], [1], [2], [3]]
    assert all(r["working_mb"] >= r["saved_mb"] for r in rows)
    assert list(tmp_path.glob("vst-targets-*")) == []


def test_a_step_from_disk_is_the_step_from_the_models(tree):
    """Losses agree to what fp16 rounds off."""
    teacher, matcher = Teacher(tree), Matcher(Teacher(tree))
    step = FitStep(teacher, Batch.random(teacher, 2, "cpu"), matcher, bf16=False)
    computed = step.forward()
    with tempfile.TemporaryDirectory() as folder:
        caches = {n: TargetCache(folder, n, 2, s) for n, s in step.shapes().items()}
        step.writes = caches
        written = step.forward()
        step.writes, step.reads, step.teacher = {}, caches, _Blind(teacher)
        read = step.forward()
    assert torch.equal(written, read)
    torch.testing.assert_close(read, computed, rtol=1e-3, atol=1e-3)


class _Blind:
    """A teacher whose targets cannot be run."""

    def __init__(self, teacher):
        self.taps = teacher.taps


@pytest.mark.parametrize(
    ("writing", "reading", "epoch"),
    [(1.1, 0.8, 2), (1.0, 0.9, 2), (1.25, 0.8, 3), (1.55, 0.9, 7), (0.99, 0.9, 2), (1.1, 1.0, None), (0.99, 1.0, None)],
)
def test_the_epoch_from_which_a_cache_pays(writing, reading, epoch):
    assert first_paying_epoch(writing, reading) == epoch
    if epoch is not None:  # by going through the epochs
        passed = [n for n in range(1, 99) if max(writing, 1) + (n - 1) * reading < n - 1e-9]
        assert passed[0] == epoch


def test_the_closed_form_holds_the_same_for_any_number_of_tokens(tree):
    few, many = (measure_ridge(tree, repeats=n)[0] for n in (16, 40))  # the sample is full by then
    assert few["sums_mb"] == many["sums_mb"]
    x, y = tree.config.trunk.width, tree.config.branches[0].spec.width
    assert few["widths"] == [x, y]
    branch = replace(tree.config.branches[0], stitch=StitchSpec("mlp_skip", {"reads": 2}))
    two = VSTEncoder.skeleton(replace(tree.config, branches=(branch,)))
    assert measure_ridge(two, repeats=1)[0]["widths"] == [2 * x, y]
    sums = 8 * (x * x + x * y + x + 2 * y)  # fp64: xx, xy, x, y, yy
    assert few["sums_mb"] * 2**20 == pytest.approx(sums + 4 * (x + y) + 4 * 4096 * x, rel=0.2)


@pytest.mark.slow
def test_processes_are_measured_against_one_of_them(tree, tmp_path):
    tree.save_pretrained(tmp_path / "tree")
    words = ["throughput", "--path", str(tmp_path / "tree"), "--repeats", "2", "--out", str(tmp_path / "run")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = subprocess.run([*launch, "-m", "vst", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    found = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert [r["processes"] for r in found["rows"]] == [1, 2]
    assert found["speed_up_low"] <= found["speed_up"] <= found["speed_up_high"]
    assert found["efficiency"] == found["speed_up"] / 2


def test_one_process_is_nothing_to_scale(tree):
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        measure_scaling(tree)
    with pytest.raises(ValueError, match="batch_size is 4; expected a multiple of 3"):
        check_division(4, 3)


def test_a_cache_needs_a_folder(tree, tmp_path):
    with pytest.raises(ValueError, match="no folder: make it first"):
        measure_fit(tree, cache=tmp_path / "none")


def test_one_depth_has_nothing_to_be_compared_with(tree_of):
    with pytest.raises(ValueError, match="at least two"):
        measure_fit(tree_of("dinov2", "clip", splits=(2,)))
