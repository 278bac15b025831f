"""Stitches that read several depths of the trunk: against models run by hand, least squares, and each way of a tree."""

import pytest
import torch
from tree_kit import pixels_of

from vst import VSTEncoder, evaluate_stitches, fit_stitches, load_vfm
from vst.fit.teacher import TRUNK_PIXELS, Teacher, transforms
from vst.measure.overlap import Streams
from vst.tree.stitches import StitchSpec

TWO = {"family": "mlp_skip", "reads": 2}


@pytest.mark.parametrize(
    ("reads", "split", "depths"),
    [(1, 10, (10,)), (2, 10, (5, 10)), (3, 10, (3, 7, 10)), (5, 10, (2, 4, 6, 8, 10)), (2, 5, (3, 5)),
     (4, 3, (1, 2, 3)), (2, 1, (1,))],
)  # fmt: skip
def test_depths_are_the_split_and_others_evenly_before_it(reads, split, depths):
    assert StitchSpec("linear", {"reads": reads}).reads(split) == depths


def test_other_families_read_one():
    assert StitchSpec("mlp_skip").reads(10) == (10,)
    assert StitchSpec("lora").reads(10) == (9,)
    assert str(StitchSpec("mlp_skip")) == "mlp_skip"
    assert str(StitchSpec.parse(TWO)) == "mlp_skip(reads=2)"


@pytest.mark.parametrize(
    "given",
    ["lora", "mlp_skip(reads=2)", "lora(rank=8, alpha=16.0)", " lora ( rank = 8,alpha=16.0 )", StitchSpec("linear")],
)
def test_a_stitch_is_read_as_it_is_written(given):
    spec = StitchSpec.parse(given)
    assert StitchSpec.parse(str(spec)) == spec
    assert str(spec).replace(" ", "") == str(given).replace(" ", "")
    assert StitchSpec.parse(spec.to_dict()) == spec


@pytest.mark.parametrize("text", ["lora(rank=8", "lora(8)", "lora(rank=8, rank=4)", "lora()", "lora(rank=8)x"])
def test_text_of_another_form_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"expected a family and its options, each once: lora\(rank=16\)"):
        StitchSpec.parse(text)


@pytest.mark.parametrize("text", ["lora(rank=many)", "lora(rank=)", "lora(rank=2.5)"])
def test_an_option_that_is_none_is_refused(text):
    with pytest.raises((TypeError, ValueError), match="lora stitch: rank"):
        StitchSpec.parse(text)


@pytest.mark.parametrize(("trunk", "branch"), [("dinov2", "clip"), ("clip", "dinov2_registers"), ("siglip", "dinov3")])
def test_features_are_the_models_run_by_hand(tiny, tree_of, trunk, branch):
    tree = tree_of(trunk, branch, splits=[2, 3], stitch=TWO)
    pixels = pixels_of(tree)
    whole, target = load_vfm(tiny(trunk, 32), grid=4), load_vfm(tiny(branch, 48, seed=1), grid=4)
    name = tree.config.branches[0].name
    for split, depths in ((2, [1, 2]), (3, [2, 3])):
        x = whole.taps(pixels, depths)
        z = tree.branches[name].stitches[str(split)](torch.cat([x[d] for d in depths], -1), whole)
        wanted = target.patches(target.run(z, split, 3))
        torch.testing.assert_close(tree.branch_tokens(pixels, split)[name], wanted)
        taps = tree.taps(pixels, [split])
        assert set(taps) == {*depths, 3}
        assert torch.equal(tree.from_taps(taps, split)[name], tree.branch_tokens(pixels, split)[name])
        alone = VSTEncoder.from_config(tree.config)  # in streams, where a branch waits for all that it reads
        alone.load_state_dict(tree.state_dict())
        (found,) = alone.walk(pixels, [split], Streams(pixels.device))
        torch.testing.assert_close(found[name], wanted)
    swept = tree.sweep(pixels)
    assert all(torch.equal(swept[s][name], tree.branch_tokens(pixels, s)[name]) for s in (2, 3))


def test_no_block_is_run_for_a_depth_that_is_read(tree_of):
    tree = tree_of("dinov2", "clip", splits=[2], stitch=TWO, keep_trunk=False)
    ran = []
    for name, block in tree.trunk.blocks.items():
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    tree(pixels_of(tree))
    assert ran == ["0", "1"]


@pytest.mark.parametrize("family", ["linear", "mlp_skip"])
def test_the_closed_form_is_the_least_squares_map_of_both_depths(tree_of, pictures, family):
    tree = tree_of("dinov2", "clip", splits=[3], stitch={"family": family, "reads": 2})
    told = fit_stitches(tree, pictures, objective="ridge", penalty=1e-9, heldout=2, calibration=38, show_progress=False)
    teacher = Teacher(tree)
    heldout = evaluate_stitches(tree, pictures, show_progress=False)[0]
    batch = {n: torch.stack([t(p) for p in pictures]) for n, t in transforms(tree).items()}
    with torch.no_grad():
        taps = teacher.taps(batch[TRUNK_PIXELS])
        x = torch.cat([taps[2], taps[3]], -1)[:, 1:]
        y = teacher.target("clip", batch["target_clip"])[3][:, 1:]
        given = tree.branches["clip"].stitches["3"](torch.cat([taps[2], taps[3]], -1), None)[:, 1:]
    assert told.explained["clip@3"] > 0
    assert heldout.family == f"{family}(reads=2)"
    design = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1).double()
    best = design @ torch.linalg.lstsq(design, y.flatten(0, 1).double()).solution
    worst = (best - y.flatten(0, 1)).square().sum()
    assert (given.flatten(0, 1) - y.flatten(0, 1)).square().sum() < 1.02 * worst + 1e-6  # 38 of these 40 were seen


def test_two_depths_come_closer_than_one_and_train_on(tree_of, pictures):
    errors = {}
    for reads in (1, 2):
        tree = tree_of("dinov2", "clip", splits=[3], stitch={"family": "mlp_skip", "reads": reads})
        result = fit_stitches(tree, pictures, epochs=6, batch_size=8, lr=3e-3, show_progress=False)
        assert result.history[-1]["mean"] < result.history[0]["mean"]
        errors[reads] = evaluate_stitches(tree, pictures, show_progress=False)[0].final.channel_error
    assert errors[2] < errors[1]


def test_a_tuned_trunk_reaches_the_earlier_depth_too(tree_of, pictures, tmp_path):
    tree = tree_of("dinov2", "clip", splits=[2, 3], stitch=TWO)
    tune = {"trunk": "lora", "tails": "norms", "rank": 2, "lr": 1e-2}
    fit_stitches(tree, pictures, tune=tune, match="mix", folder=tmp_path / "run", batch_size=8, show_progress=False)
    assert tree.config.tuned.trunk_blocks == 3
    again = VSTEncoder.from_pretrained(tmp_path / "run" / "stitches")
    pixels = pixels_of(tree)
    assert again.config == tree.config
    assert all(torch.equal(again(pixels, split=s), tree(pixels, split=s)) for s in (2, 3))
    less = VSTEncoder.from_pretrained(tree.save_pretrained(tmp_path / "tree"), splits=[2])
    assert torch.equal(less(pixels), tree(pixels, split=2))


def test_folding_keeps_the_map(tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[3], stitch=TWO)
    fit_stitches(tree, pictures, objective="ridge", show_progress=False)
    pixels = pixels_of(tree)
    before = tree(pixels)
    for stitch in tree.stitches().values():
        stitch.fold()
    torch.testing.assert_close(tree(pixels), before, rtol=1e-4, atol=1e-4)
