"""Tuning of trunk and tails: gradients against plain models, what changes and what does not, what is saved of it."""

import copy
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import parametrize

from vst import FitConfig, TuneConfig, VSTEncoder, evaluate_stitches, evaluate_trunk, fit_stitches, load_vfm
from vst.fit.matching import Matcher
from vst.fit.teacher import TRUNK_PIXELS, Teacher, transforms
from vst.fit.tuning import Tuning
from vst.measure.throughput import measure_fit
from vst.tree.changes import Tuned, changes_digest, norms_of

BOTH = {"trunk": "lora", "tails": "lora", "rank": 4, "lr": 1e-2}
FIT = {"epochs": 4, "batch_size": 8, "lr": 3e-3, "show_progress": False}


def state_of(tree):
    return {k: v.clone() for k, v in tree.state_dict().items()}


def seen(tree, pictures):
    return {n: torch.stack([t(p) for p in pictures]) for n, t in transforms(tree).items()}


@pytest.fixture(scope="module")
def tuned(tree_of, pictures, tmp_path_factory):
    """A tree that was tuned, what it was before, what the fit told, and its run folder."""
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    before, folder = state_of(tree), tmp_path_factory.mktemp("tuned") / "run"
    result = fit_stitches(tree, pictures, tune=BOTH, match="mix", folder=folder, **FIT)
    return tree, before, result, folder


@pytest.mark.parametrize("trunk", ["dinov2", "dinov3"])
@pytest.mark.parametrize("branch", ["clip", "siglip", "dinov2_registers", "dinov3"])
def test_losses_and_gradients_are_those_of_plain_models(tree_of, pictures, trunk, branch):
    """With weights W + s B A put into plain models, by the chain rule: dA = s B' dW and dB = s dW A'."""
    tree = tree_of(trunk, branch, splits=[1, 2])
    plain = tree_of(trunk, branch, splits=[1, 2])
    plain.load_state_dict(tree.state_dict())
    name, batch = next(iter(tree.branches)), seen(tree, pictures[:5])
    teacher = Teacher(tree)
    teacher.hold(trunk=True, tails=True)
    tuning = Tuning(tree, TuneConfig(**BOTH, alpha=6.0), 0)
    matcher = Matcher(teacher, match="raw", tuning=tuning, own=0.5)
    generator = torch.Generator().manual_seed(3)
    for change in tuning.changes.values():
        change.lora_B.data.normal_(0, 0.02, generator=generator)
    wanted = {n: matcher.wanted(n, teacher.target(n, batch[teacher.pixels_of(n)])) for n in matcher.names()}
    losses = matcher(batch[TRUNK_PIXELS], wanted)
    matcher.total(losses).backward()

    weights = dict(plain.named_parameters())
    names = {key.replace("-", "."): change for key, change in tuning.changes.items()}
    for key, change in names.items():
        weights[key].data += 6.0 / 4 * change.lora_B.detach() @ change.lora_A.detach()
        weights[key].requires_grad_(True)
    taps = plain.trunk.taps(batch[TRUNK_PIXELS], [1, 2, 3])
    own, target = load_vfm(plain.config.trunk, grid=4), load_vfm(plain.config.branches[0].spec, grid=4)
    patches = target.patches(target.taps(batch[f"target_{name}"], [3])[3])
    expected = [
        (target.patches(plain.branches[name].run_tail(plain.branches[name].stitches[str(s)](taps[s], plain.trunk), s))
         - patches).square().mean()
        for s in (1, 2)
    ]  # fmt: skip
    kept = own.patches(own.taps(batch[TRUNK_PIXELS], [3])[3])
    expected.append((plain.trunk.patches(taps[3]) - kept).square().mean())
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-6)
    (expected[0] + expected[1] + 0.5 * 2 * expected[2]).backward()
    assert {k.partition(".")[0] for k in names} == {"trunk", "branches"}
    for key, change in names.items():
        grad = 6.0 / 4 * weights[key].grad
        scale = float(grad.abs().max())
        torch.testing.assert_close(change.lora_A.grad, change.lora_B.detach().T @ grad, rtol=1e-3, atol=1e-5 * scale)
        torch.testing.assert_close(change.lora_B.grad, grad @ change.lora_A.detach().T, rtol=1e-3, atol=1e-4 * scale)
    stitches, same = (t.branches[name].stitches.parameters() for t in (tree, plain))
    for p, q in zip(stitches, same, strict=True):
        torch.testing.assert_close(p.grad, torch.zeros_like(p) if q.grad is None else q.grad, rtol=1e-3, atol=1e-5)
    tuning.detach()


def test_only_what_is_said_changes_and_by_no_more_than_the_rank(tuned):
    tree, before, result, _ = tuned
    after = state_of(tree)
    assert after.keys() == before.keys()
    assert not any(parametrize.is_parametrized(m) for m in tree.modules())
    assert not any(p.requires_grad for n, p in tree.named_parameters() if ".stitches." not in n)
    moved = {k for k in after if not torch.equal(after[k], before[k]) and ".stitches." not in k}
    matrix = re.compile(r"(trunk\.blocks\.[01]|branches\.clip\.tail\.blocks\.[12])\.(attn|mlp)\.\w+\.weight")
    assert moved == {k for k in after if matrix.fullmatch(k)}  # trunk blocks that no stitch comes after stay
    for k in moved:
        assert torch.linalg.matrix_rank((after[k] - before[k]).double(), rtol=1e-4) <= 4
    assert tree.config.tuned == Tuned(
        trunk_blocks=2, tails="lora", rank=4, pictures=32, steps=16, digest=changes_digest(tree.changes),
        own_error=result.own.error, own_channel_error=result.own.channel_error,
    )  # fmt: skip


def test_it_brings_the_branch_closer_and_the_report_is_against_the_published_models(tuned, tree_of, tiny, pictures):
    tree, _, result, _ = tuned
    alone = tree_of("dinov2", "clip", splits=[1, 2])
    plain = fit_stitches(alone, pictures, match="mix", **FIT)
    for a, b in zip(result.reports, plain.reports, strict=True):
        assert a.final.channel_error < b.final.channel_error
    with torch.no_grad():
        batch = seen(tree, pictures[:9])
        target, trunk = load_vfm(tiny("clip", 48, seed=1), grid=4), load_vfm(tiny("dinov2"), grid=4)
        y = target.patches(target.taps(batch["target_clip"], [3])[3]).flatten(0, 1).double()
        given = tree.branch_tokens(batch[TRUNK_PIXELS], 2)
        off = (given["clip"].flatten(0, 1) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert evaluate_stitches(tree, pictures[:9])[1].final.error == pytest.approx(float(off), rel=1e-4)
        x = trunk.patches(trunk.taps(batch[TRUNK_PIXELS], [3])[3]).flatten(0, 1).double()
        off = (given["dinov2"].flatten(0, 1) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert evaluate_trunk(tree, pictures[:9]).error == pytest.approx(float(off), rel=1e-4)
        assert 0 < result.own.error < 1
    assert evaluate_trunk(alone, pictures[:9]).error == 0


def test_the_term_of_the_trunks_own_features_holds_it(tuned, tree_of, pictures):
    free, held = (
        fit_stitches(tree_of(splits=[1]), pictures, tune={**BOTH, "lr": 0.1, "own": own}, match="mix", **FIT)
        for own in (0.0, 30.0)
    )
    assert free.own.error > 2 * held.own.error > 0
    assert "own" not in free.history[0]
    assert held.history[-1]["own"] > 0
    apart = tree_of("dinov2", "clip", splits=[1, 2], keep_trunk=False)
    assert fit_stitches(apart, pictures, tune=BOTH, **FIT).own is None  # no features of its own come out
    assert apart.config.tuned.own_error is None


def test_stitches_alone_carry_the_changes_to_the_bit(tuned, tree_of, tmp_path):
    tree, _, _, folder = tuned
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    wanted, tokens = state_of(tree), tree(pixels)

    def equal(other):
        return all(torch.equal(v, other.state_dict()[k]) for k, v in wanted.items() if k in other.state_dict())

    loaded = VSTEncoder.from_pretrained(folder / "stitches")
    assert equal(loaded)
    assert loaded.config == tree.config
    torch.testing.assert_close(loaded(pixels), tokens)
    fresh = tree_of("dinov2", "clip", splits=[1, 2])
    fresh.load_stitches(folder / "stitches")
    assert equal(fresh)
    fresh.load_stitches(folder / "stitches")  # what is tuned already is not tuned again
    assert equal(fresh)
    fresh.load_stitches(loaded.save_stitches(tmp_path / "again"))
    assert equal(fresh)
    for split in (1, 2):  # trunk blocks that are held for the trunk's own features stay tuned
        cut = VSTEncoder.from_pretrained(folder / "stitches", splits=[split])
        assert equal(cut)
        again = VSTEncoder.from_pretrained(cut.save_stitches(tmp_path / f"cut-{split}"))
        torch.testing.assert_close(again(pixels), cut(pixels))
    half = VSTEncoder.from_pretrained(folder / "stitches", dtype="bfloat16")
    whole = VSTEncoder.from_pretrained(tree.save_pretrained(tmp_path / "whole"), dtype="bfloat16")
    assert all(torch.equal(v, half.state_dict()[k]) for k, v in whole.state_dict().items())
    assert whole.config == half.config == tree.config


def test_what_was_tuned_is_told(tuned, tmp_path, capsys):
    from vst import cli

    tree, _, _, folder = tuned
    told = tree.config.tuned.told()
    assert "trunk blocks 1 to 2 by low-rank changes (rank 4, all matrices) and the tails by the same" in told
    assert "trained in 16 steps on 32 pictures and merged" in told
    assert f"relative error of {tree.config.tuned.own_error:.3f}" in told
    for made in (folder / "stitches", tree.save_pretrained(tmp_path / "whole")):
        assert told in (made / "README.md").read_text()
        cli.main(["inspect", str(made)])
        assert "Tuned: trunk blocks 1 to 2" in capsys.readouterr().out
    plain = replace(tree.config, tuned=None)
    assert "tuned" not in plain.to_dict()


def test_a_whole_tuned_tree_is_saved_whole_and_not_tuned_again(tuned, pictures, tmp_path):
    tree, _, _, _ = tuned
    whole = VSTEncoder.from_pretrained(tree.save_pretrained(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"was loaded whole.*save it whole \(save_pretrained\)"):
        whole.save_stitches(tmp_path / "stitches")
    with pytest.raises(ValueError, match="was loaded whole"):
        fit_stitches(whole, pictures, folder=tmp_path / "run", **FIT)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"was tuned already .*build it from its sources"):
        fit_stitches(whole, pictures, tune=BOTH, **FIT)
    before = state_of(whole)
    fit_stitches(whole, pictures, **FIT)  # its stitches alone
    moved = {k for k, v in whole.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert all(".stitches." in k for k in moved)


def test_stitches_of_a_tree_that_was_not_tuned_do_not_go_into_one_that_was(tuned, tree_of, tmp_path):
    plain = tree_of("dinov2", "clip", splits=[1, 2])
    tree = VSTEncoder.from_pretrained(tuned[3] / "stitches")
    with pytest.raises(ValueError, match="not tuned, and this tree is tuned already"):
        tree.load_stitches(plain.save_stitches(tmp_path / "plain"))
    config = (tuned[3] / "stitches" / "config.json").read_text()
    damaged = tuned[0].save_stitches(tmp_path / "damaged")
    (damaged / "config.json").write_text(config.replace('"rank": 4', '"rank": 5'))
    with pytest.raises(ValueError, match="says tuned"):
        VSTEncoder.from_pretrained(damaged)


def test_one_training_is_not_taken_for_another(tuned, tree_of, pictures, tmp_path):
    """Of the same recipe, on the same pictures, by another seed."""
    other = tree_of("dinov2", "clip", splits=[1, 2])
    fit_stitches(other, pictures, tune=BOTH, match="mix", folder=tmp_path / "other", **{**FIT, "seed": 1})
    tree = VSTEncoder.from_pretrained(tuned[3] / "stitches")
    with pytest.raises(ValueError, match="otherwise tuned, and this tree is tuned already"):
        tree.load_stitches(tmp_path / "other" / "stitches")
    plain = tree_of("dinov2", "clip", splits=[1, 2]).save_pretrained(tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "tuned": tree.config.tuned.to_dict()}))
    with pytest.raises(ValueError, match="says tuned"):  # of one that was not
        VSTEncoder.from_pretrained(plain)
    half = tree_of("dinov2", "clip", splits=[1, 2]).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"bfloat16, and changes are merged in fp32"):
        half.load_stitches(tuned[3] / "stitches")


def test_a_finished_tuned_fit_is_recalled_by_the_tree_that_it_made(tree_of, pictures, tmp_path):
    tree, folder, options = tree_of("dinov2", "clip", splits=[1, 2]), tmp_path / "run", {**FIT, "epochs": 1}
    first = fit_stitches(tree, pictures, tune=BOTH, folder=folder, **options)
    made = state_of(tree)
    again = fit_stitches(tree, pictures, tune=BOTH, folder=folder, resume=True, **options)
    assert again.to_dict() == first.to_dict()
    assert all(torch.equal(v, made[k]) for k, v in tree.state_dict().items())
    with pytest.raises(ValueError, match=r"differs in fit\.lr"):
        fit_stitches(tree, pictures, tune=BOTH, folder=folder, resume=True, **{**options, "lr": 0.5})
    refit = tmp_path / "refit"  # its stitches further, twice: what was measured of the trunk is no part of the run
    one = fit_stitches(tree, pictures, folder=refit, **options)
    two = fit_stitches(tree, pictures, folder=refit, resume=True, **options)
    assert one.reports == two.reports


def test_a_report_that_fails_gives_the_models_back(tree_of, pictures, tmp_path, monkeypatch):
    tree, folder, options = tree_of("dinov2", "clip", splits=[1, 2]), tmp_path / "run", {**FIT, "save_every": 8}
    before = state_of(tree)

    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr("vst.fit.loop.evaluate_stitches", fails)
        with pytest.raises(torch.OutOfMemoryError):
            fit_stitches(tree, pictures, tune=BOTH, folder=folder, **options)
    assert tree.config.tuned is None
    assert all(torch.equal(v, before[k]) for k, v in tree.state_dict().items() if ".stitches." not in k)
    fit_stitches(tree, pictures, tune=BOTH, folder=folder, resume=True, **options)
    assert tree.config.tuned.steps == 16


def test_parts_of_a_tuned_tree_tell_what_is_theirs(tiny, pictures):
    sources = {"trunk": tiny("dinov2"), "branches": [tiny("clip", 48)], "splits": [1, 3], "image_size": 56}
    tree = VSTEncoder.from_vfms(**sources, pretrained=False, seed=7, feature_layer=-1)
    fit_stitches(tree, pictures[:16], tune=BOTH, **{**FIT, "epochs": 1})
    alone = tree.trunk_alone()
    assert evaluate_trunk(alone, pictures[:5]).error == evaluate_trunk(tree, pictures[:5]).error  # of its own seed
    assert measure_fit(tree, batch_size=1, repeats=1)  # whose targets are random, and asked of no source
    apart = VSTEncoder.from_vfms(**sources, keep_trunk=False, feature_layer=-1)
    fit_stitches(apart, pictures[:16], tune=BOTH, **{**FIT, "epochs": 1})
    assert "trunk blocks 1 to 3" in apart.config.tuned.told()
    assert "trunk blocks 1 to 1" in apart.config.pruned([1]).tuned.told()
    lora = VSTEncoder.from_vfms(tiny("dinov2"), [tiny("clip", 32)], [1], 56, stitch="lora")
    with pytest.raises(ValueError, match="tune asks for trunk 'lora', and no block"):
        fit_stitches(lora, pictures, tune=BOTH, **FIT)
    for values in ({"trunk_blocks": 1, "own_error": 0.1}, {"rank": 4}, {"trunk_blocks": 1, "new": 1}):
        with pytest.raises(ValueError, match="tuned"):
            Tuned.from_dict(values)


def test_weights_that_cannot_be_put_in_place_leave_plain_ones(tree_of, monkeypatch):
    tree, own, calls = tree_of("dinov2", "clip", splits=[1, 2]), parametrize.register_parametrization, []
    order = list(tree.state_dict())

    def fourth_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        return own(*args, **kwargs)

    monkeypatch.setattr(parametrize, "register_parametrization", fourth_fails)
    with pytest.raises(torch.OutOfMemoryError):
        Tuning(tree, TuneConfig(**BOTH), 0)
    assert list(tree.state_dict()) == order  # also by which optimizers and files go


def test_a_report_of_the_branches_asks_for_no_trunk(tuned, tiny, pictures, monkeypatch):
    """Targets that are given are enough; the blocks after the features come from them as well."""
    target, own = load_vfm(tiny("clip", 48, seed=1), grid=4), load_vfm(tiny("dinov2"), grid=4)
    monkeypatch.setattr("vst.fit.teacher.checkpoints.load_vfm", lambda *args, **kwargs: pytest.fail("a source is read"))
    tree = tuned[0]
    assert evaluate_trunk(tree, pictures[:9], targets={"dinov2": own}).error > 0  # asks for no branch
    (_, report) = evaluate_stitches(tree, pictures[:9], targets={"clip": target})
    assert report.final.error < 1
    again, options = copy.deepcopy(tree), {**FIT, "epochs": 1}
    fit_stitches(again, pictures, targets={"clip": target}, beyond=True, **options)
    with pytest.raises(ValueError, match="The published trunk that was given"):
        Teacher(tree, {"clip": target, "dinov2": target})
    target.blocks["2"].norm1.weight.data += 1  # which low-rank changes leave alone
    with pytest.raises(ValueError, match="it is another checkpoint"):
        Teacher(tree, {"clip": target})


@pytest.mark.parametrize("trunk", ["clip", "dinov3"])
def test_norms_alone(tree_of, pictures, tmp_path, trunk):
    tree = tree_of(trunk, "dinov3", splits=[1])
    before = state_of(tree)
    folder = tmp_path / "run"
    fit_stitches(tree, pictures, tune={"tails": "norms"}, folder=folder, **FIT)
    moved = {k for k, v in tree.state_dict().items() if not torch.equal(v, before[k]) and ".stitches." not in k}
    tail = next(iter(tree.branches.values())).tail
    name = next(iter(tree.branches))
    assert moved == {f"branches.{name}.tail.blocks.{i}.{n}" for i, b in tail.blocks.items() for n in norms_of(b)}
    loaded = VSTEncoder.from_pretrained(folder / "stitches")
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in tree.state_dict().items())


@pytest.mark.parametrize(("matrices", "parts"), [("attention", {"attn"}), ("mlp", {"mlp"})])
def test_some_matrices_alone(tree_of, pictures, matrices, parts):
    tree = tree_of("dinov2", "clip", splits=[2], widths=(32, 32), stitch="lora")  # a stitch that reads trunk blocks
    before = state_of(tree)
    fit_stitches(tree, pictures, tune={**BOTH, "matrices": matrices}, **{**FIT, "epochs": 1})
    moved = {k for k, v in tree.state_dict().items() if not torch.equal(v, before[k]) and ".stitches." not in k}
    assert {k.split("blocks.")[1].split(".")[1] for k in moved} == parts


def test_a_lora_stitch_adapts_the_tuned_block(tree_of, pictures):
    """Its block is the trunk's own as it is tuned: the same tokens while weights are computed and once plain."""
    tree = tree_of("dinov2", "clip", splits=[2, 3], widths=(32, 32), stitch="lora")
    tuning, x = Tuning(tree, TuneConfig(**BOTH), 0), torch.randn(2, 17, 32)
    assert tree.config.branches[0].reads(3) == (2,)
    for change in tuning.changes.values():
        change.lora_B.data.normal_(0, 0.1)
    stitch = tree.branches["clip"].stitches["2"]  # adapts block 1, which is tuned
    computed = stitch(x, tree.trunk)
    changes = tuning.result()
    tuning.detach()
    untuned = stitch(x, tree.trunk)
    tree.take_changes(changes, replace(tree.config, tuned=TuneConfig(**BOTH).what(tree)))
    torch.testing.assert_close(computed, stitch(x, tree.trunk), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(untuned, computed, atol=1e-2)


@pytest.mark.parametrize(
    "changes", [{"checkpointing": True}, {"workers": 1}, {"cache": "cache"}], ids=lambda c: next(iter(c))
)
def test_how_it_is_run_changes_nothing(tuned, tree_of, pictures, tmp_path, changes):
    if "cache" in changes:
        changes = {"cache": str(tmp_path / "cache")}
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    fit_stitches(tree, pictures, tune=BOTH, match="mix", **FIT, **changes)
    close = 3e-2 if "cache" in changes else 1e-5  # halves are kept there
    for k, v in tuned[0].state_dict().items():
        torch.testing.assert_close(tree.state_dict()[k], v, rtol=close, atol=close)
    if "cache" in changes:
        assert len(list((tmp_path / "cache").glob("*/rows.f16"))) == 2  # the branch's, and the trunk's own


def test_bf16_is_close_and_leaves_fp32(tuned, tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    result = fit_stitches(tree, pictures, tune=BOTH, match="mix", precision="bf16", **FIT)
    assert all(p.dtype == torch.float32 for p in tree.parameters())
    for a, b in zip(result.reports, tuned[2].reports, strict=True):
        assert a.final.channel_error == pytest.approx(b.final.channel_error, rel=0.05)


def test_a_fit_that_fails_leaves_the_models_as_they_were(tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    before = state_of(tree)
    with pytest.raises(RuntimeError, match=r"not finite.*lower lr"):
        fit_stitches(tree, pictures, **{**FIT, "tune": {**BOTH, "lr": 1e20}})
    assert tree.config.tuned is None
    assert tree.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in tree.state_dict().items() if ".stitches." not in k)


def test_a_trunk_that_is_spoiled_is_told(tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    wild = {**BOTH, "lr": 1.0, "own": 0.0}
    with pytest.warns(UserWarning, match=r"own features are off the published model's by \d.*higher tune.own") as told:
        result = fit_stitches(tree, pictures, tune=wild, **FIT)
    assert result.own.channel_error > 0.5
    assert f"by {result.own.channel_error:.2f} by channel" in " ".join(str(w.message) for w in told)


def test_what_cannot_be_tuned_is_said(tree_of, pictures):
    for options, message in [
        ({"objective": "lfm", "tune": BOTH}, "tune.tails needs an objective that compares features behind the tail"),
        ({"objective": "ridge", "tune": {"trunk": "lora"}}, "tune.trunk needs an objective that is trained"),
        ({"objective": "lfm", "hints": 1, "beyond": True}, "hints, beyond need an objective"),
        ({"objective": "ridge", "start": "ridge", "match": "mix"}, "match 'mix' goes with objective .* only"),
    ]:
        with pytest.raises(ValueError, match=message):
            FitConfig(**options)
    with pytest.raises(TypeError, match="tune has no option 'tail'"):
        FitConfig(tune={"tail": "lora"})
    with pytest.warns(UserWarning, match="keeps no block"):
        tree = tree_of("dinov2", "clip", splits=[3])  # its features are read where it is entered
    with pytest.raises(ValueError, match="no block of this tree is left"):
        fit_stitches(tree, pictures, tune={"tails": "lora"}, **FIT)
    tree = tree_of("dinov2", "clip", splits=[1, 2], keep_trunk=False)
    for tune, message in [
        (
            {"trunk": "lora", "rank": 33},
            "tune.rank is 33, and trunk.blocks.0.attn.qkv.weight has a rank of 32",
        ),
        ({"trunk": "lora", "own": 2.0}, "tune.own is 2.0, but this tree does not keep its trunk's features"),
        ("lora", "tune is 'lora'; expected its fields, such as {'trunk': 'lora'}"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_stitches(tree, pictures, tune=tune, **FIT)
    with pytest.raises(ValueError, match="no branches, so it has no stitches"):
        evaluate_stitches(tree_of("dinov2", "clip", splits=[1]).trunk_alone(), pictures)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"rank": 8}, "tune.rank is 8.*needs tune.trunk or tune.tails: lora"),
        ({"tails": "norms", "matrices": "mlp"}, "tune.matrices is mlp.*: lora"),
        ({"lr": 0.1}, "tune.lr is 0.1.*needs tune.trunk or tune.tails;"),
        ({"tails": "lora", "own": 2.0}, "tune.own is 2.0.*needs tune.trunk: lora"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, needed):
    with pytest.raises(ValueError, match=needed):
        TuneConfig(**options)


def test_of_what_is_tuned_those_options_change_that_are_given():
    config = FitConfig(tune={"trunk": "lora", "tails": "lora", "rank": 8})
    assert FitConfig.of(config, {"tune": {"rank": 32}}).tune == TuneConfig("lora", "lora", 32)
    assert FitConfig.of(config, {"tune": {"tails": "none"}}).tune == TuneConfig("lora", "none", 8)
    assert FitConfig.of(config, {"tune": {"trunk": "none", "tails": "none"}}).tune == TuneConfig()
    assert FitConfig.of(config, {"tune": TuneConfig("lora")}).tune == TuneConfig("lora")


def test_what_was_cut_from_a_tree_before_stays_as_it_was(tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    alone, before = tree.trunk_alone(), state_of(tree.trunk_alone())
    fit_stitches(tree, pictures, tune=BOTH, **{**FIT, "epochs": 1})
    assert alone.config.tuned is None
    assert all(torch.equal(v, before[k]) for k, v in alone.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in tree.trunk_alone().state_dict().items())


def test_changes_go_into_the_weights_that_they_were_trained_on_alone(tuned, tree_of, tiny, tmp_path):
    stitches = tuned[3] / "stitches"
    others = [tiny("dinov2", seed=7), tiny("clip", 48, seed=8)]  # of the same shapes
    other = VSTEncoder.from_vfms(others[0], [others[1]], [1, 2], 56)
    before = state_of(other)
    with pytest.raises(ValueError, match=r"trained on other weights than this tree's models have, in \d+ of"):
        other.load_stitches(stitches)
    assert other.config.tuned is None
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
    again = tree_of("dinov2", "clip", splits=[1, 2])  # the same models, wherever they lie
    again.load_stitches(stitches)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tuned[0].state_dict().items())
    elsewhere = shutil.copytree(stitches, tmp_path / "elsewhere")  # the same files of stitches, other sources
    told = json.loads((stitches / "config.json").read_text())
    told["trunk"]["source"] = other.config.trunk.source
    (elsewhere / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"trained on other weights .*\(trunk\.blocks\.0"):
        VSTEncoder.from_pretrained(elsewhere)
    cut = VSTEncoder.from_pretrained(stitches, splits=[2])
    folder = cut.save_stitches(tmp_path / "cut")
    odd = VSTEncoder.from_vfms(others[0], [others[1]], [2], 56)
    with pytest.raises(ValueError, match="trained on other weights"):
        odd.load_stitches(folder)


def test_a_tuned_tree_that_was_loaded_whole_takes_its_changes_back(tuned, tmp_path):
    whole = VSTEncoder.from_pretrained(tuned[0].save_pretrained(tmp_path / "whole"))
    with pytest.raises(ValueError, match="loaded whole"):
        whole.save_stitches(tmp_path / "no")
    held = state_of(whole)
    whole.load_stitches(tuned[3] / "stitches")
    assert all(torch.equal(v, held[k]) for k, v in whole.state_dict().items())
    again = VSTEncoder.from_pretrained(whole.save_stitches(tmp_path / "stitches"))
    assert all(torch.equal(v, held[k]) for k, v in again.state_dict().items())
