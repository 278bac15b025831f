"""What a model, a tree and the halves of its walk are called with: taken as it is meant, or refused in one sentence."""

import numpy as np
import torch
from messages_kit import NAN, refused
from PIL import Image

from vst import fit_stitches, load_vfm
from vst.tree.baseline import FullEncoders, FullTower

pytest_plugins = ("messages_kit",)


def test_calls_of_a_tree(saved):
    tree, _ = saved
    pixels = torch.randn(1, 3, 56, 56)
    wanted = tree(pixels, split=2)
    for split in ("2", np.int64(2), 2.0, {"clip": 2}, {"clip": np.int64(2)}, "clip=2", torch.tensor(2)):
        assert torch.equal(tree(pixels, split=split), wanted)
    for splits in (2, "2", [np.int64(2)], ["2"]):
        assert list(tree.sweep(pixels, splits)) == [2]
        assert set(tree.taps(pixels, splits)) == set(tree.taps(pixels, [2]))
    picture = Image.new("RGB", (70, 60))
    for wrong in (picture, np.zeros((1, 3, 56, 56)), [pixels], None, "picture.png"):
        for call in (tree, tree.features, tree.sweep, tree.taps, tree.trunk):
            refused(lambda call=call, wrong=wrong: call(wrong), type(wrong).__name__, "transform()")
    for kind in (torch.uint8, torch.int64, torch.bool):
        refused(lambda kind=kind: tree(torch.zeros(1, 3, 56, 56, dtype=kind)), str(kind), "normalised")
    refused(lambda: tree(pixels[0]), "[3, 56, 56]", "[batch, 3, 56, 56]")
    for split in (True, 2.5, [2], "deep", {"clip": True}, {"clip": None}, {1: 2}):
        refused(lambda split=split: tree(pixels, split=split))
    for weights in ([NAN, 1.0], 0.5, ["a", "b"]):
        refused(lambda weights=weights: tree.set_fusion("additive", weights=weights), "fusion_weights")
    for call in (tree.sweep, tree.taps, tree.walk):
        refused(lambda call=call: call(pixels, []), "splits are []")
        refused(lambda call=call: call(pixels, b"2"), "b'2'")
    assert torch.equal(tree(pixels, split=2), wanted)


def test_features_after_a_fit_are_for_numpy(tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    pixels = torch.stack([tree.transform()(picture) for picture in pictures[:2]])
    assert tree.features(pixels)["clip"].tokens.requires_grad  # in training, for whoever trains through them
    fit_stitches(tree, pictures, {"objective": "ridge"}, show_progress=False)
    with torch.no_grad():
        wanted = tree.branch_tokens(pixels)["clip"].numpy()
    assert np.array_equal(tree.features(pixels)["clip"].tokens.numpy(), wanted)
    assert tree.branch_tokens(pixels)["clip"].requires_grad
    assert tree.train().features(pixels)["clip"].map.requires_grad


@torch.no_grad()
def test_depths_tokens_and_pixels_of_a_model(tiny):
    model = load_vfm(tiny("clip"))
    pixels = torch.randn(2, 3, 56, 56)
    wanted = model.taps(pixels, [1, 2])
    for depths in ((1, 2), {1, 2}, iter([2, 1]), np.array([1, 2]), torch.tensor([1, 2]), [1.0, 2], range(1, 3)):
        found = model.taps(pixels, depths)
        assert list(found) == [1, 2]
        assert all(type(depth) is int and torch.equal(found[depth], wanted[depth]) for depth in found)
    assert torch.equal(model.taps(pixels, 2)[2], wanted[2])
    assert torch.equal(model(pixels, 2.0), wanted[2])
    assert all(torch.equal(*pair) for pair in zip(model(pixels, [2, 1]), wanted.values(), strict=True))
    assert torch.equal(model.run(wanted[1], np.int64(1), 2.0), wanted[2])
    for depth in (1.5, "1", -1, True, 9, None, NAN, [1], b"1"):
        for call in (model.taps, model.walk):
            refused(lambda call=call, depth=depth: dict(call(pixels, [depth])), "depth", "0 to 4")
        if depth not in (None, [1]):  # which stand for all that is held, and for several
            refused(lambda depth=depth: model(pixels, depth))
        refused(lambda depth=depth: model.run(wanted[1], 1, depth))
    refused(lambda: model.taps(pixels, []), "depths", "[]")
    for wrong in (None, "x", np.zeros((2, 17, 32)), wanted[1][0], wanted[1][..., :31], wanted[1].long()):
        for call in (lambda x: model.run(x, 0, 2), model.patches, model.features):
            refused(lambda call=call, wrong=wrong: call(wrong), "tokens", "[batch, tokens, 32]")
    for kind in (torch.float16, torch.bfloat16, torch.float64):  # as a tree does
        assert torch.equal(model(pixels.to(kind)), model(pixels.to(kind).float()))
    for strange in (pixels.transpose(2, 3).contiguous().transpose(2, 3), pixels.clone().requires_grad_()):
        assert torch.allclose(model(strange), model(pixels), atol=1e-5)
    assert model(pixels[:0]).shape == (0, 17, 32)
    refused(lambda: model(pixels.to("meta")), "on cpu", "on meta")
    refused(lambda: model.reset_parameters("a"), "seed", "'a'")
    for grid in (10**6, 10**30):
        refused(lambda grid=grid: load_vfm(tiny("clip"), grid=grid), "grid", "1024")
    for shape in ((2, 1, 56, 56), (2, 56, 56, 3), (2, 3, 57, 57), (2, 4, 56, 56)):
        refused(lambda shape=shape: model(torch.zeros(shape)), str(list(shape)), "[batch, 3, 56, 56]")


def test_what_the_halves_of_a_walk_are_handed(saved):
    tree, _ = saved
    pixels = torch.randn(1, 3, 56, 56)
    taps = tree.taps(pixels)
    wanted = tree.branch_tokens(pixels)
    assert all(torch.equal(x, wanted[name]) for name, x in tree.from_taps(taps).items())
    for wrong in (None, 3, "x", list(taps.values()), {**taps, "a": pixels}, {2: "x"}, {2: taps[2].numpy(force=True)}):
        refused(lambda wrong=wrong: tree.from_taps(wrong), "taps")
    for wrong in (taps[2][:, :9], taps[2][..., :5], taps[2][0]):
        refused(lambda wrong=wrong: tree.from_taps({**taps, 2: wrong}), "taps[2]", str(list(wrong.shape)))
    other = FullTower(tree.config)
    for wrong in (None, 3, pixels, {"clip": pixels}):
        refused(lambda wrong=wrong: FullEncoders.forward(other, wrong), "dinov2")
    refused(lambda: tree.transform()(Image.new("RGB", (0, 5))), "0 x 5")
