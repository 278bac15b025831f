"""A tower whose weights accelerate places: kept on disk or another device, brought for each call."""

import pytest
import torch
import transformers as t
from accelerate import cpu_offload, disk_offload, infer_auto_device_map

from llava_integration import VSTVisionModel
from llava_integration.models.assemble import assemble
from vst import VSTEncoder
from vst.tree.baseline import FullTower

TREES = {
    "dinov2": (("dinov2", "clip"), {}),
    "registers": (("dinov2_registers", "dinov2_registers"), {}),
    "rotary": (("dinov3", "dinov3"), {}),
    "clip-siglip": (("clip", "siglip"), {}),
    "lora": (("dinov2", "clip"), {"stitch": "lora", "widths": (32, 32)}),
    "lora-rotary": (("dinov3", "clip"), {"stitch": "lora", "widths": (32, 32)}),
    "linear": (("siglip", "dinov2_registers"), {"stitch": "linear", "keep_trunk": False}),
}


def built(tree_of, name):
    """A tree with stitches that do something: what a hook forgets shows."""
    models, options = TREES[name]
    tree = tree_of(*models, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for stitch in tree.stitches().values():
            for p in stitch.parameters():
                p.normal_(0, 0.3)
            for n, b in stitch.named_buffers():
                b.copy_(torch.rand_like(b) + 0.5 * n.endswith("std"))
    return tree


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("places", ["disk", "parts"])
def test_a_tree_on_disk_gives_the_same_tokens(tree_of, tmp_path, name, places):
    tree = built(tree_of, name)
    tree.save_pretrained(tmp_path / "tree")
    device_map = {"": "disk"} if places == "disk" else {"tree.trunk": "disk", "tree.branches": "cpu"}
    model = t.AutoModel.from_pretrained(tmp_path / "tree", device_map=device_map, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in model.parameters())
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size)
    with torch.no_grad():
        for split in tree.splits:
            assert torch.equal(model(pixels, split=split).last_hidden_state, tree(pixels, split=split))
        swept, expected = model.tree.sweep(pixels), tree.sweep(pixels)
    for split, tokens in expected.items():
        assert all(torch.equal(swept[split][n], x) for n, x in tokens.items())
    assert any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("offload_buffers", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_the_librarys_own_tree_can_be_offloaded(tree_of, tmp_path, name, offload_buffers):
    tree = built(tree_of, name)
    pixels = torch.randn(1, 3, tree.image_size, tree.image_size)
    with torch.no_grad():
        expected = tree(pixels)
        cpu_offload(tree, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
        assert all(p.is_meta for p in tree.parameters())
        assert torch.equal(tree(pixels), expected)
        assert torch.equal(tree(pixels), expected)


def test_models_in_full_can_be_offloaded(tree_of, tmp_path):
    tower = FullTower.from_config(tree_of("dinov3", "dinov2_registers").config)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = tower(pixels)
        disk_offload(tower, tmp_path / "off", execution_device=torch.device("cpu"))
        assert torch.equal(tower(pixels), expected)


def saved(tree_of, lm, folder, *models):
    model, processor = assemble(tree_of(*models), *lm())
    for part in (model, processor):
        part.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("trunk", ["dinov2", "dinov3"])
@pytest.mark.parametrize("tower", ["disk", "cpu", "trunk"])
def test_a_language_models_tower_can_be_offloaded(tree_of, lm, pictures, tmp_path, trunk, tower):
    model, processor = saved(tree_of, lm, tmp_path / "m", trunk, "clip")
    rest = {"model.multi_modal_projector": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    places = {"model.vision_tower": tower}
    if tower == "cpu":
        rest["model.language_model"] = "disk"
    elif tower == "trunk":
        places = {"model.vision_tower.tree.trunk": "cpu", "model.vision_tower.tree.branches": "disk"}
    again = t.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", device_map=places | rest, offload_folder=tmp_path / "off"
    )
    batch = processor(images=pictures[:2], text=["<image> what?"] * 2, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert torch.equal(again.generate(**batch, max_new_tokens=3), model.generate(**batch, max_new_tokens=3))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("kind", ["llava", "tree", "full", "the library's tree", "the library's models"])
def test_no_border_inside_a_foundation_model(tree_of, lm, share, kind):
    """Blocks, position tables, prefix tokens and registers of one model are placed together."""
    tree = tree_of("dinov2_registers", "dinov3", "clip")
    tower = FullTower.from_config(tree.config) if kind in ("full", "the library's models") else tree
    if kind.startswith("the library"):
        model = tower
    else:
        model = VSTVisionModel.from_tree(tower) if kind == "tree" else assemble(tower, *lm())[0]
    total = sum(p.numel() * 4 for p in model.parameters())
    places = infer_auto_device_map(model, {0: int(total * share), 1: total}, list(model._no_split_modules))
    units = [".trunk", ".branches", ".models"]
    for place in [f".{place}" for place in places]:
        for unit in units:
            if unit in place:
                assert place.split(unit)[1].count(".") <= 1, place


def test_the_library_tree_reads_what_was_saved_offloaded(tree_of, tmp_path):
    tree = built(tree_of, "rotary")
    tree.save_pretrained(tmp_path / "tree")
    again = VSTEncoder.from_pretrained(tmp_path / "tree")
    cpu_offload(again, execution_device=torch.device("cpu"))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(pixels), tree(pixels))
