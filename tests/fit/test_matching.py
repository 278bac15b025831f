"""Matching against losses written out by hand; similarity against naive formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vst import VSTEncoder, evaluate_stitches, load_vfm
from vst.fit.calibrations import Calibrations
from vst.fit.matching import Matcher
from vst.fit.similarity import AgreementSums, CKASums, FrechetSums
from vst.fit.teacher import TRUNK_PIXELS, Teacher, transforms


def batch_of(tree, pictures):
    return {n: torch.stack([t(p) for p in pictures]) for n, t in transforms(tree).items()}


def by_hand(tree, tiny, family, batch, split, objective, match):
    """One loss from whole models, step by step."""
    whole, target = load_vfm(tiny("dinov2", 32), grid=4), load_vfm(tiny(family, 48, seed=1), grid=4)
    branch = tree.branches[family]
    x = whole.taps(batch[TRUNK_PIXELS], [split])[split]
    y = target.taps(batch[f"target_{family}"], [split, 3])
    z = branch.stitches[str(split)](x, whole)
    patches = {d: target.patches(y[d]).flatten(0, 1) for d in y}
    if objective == "lfm":
        std = patches[split].std(0, correction=0)
        std = std if match == "channel" else (std**2).mean().sqrt()
        return (((z - y[split]) / std) ** 2).mean()
    end = target.patches(target.run(z, split, 3))
    if match == "norm":
        return F.mse_loss(target.norm(end), target.norm(target.patches(y[3])))
    std = patches[3].std(0, correction=0)
    std = std if match == "channel" else (std**2).mean().sqrt()
    return (((end - target.patches(y[3])) / std) ** 2).mean()


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov3"])
@pytest.mark.parametrize(
    ("objective", "match"), [("ffm", "channel"), ("ffm", "raw"), ("ffm", "norm"), ("lfm", "channel"), ("lfm", "raw")]
)
def test_losses_are_those_written_by_hand(tree_of, tiny, pictures, family, objective, match):
    tree = tree_of("dinov2", family, splits=[1, 2])
    batch = batch_of(tree, pictures[:6])
    teacher = Teacher(tree)
    matcher = Matcher(teacher, objective, match)
    taps = teacher.taps(batch[TRUNK_PIXELS])
    target = teacher.target(family, batch[f"target_{family}"])
    calibrations = Calibrations(tree, objective)
    calibrations.update(taps, {family: target})
    calibrations.set_scales(matcher)
    losses = matcher(taps, {family: matcher.wanted(family, target)})
    expected = [by_hand(tree, tiny, family, batch, split, objective, match) for split in (1, 2)]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(expected[0], list(tree.branches[family].stitches["1"].parameters()), allow_unused=True)
    losses.sum().backward()
    for p, g in zip(tree.branches[family].stitches["1"].parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if g is None else g, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for n, p in tree.named_parameters() if ".stitches." not in n)


def test_trunk_and_target_run_once_for_all_depths(tree_of, pictures):
    tree = tree_of("dinov2", "clip", "siglip", splits=[1, 2, 3])
    teacher = Teacher(tree)
    matcher = Matcher(teacher)
    ran = {"trunk": 0, "clip": 0, "siglip": 0}

    def count(name):
        return lambda *_: ran.update({name: ran[name] + 1})

    tree.trunk.blocks["0"].register_forward_hook(count("trunk"))
    for name in ("clip", "siglip"):
        teacher.heads[name].blocks["0"].register_forward_hook(count(name))
    batch = batch_of(tree, pictures[:3])
    taps = teacher.taps(batch[TRUNK_PIXELS])
    targets = {n: teacher.target(n, batch[f"target_{n}"]) for n in ("clip", "siglip")}
    losses = matcher(taps, {n: matcher.wanted(n, t) for n, t in targets.items()})
    assert losses.shape == (6,)
    assert ran == {"trunk": 1, "clip": 1, "siglip": 1}


def test_a_foreign_target_is_refused(tree_of, tiny):
    tree = tree_of("dinov2", "clip")
    with pytest.raises(ValueError, match=r"differs from the tree's own tail in block 2 .*another checkpoint"):
        Teacher(tree, {"clip": load_vfm(tiny("clip", 48, seed=5), grid=4)})
    with pytest.raises(ValueError, match="expected grid 4"):
        Teacher(tree, {"clip": load_vfm(tiny("clip", 48, seed=1), grid=3)})
    with pytest.raises(ValueError, match=r"given for \['siglip'\]; the branches are \['clip'\]"):
        Teacher(tree, {"siglip": load_vfm(tiny("clip", 48, seed=1), grid=4)})


def test_random_trees_find_their_own_targets(tiny):
    tree = VSTEncoder.from_vfms(tiny("dinov2"), [tiny("clip", 48)], [1, 2], 56, pretrained=False, seed=7)
    assert set(Teacher(tree).heads) == {"clip"}  # its check compares a block with the tree's tail


def test_unknown_objectives_are_named(tree_of):
    with pytest.raises(ValueError, match="objective 'tlt'"):
        Matcher(Teacher(tree_of("dinov2", "clip")), "tlt")


def test_self_stitch_of_the_true_features_is_exact(tiny, pictures):
    """A linear stitch from a model into itself can be the identity; its ridge start finds it."""
    tree = VSTEncoder.from_vfms(tiny("clip"), [tiny("clip")], [1, 2], 56, stitch="linear")
    teacher, calibrations = Teacher(tree), Calibrations(tree)
    batch = batch_of(tree, pictures)
    calibrations.update(teacher.taps(batch[TRUNK_PIXELS]), {"clip_2": teacher.target("clip_2", batch["target_clip_2"])})
    explained = calibrations.start(penalty=1e-8)
    assert min(explained.values()) > 0.9999
    for report in evaluate_stitches(tree, pictures, targets=teacher):
        assert report.final.error < 1e-3
        assert report.final.cosine > 0.999
        assert report.seam.error < 1e-4
        assert report.distance < 1e-3


def test_reports_are_the_formulas(tree_of, tiny, pictures):
    tree = tree_of("dinov2", "clip", splits=[2])
    (report,) = evaluate_stitches(tree, pictures[:7], batch_size=3)
    batch = batch_of(tree, pictures[:7])
    target = load_vfm(tiny("clip", 48, seed=1), grid=4)
    taps = tree.trunk.taps(batch[TRUNK_PIXELS], [2])
    y = target.taps(batch["target_clip"], [2, 3])
    z = tree.branches["clip"].stitches["2"](taps[2], tree.trunk)
    for got, given, wanted in ((report.seam, z, y[2]), (report.final, target.run(z, 2, 3), y[3])):
        a, b = (target.patches(t).detach().flatten(0, 1).double().numpy() for t in (given, wanted))
        off, spread = ((a - b) ** 2).sum(0), ((b - b.mean(0)) ** 2).sum(0)
        assert got.error == pytest.approx(off.sum() / spread.sum(), rel=1e-6)
        assert got.channel_error == pytest.approx((off / spread).mean(), rel=1e-6)
        cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert got.cosine == pytest.approx(cosine.mean(), rel=1e-6)
        assert got.tokens == 7 * 16


def test_the_mean_has_relative_error_one():
    y = torch.randn(200, 5) * torch.tensor([1.0, 2, 3, 4, 50]) + 7
    sums = AgreementSums()
    for part in y.split(31):
        sums.update(y.mean(0).expand_as(part), part)
    assert sums.result().error == pytest.approx(1, abs=1e-5)
    assert sums.result().channel_error == pytest.approx(1, abs=1e-5)


def test_frechet_distance_is_the_closed_form():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1, rng.normal(size=(400, 6)) * [1, 2, 3, 4, 5, 6]
    sums = FrechetSums()
    for x, y in zip(np.array_split(a, 5), np.array_split(b, 5), strict=True):
        sums.update(torch.tensor(x), torch.tensor(y))
    c1, c2 = np.cov(a.T, bias=True), np.cov(b.T, bias=True)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * np.real(sqrtm(c1 @ c2)))
    assert sums.result() == pytest.approx(wanted / np.trace(c2), rel=1e-4)
    same, constant = FrechetSums(), FrechetSums()
    y = torch.tensor(b)
    same.update(y, y)
    constant.update(y.mean(0).expand_as(y), y)
    assert same.result() == pytest.approx(0, abs=1e-4)
    assert constant.result() == pytest.approx(1, abs=1e-3)


def test_nothing_to_compare_is_an_error():
    with pytest.raises(ValueError, match="No tokens"):
        AgreementSums().result()
    with pytest.raises(ValueError, match="must pair up"):
        AgreementSums().update(torch.zeros(2, 3), torch.zeros(3, 3))


def test_linear_cka_written_out():
    torch.manual_seed(0)
    x, y = torch.randn(7, 9, 5) * 3 + 4, torch.randn(7, 9, 8)
    sums = CKASums()
    for at in (0, 3):
        sums.update(x[at : at + 3 + (at > 0)], y[at : at + 3 + (at > 0)])
    a, b = (t.flatten(0, 1).double() for t in (x, y))
    gram_a, gram_b = ((t - t.mean(0)) @ (t - t.mean(0)).T for t in (a, b))
    assert sums.result() == pytest.approx(float((gram_a * gram_b).sum() / gram_a.norm() / gram_b.norm()), rel=1e-5)
    turned = CKASums()
    turned.update(x, 2 * x @ torch.linalg.qr(torch.randn(5, 5)).Q + 1)
    assert turned.result() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="must pair up"):
        CKASums().update(x, y[:3])


def test_a_new_objective_is_one_class(tree_of, pictures, tmp_path):
    """Halfway through the tail: the fit, its units, its cache and its options read all they need from the class."""
    from vst import FitConfig, fit_stitches
    from vst.fit.objectives import OBJECTIVES, Objective, register

    @register
    class Halfway(Objective):
        name = "halfway"

        def depth(self, enter, stop):
            return (enter + stop) // 2

    try:
        tree = tree_of("dinov2", "clip", splits=[1], depths=(4, 4))  # enters at 1, features at 3: compared at 2
        batch = batch_of(tree, pictures[:8])
        teacher = Teacher(tree)
        sums = Calibrations(tree, "halfway")
        sums.observe(teacher, batch)
        matcher = Matcher(teacher, "halfway")
        sums.set_scales(matcher)
        branch, head = tree.branches["clip"], teacher.heads["clip"]
        seam = head.taps(batch["target_clip"], [1])[1]
        own = head.patches(branch.tail.run(seam, 1, 2))
        z = branch.stitches["1"](tree.trunk.taps(batch[TRUNK_PIXELS], [1])[1], tree.trunk)
        given = head.patches(branch.tail.run(z, 1, 2))
        by_hand = ((given - own) / own.flatten(0, 1).double().std(0, unbiased=False).float()).square().mean()
        wanted = matcher.wanted("clip", teacher.target("clip", batch["target_clip"], matcher.depths("clip")))
        losses = matcher(teacher.taps(batch[TRUNK_PIXELS]), {"clip": wanted})
        torch.testing.assert_close(losses, by_hand[None], rtol=1e-4, atol=1e-5)
        config = FitConfig(objective="halfway", epochs=2, lr=1e-3, cache=str(tmp_path))
        result = fit_stitches(tree, pictures, config, show_progress=False)
        assert result.history[-1]["mean"] < float(losses.detach().mean())
        assert result.cache_bytes == len(pictures) * (8 + 2 * 16 * 48)
    finally:
        del OBJECTIVES["halfway"]


def test_a_closed_form_that_a_family_has_not_is_an_error(tree_of, pictures):
    from vst import fit_stitches
    from vst.tree.stitches import STITCHES, Stitch, register

    @register
    class Scale(Stitch):
        family = "scale_for_test"

        def __init__(self, source, target, split):
            super().__init__(source, target, split)
            self.by = torch.nn.Parameter(torch.ones(()))

        def transform(self, x, trunk):
            return (x[:, :1] if self.maps_cls else None), self.by * x[:, self.source.prefix :]

    try:
        tree = tree_of("dinov2", "clip", widths=(32, 32), stitch="scale_for_test")
        for form in ("ridge", "procrustes"):
            with pytest.raises(ValueError, match=f"scale_for_test have no closed form, and '{form}' is nothing else"):
                fit_stitches(tree, pictures, objective=form, start=form, show_progress=False)
    finally:
        del STITCHES["scale_for_test"]
    for form in ("ridge", "procrustes"):
        tree = tree_of("dinov2", "dinov2_registers", splits=[2], widths=(32, 32))
        result = fit_stitches(tree, pictures, objective=form, start=form, show_progress=False)
        assert result.explained["dinov2_2@2"] > 0.2, form


@pytest.mark.parametrize("enter", [0, 1])
def test_hints_and_the_last_block_written_by_hand(tree_of, tiny, pictures, enter):
    tree = tree_of("dinov2", "clip", splits=[1], depths=(4, 6), enters=[enter])  # features at 5 of 6
    batch, whole = batch_of(tree, pictures[:6]), load_vfm(tiny("clip", 48, 6, seed=1), grid=4)
    teacher = Teacher(tree, beyond=True)
    matcher = Matcher(teacher, match="mix", hints=1, beyond=True)
    middle = enter + round((5 - enter) / 2)
    assert matcher.depths("clip") == [middle, 5, 6]
    sums = Calibrations(tree, matcher.compared)
    sums.observe(teacher, batch)
    sums.set_scales(matcher)
    wanted = matcher.wanted("clip", teacher.target("clip", batch["target_clip"], matcher.depths("clip")))
    (loss,) = matcher(teacher.taps(batch[TRUNK_PIXELS]), {"clip": wanted})
    z = tree.branches["clip"].stitches["1"](teacher.taps(batch[TRUNK_PIXELS])[1], tree.trunk)
    own = whole.taps(batch["target_clip"], [middle, 5, 6])
    parts = {}
    for depth in (middle, 5, 6):
        given, y = (whole.patches(t).flatten(0, 1) for t in (whole.run(z, enter, depth), own[depth]))
        std = y.std(0, correction=0)
        off = (given - y).square()
        parts[depth] = ((off / std**2).mean() + off.mean() / std.square().mean()) / 2
    torch.testing.assert_close(loss, parts[5] + (parts[middle] + parts[6]) / 2, rtol=1e-4, atol=1e-5)


def test_units_of_two_branches_of_a_family_are_held_apart(tiny, pictures):
    """A branch clip_2 at split 2 with a hint at depth 4, beside a branch clip at split 2 with hints of its own."""
    trunk, others = tiny("dinov2", 32, 6), [tiny("clip", 48, 6, seed=1), tiny("clip", 64, 6, seed=2)]
    tree = VSTEncoder.from_vfms(trunk, others, [2, 4], 56)
    assert list(tree.branches) == ["clip", "clip_2"]
    teacher = Teacher(tree)
    matcher = Matcher(teacher, hints=2)
    matcher.set_units(lambda name, depth: torch.full((48 if name == "clip" else 64,), depth + (name == "clip_2") / 2))
    held = {name: unit[0].item() for name, unit in matcher.named_buffers() if name.startswith("std_")}
    depths = {s: matcher.compared.depths(tree.branches["clip"].config, s) for s in (2, 4)}
    assert sorted(held.values()) == sorted(d + off for off in (0, 0.5) for own in depths.values() for d in own)
    assert max(len(own) for own in depths.values()) > 2


def test_what_no_tail_has_room_for_is_said(tree_of):
    with pytest.raises(ValueError, match=r"hints is 2, and the longest tail here has 0 depths between"):
        Matcher(Teacher(tree_of("dinov2", "clip", splits=[2])), hints=2)  # read at 3
    Matcher(Teacher(tree_of("dinov2", "clip", splits=[1, 2])), hints=1)
    with pytest.raises(ValueError, match="hints is 2, and the longest tail here has 1 depths"):
        Matcher(Teacher(tree_of("dinov2", "clip", splits=[1, 2])), hints=2)
    read = tree_of("dinov2", "clip", splits=[1], feature_layer=-1)
    with pytest.raises(ValueError, match=r"beyond is True, but every branch is read at its last block.*feature_layer"):
        Matcher(Teacher(read), beyond=True)
