"""What fitting takes: FLOPs against sums done by hand, memory against what checkpointing must save."""

import json

import pytest
import torch

from vst import cli
from vst.cost import tree_cost
from vst.matching import Matcher, Teacher
from vst.throughput import measure_fit


@pytest.fixture
def tree(tree_of):
    return tree_of("dinov2", "clip", splits=(1, 2, 3))


def test_flops_of_a_step_by_hand(tree):
    """Per block: forward in trunk, target and tail, and in the tail a backward pass to its input (as much again)."""
    found = measure_fit(tree, batch_size=2, repeats=2, show_progress=False)
    rows = {r["name"]: r for r in found["rows"]}
    config, patches = tree.config, 16
    trunk, target = config.trunk, config.branches[0].spec
    stop, picture = config.branches[0].stop, 2 * 2  # two pictures, two FLOPs a MAC

    def by_hand(splits, cached=False):
        macs = trunk.stem_macs(patches) + max(splits) * trunk.block_macs(patches)
        macs += 0 if cached else target.stem_macs(patches) + stop * target.block_macs(patches)
        for split in splits:
            # twice more in the stitch (to its input only where a layer lies below), once more in the tail
            macs += 2 * (stop - split) * target.block_macs(patches)
            macs += 2.5 * tree_cost(config, split).stitches
        return picture * macs / 1e9

    assert rows["all depths in one pass"]["gflops"] == pytest.approx(by_hand([1, 2, 3]), rel=0.1)
    assert rows["all depths, targets cached"]["gflops"] == pytest.approx(by_hand([1, 2, 3], cached=True), rel=0.1)
    for split in (1, 2, 3):
        assert rows[f"split {split} alone"]["gflops"] == pytest.approx(by_hand([split]), rel=0.1)
    assert found["flops_ratio"] == pytest.approx(by_hand([1, 2, 3]) / sum(by_hand([s]) for s in (1, 2, 3)), rel=0.03)
    assert found["over"] == pytest.approx(found["time_ratio"] / found["flops_ratio"])
    assert found["time_ratio_low"] <= found["time_ratio"] <= found["time_ratio_high"]


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


def test_the_command(tree, tmp_path, capsys):
    tree.save_pretrained(tmp_path / "tree")
    words = ["throughput", "--path", str(tmp_path / "tree"), "--repeats", "1", "--out", str(tmp_path / "run")]
    cli.main([*words, "--pictures", "3600"])
    out = capsys.readouterr().out
    assert "hours / 3,600" in out
    assert "times what arithmetic allows" in " ".join(out.split())
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["rows"]
    assert [r["splits"] for r in rows] == [[1, 2, 3], [1, 2, 3], [1], [2], [3]]


def test_one_depth_has_nothing_to_be_compared_with(tree_of):
    with pytest.raises(ValueError, match="at least two"):
        measure_fit(tree_of("dinov2", "clip", splits=(2,)))
