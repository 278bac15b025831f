"""The tree against its models run by hand, and against itself compiled and in several processes."""

import gc
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES
from tree_kit import pixels_of

from vst import VSTEncoder, load_vfm
from vst.tree.config import feature_depth


@pytest.mark.parametrize("branch", FAMILIES)
@pytest.mark.parametrize("trunk", FAMILIES)
def test_features_are_the_models_run_by_hand(tiny, tree_of, trunk, branch):
    tree = tree_of(trunk, branch, splits=[1, 3])
    pixels = pixels_of(tree)
    whole, target = load_vfm(tiny(trunk, 32), grid=4), load_vfm(tiny(branch, 48, seed=1), grid=4)
    own = whole.patches(whole.taps(pixels, [3])[3])  # 4 blocks, hidden state -2: after 3 blocks
    for split in (1, 3):
        stitch = tree.branches[tree.config.branches[0].name].stitches[str(split)]
        z = stitch(whole.taps(pixels, [split])[split], whole)
        by_hand = target.patches(target.run(z, split, 3))
        features = tree.features(pixels, split=split)
        (name, first), (_, second) = features.items()
        assert name == tree.config.trunk_name
        torch.testing.assert_close(first.tokens, own)
        torch.testing.assert_close(second.tokens, by_hand)
        assert second.map.shape == (2, 48, 4, 4)
        torch.testing.assert_close(second.map[:, :, 1, 2], second.tokens[:, 1 * 4 + 2])
        fused = tree(pixels, split=split)
        torch.testing.assert_close(fused, torch.cat([F.layer_norm(own, (32,)), F.layer_norm(by_hand, (48,))], -1))
        assert fused.shape == (2, tree.tokens, tree.width)


@pytest.mark.parametrize("layer", [-1, -2, -4, 0, 3])
def test_features_of_any_block(tiny, layer):
    source = tiny("dinov2")
    tree = VSTEncoder.from_vfms(source, [], [], 56, feature_layer=layer, normalise="none")
    whole = load_vfm(source, grid=4)
    depth = feature_depth(whole.spec, layer)
    pixels = pixels_of(tree)
    torch.testing.assert_close(tree(pixels), whole.patches(whole.taps(pixels, [depth])[depth]))
    assert len(tree.trunk.blocks) == depth


def test_final_norm_on_request(tiny, tree_of):
    tree = tree_of("dinov2", "clip", feature_layer=-1, feature_norm=True, normalise="none")
    whole = load_vfm(tiny("dinov2"), grid=4)
    pixels = pixels_of(tree)
    torch.testing.assert_close(tree.features(pixels)["dinov2"].tokens, whole.patches(whole(pixels)))


def test_models_of_unequal_depth_enter_at_the_same_relative_depth(tiny):
    tree = VSTEncoder.from_vfms(
        tiny("dinov2", depth=24),
        {"siglip": tiny("siglip", 48, depth=27), "giant": tiny("dinov2", 48, depth=40), "clip": tiny("clip", depth=24)},
        [6, 14, 22],
        56,
    )
    assert [b.enters for b in tree.config.branches] == [(7, 16, 25), (10, 23, 37), (6, 14, 22)]
    assert [b.stop for b in tree.config.branches] == [26, 39, 23]
    pixels = pixels_of(tree, 1)
    assert tree(pixels, split=14).shape == (1, 16, 32 + 48 + 48 + 32)
    by_branch = tree.branch_tokens(pixels, {"siglip": 6, "giant": 22, "clip": 14})
    torch.testing.assert_close(by_branch["giant"], tree.branch_tokens(pixels, 22)["giant"])
    torch.testing.assert_close(by_branch["siglip"], tree.branch_tokens(pixels, 6)["siglip"])
    two = {"a": tiny("clip", depth=24), "b": tiny("siglip", 48, depth=27)}
    apart = VSTEncoder.from_vfms(tiny("dinov2", depth=24), two, {"a": [6, 14], "b": [22]}, 56)
    assert apart.splits == []
    assert apart.split == {"a": 14, "b": 22}
    torch.testing.assert_close(apart(pixels), apart(pixels, split={"a": 14, "b": 22}))
    assert apart.config.choices() == {"VST shallowest": {"a": 6, "b": 22}, "VST deepest": {"a": 14, "b": 22}}
    assert apart.config.pruned({"a": [6], "b": [22]}).resolve(None) == {"a": 6, "b": 22}
    explicit = VSTEncoder.from_vfms(
        tiny("dinov2", depth=24), [tiny("siglip", 48, depth=27)], [6], enters={"siglip": [9]}
    )
    assert explicit.config.branches[0].enters == (9,)
    assert sorted(map(int, explicit.branches["siglip"].tail.blocks)) == list(range(9, 26))


def test_split_knob(tree_of):
    tree = tree_of("dinov2", "clip", splits=[1, 2, 3])
    pixels = pixels_of(tree)
    assert tree.split == 3
    assert torch.equal(tree(pixels), tree(pixels, split=3))
    tree.split = 1
    assert torch.equal(tree(pixels), tree(pixels, split=1))
    swept = tree.sweep(pixels)
    for split in (1, 2, 3):
        for name, tokens in tree.branch_tokens(pixels, split).items():
            torch.testing.assert_close(swept[split][name], tokens)
    with pytest.raises(ValueError, match=r"no stitch at split 4; it holds \[1, 2, 3\]"):
        tree(pixels, split=4)
    with pytest.raises(ValueError, match="no stitch at split 9"):
        tree.split = 9


@pytest.mark.parametrize("keep_trunk", [True, False])
def test_only_needed_blocks_run_and_are_held(tree_of, keep_trunk):
    tree = tree_of("dinov2", "clip", splits=[1, 2], keep_trunk=keep_trunk)
    assert list(tree.trunk.blocks) == (["0", "1", "2"] if keep_trunk else ["0", "1"])
    assert list(tree.branches["clip"].tail.blocks) == ["1", "2"]
    ran = []
    for name, block in [*tree.trunk.blocks.items(), *tree.branches["clip"].tail.blocks.items()]:
        block.register_forward_hook(lambda *_, name=name: ran.append(name))
    tree(pixels_of(tree), split=2)
    assert ran == (["0", "1", "2", "2"] if keep_trunk else ["0", "1", "2"])


def naive(fusion, a, b):
    if fusion == "channel":
        return torch.cat([a, b], -1)
    if fusion == "additive":
        return 0.25 * a + 0.75 * b
    if fusion == "sequence":
        return torch.cat([a, b], 1)
    rows = [row for i in range(a.shape[1]) for row in (a[:, i], b[:, i])]
    return torch.stack(rows, 1)


def test_a_new_fusion_is_one_entry(tree_of, tmp_path):
    from vst.tree.fusion import FUSIONS, Rule

    FUSIONS["maximum_for_test"] = Rule(lambda parts, weights: torch.stack(parts).amax(0))
    try:
        tree = tree_of("dinov2", "clip", widths=(32, 32), fusion="maximum_for_test", normalise="none")
        again = VSTEncoder.from_pretrained(tree.save_pretrained(tmp_path / "tree"))
        a, b = tree.branch_tokens(pixels_of(tree)).values()
        assert torch.equal(again(pixels_of(tree)), torch.maximum(a, b))
        assert (again.width, again.tokens) == (32, 16)
        with pytest.raises(ValueError, match="maximum_for_test' needs branches of equal width"):
            tree_of("dinov2", "clip", fusion="maximum_for_test")
    finally:
        del FUSIONS["maximum_for_test"]


@pytest.mark.parametrize("normalise", ["layer", "none"])
@pytest.mark.parametrize("fusion", ["channel", "additive", "interleave", "sequence"])
def test_fusions(tree_of, fusion, normalise):
    weights = [0.25, 0.75] if fusion == "additive" else None
    tree = tree_of("dinov2", "clip", widths=(32, 32), fusion=fusion, fusion_weights=weights, normalise=normalise)
    pixels = pixels_of(tree)
    a, b = tree.branch_tokens(pixels).values()
    if normalise == "layer":
        a, b = F.layer_norm(a, (32,)), F.layer_norm(b, (32,))
    torch.testing.assert_close(tree(pixels), naive(fusion, a, b))
    assert tree(pixels).shape[1:] == (tree.tokens, tree.width)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": [5]}, r"splits \[5\] must lie in 1..4"),
        ({"splits": [0, 2]}, r"must lie in 1..4"),
        ({"splits": []}, "must be ascending and not empty"),
        ({"splits": {"nobody": [1]}}, r"name the branches \['nobody'\]; the branches are \['clip'\]"),
        ({"stitch": "lora"}, "width 32.*width 48.*use linear"),
        ({"stitch": "magic"}, "Unknown stitch family 'magic'"),
        ({"fusion": "additive"}, "needs branches of equal width"),
        ({"fusion": "interleave"}, "needs branches of equal width"),
        ({"fusion": "mean"}, "fusion is 'mean'; expected one of"),
        ({"fusion_weights": [1.0]}, "belong to 'additive'"),
        ({"normalise": "batch"}, "normalise is 'batch'"),
        ({"cut": "zoom"}, "cut is 'zoom'"),
        ({"feature_layer": -9}, "hidden states -5 to 4"),
        ({"split": 2}, "no stitch at split 2"),
        ({"image_size": 60}, r"60 is not a multiple of its patch of 14 pixels; use 56 or 70"),
        ({"enters": {"clip": [1]}}, "expected one for each split"),
        ({"enters": {"clip": [1, 4]}}, r"must lie in 0..3"),
    ],
)
def test_bad_trees_are_named(tiny, options, message):
    kept = {"splits": [1, 3], "image_size": 56, **options}
    with pytest.raises(ValueError, match=message):
        VSTEncoder.from_vfms(tiny("dinov2"), [tiny("clip", 48)], **kept)


def test_one_string_is_no_list_of_branches(tiny):
    with pytest.raises(ValueError, match="expected a list of sources"):
        VSTEncoder.from_vfms(tiny("dinov2"), tiny("clip"), [1])


def test_wrong_pictures_are_named(tree_of):
    tree = tree_of("dinov2", "clip")
    with pytest.raises(ValueError, match=r"shape \[2, 3, 70, 70\]; expected \[batch, 3, 56, 56\]"):
        tree(torch.zeros(2, 3, 70, 70))


def test_names_of_branches_are_told_apart(tiny, tree_of):
    assert tree_of("clip", "clip", "clip").config.names == ["clip", "clip_2", "clip_3"]
    named = VSTEncoder.from_vfms(tiny("clip"), {"clip": tiny("clip", 48)}, [1])
    assert named.config.names == ["clip_trunk", "clip"]


def test_random_trees_are_reproducible(tiny):
    make = lambda seed: VSTEncoder.from_vfms(tiny("dinov2"), [tiny("clip", 48)], [1], pretrained=False, seed=seed)  # noqa: E731
    a, b, c = (make(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_split_by_argument_under_compile(tree_of):
    tree = tree_of("dinov2", "dinov3", splits=[1, 2, 3])
    pixels = pixels_of(tree)
    compiled = torch.compile(tree, backend="aot_eager")
    with torch.no_grad():
        for split in (3, 1, 2, 3):
            torch.testing.assert_close(compiled(pixels, split=split), tree(pixels, split=split), atol=1e-5, rtol=1e-5)


def _ddp_worker(rank, folder, port):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    checked = _ddp_check(rank, folder)
    gc.collect()  # what refers to the group has to go before it: freed later, it can wait for gloo's threads for ever
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"rank{rank}.json").write_text(json.dumps(checked))


def _ddp_check(rank, folder):
    """The splits at which tokens are the tree's and gradients are averaged, and reach the split's own stitch alone."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    tree, checked = VSTEncoder.from_pretrained(folder), []
    wrapped = DistributedDataParallel(tree, find_unused_parameters=True)
    for split in (1, 3):
        pixels = pixels_of(tree, seed=rank)
        out = wrapped(pixels, split=split)
        torch.testing.assert_close(out, tree(pixels, split=split))
        out.square().mean().backward()
        other = next(p for p in tree.branches["clip"].stitches["1" if split == 3 else "3"].parameters())
        used = next(p for p in tree.branches["clip"].stitches[str(split)].parameters())
        assert used.grad is not None
        assert float(used.grad.abs().sum()) > 0
        gathered = [torch.zeros_like(used.grad) for _ in range(2)]
        dist.all_gather(gathered, used.grad)
        torch.testing.assert_close(gathered[0], gathered[1])
        if split == 1:
            assert other.grad is None or float(other.grad.abs().sum()) == 0
        wrapped.zero_grad()
        checked.append(split)
    return checked


def test_split_by_argument_under_ddp(tree_of, tmp_path):
    import socket

    folder = tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_ddp_worker, (folder, port), nprocs=2)
    for rank in range(2):
        assert json.loads((folder / f"rank{rank}.json").read_text()) == [1, 3]


def test_a_trunk_that_ran_need_not_run_again(tree_of):
    tree = tree_of("dinov2", "clip", "dinov2_registers", splits=(1, 2, 3))
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        taps = tree.taps(pixels)
        for split in (1, 3, {"clip": 3, "dinov2_2": 1}):
            given, wanted = tree.from_taps(taps, split), tree.branch_tokens(pixels, split)
            assert list(given) == list(wanted)
            assert all(torch.equal(given[name], wanted[name]) for name in wanted)
        assert (set(tree.taps(pixels, [1])), set(taps)) == ({1, 3}, {1, 2, 3})  # 3 for the trunk's own features
        apart = tree_of("dinov2", "clip", "dinov2_registers", splits={"clip": [1], "dinov2_2": [2]})
        given, wanted = apart.from_taps(apart.taps(pixels)), apart.branch_tokens(pixels)
        assert all(torch.equal(given[name], wanted[name]) for name in wanted)
