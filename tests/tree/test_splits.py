"""Splits by branch, pairs of splits and enters, and who runs the branches."""

import pytest
import torch
from tree_kit import pixels_of

from vst import VSTEncoder
from vst.tree.splits import as_split, split_label


def test_a_split_by_branch_wherever_a_split_is_set(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip", "siglip", splits=[1, 3])
    pixels = pixels_of(tree)
    mixed = {"clip": 1, "siglip": 3}
    by_hand = tree.fuse([tree.branch_tokens(pixels, 3)["dinov2"], tree.branch_tokens(pixels, 1)["clip"],
                         tree.branch_tokens(pixels, 3)["siglip"]])  # fmt: skip
    for given in (mixed, "clip=1,siglip=3", '{"clip": 1, "siglip": 3}', "'siglip=3,clip=1'"):
        tree.split = given
        assert tree.split == mixed
        assert torch.equal(tree(pixels), by_hand)
    again = VSTEncoder.from_pretrained(tree.save_pretrained(tmp_path / "tree"))
    assert again.split == mixed
    assert torch.equal(again(pixels), by_hand)
    assert list(tree.config.choices()) == ["VST-1", "VST-3", "VST-clip=1,siglip=3"]
    small = VSTEncoder.from_pretrained(tmp_path / "tree", splits={"clip": [1], "siglip": [3]})
    assert torch.equal(small(pixels), by_hand)
    swept = tree.sweep(pixels, [mixed, 1])
    torch.testing.assert_close(swept["clip=1,siglip=3"], tree.branch_tokens(pixels, mixed))
    torch.testing.assert_close(swept[1], tree.branch_tokens(pixels, 1))
    assert tree.config.pruned([1]).split is None
    for bad in ({"clip": 1}, {"clip": 2, "siglip": 3}, "deep", "clip=1,clip=3", 1.5, True, {"clip": "1", "siglip": 3}):
        with pytest.raises(ValueError, match=r"expected exactly|no stitch at split 2|is no split"):
            tree.split = bad
    assert tree.split == mixed


def test_splits_and_what_they_enter_stay_pairs(tiny):
    models = {"trunk": tiny("dinov2", 32, 8), "branches": {"b": tiny("clip", 48, 8)}, "image_size": 56}
    (b,) = VSTEncoder.plan(**models, splits=[6, 2], enters={"b": [5, 3]}).branches
    assert (b.splits, b.enters) == ((2, 6), (3, 5))
    assert VSTEncoder.plan(**models, splits=[6, 2]).branches[0].splits == (2, 6)
    for splits, enters in (([2, 6], [5, 3]), ([2, 6], [3]), ([2, 2], [3, 4])):
        with pytest.raises(ValueError, match=r"expected (deeper splits to enter no earlier|one for each split)"):
            VSTEncoder.plan(**models, splits=splits, enters={"b": enters})


def test_branches_are_handed_to_a_scheduler(tree_of):
    """What a branch does is done inside its fork, before the trunk goes on beyond where it leaves."""
    from contextlib import contextmanager

    tree = tree_of("dinov2", "clip", "siglip", splits=[1, 3])
    pixels, seen = pixels_of(tree), []

    class Noted:
        @contextmanager
        def fork(self, name, *inputs):
            seen.append(f"{name} begins")
            yield
            seen.append(f"{name} ends")

        def join(self, *outputs):
            seen.append(f"{len(outputs)} joined")

    for name, block in tree.trunk.blocks.items():
        block.register_forward_hook(lambda *_, name=name: seen.append(f"trunk {name}"))
    (tokens,) = tree.walk(pixels, [{"clip": 1, "siglip": 3}], Noted())
    assert seen == ["trunk 0", "clip begins", "clip ends", "trunk 1", "trunk 2", "siglip begins", "siglip ends",
                    "3 joined"]  # fmt: skip
    torch.testing.assert_close(tokens, tree.branch_tokens(pixels, {"clip": 1, "siglip": 3}))


@pytest.mark.parametrize("split", [14, {"clip": 14, "siglip": 6}])
def test_a_label_is_read_back_as_its_split(split):
    assert as_split(split_label(split)) == split


def test_a_tap_that_is_lacking_is_named(tree_of):
    tree = tree_of("dinov2", "clip", splits=[1, 3])
    pixels = pixels_of(tree)
    with pytest.raises(ValueError, match=r"at depths \[1, 3\] were given; this split needs \[2\]"):
        tree_of("dinov2", "clip", splits=[1, 2]).from_taps(tree.taps(pixels), 2)
