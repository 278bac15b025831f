"""What is frozen in a tree stays frozen however transformers builds, reads, casts or copies it."""

import copy

import pytest
import torch
import transformers as t

from llava_integration import VSTVisionConfig, VSTVisionModel
from llava_integration.models.assemble import assemble
from vst import VSTEncoder
from vst.models.vfm import VFM
from vst.tree.baseline import FullTower
from vst.tree.projector import ProjectorSpec


def trainable(tree):
    return {name for name, p in tree.named_parameters() if p.requires_grad}


def own(tree):
    return {name for name, _ in tree.named_parameters() if ".stitches." in name}


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("trunk", ["dinov2", "dinov3"])
def test_a_tree_read_by_auto_classes(tree_of, tmp_path, trunk, options):
    tree_of(trunk, "clip", "dinov3").save_pretrained(tmp_path / "tree")
    expected = trainable(VSTEncoder.from_pretrained(tmp_path / "tree"))
    model = t.AutoModel.from_pretrained(tmp_path / "tree", **options)
    assert trainable(model.tree) == expected == own(model.tree)
    assert trainable(t.AutoModel.from_config(model.config).tree) == expected


@pytest.mark.parametrize("projector", [None, ProjectorSpec("mlp", "interleave")], ids=["llava", "own"])
def test_a_language_model_on_a_tree(tree_of, lm, tmp_path, projector):
    model, processor = assemble(tree_of(), *lm(), projector=projector)
    expected = own(model.model.vision_tower.tree)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    read = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    fresh = type(model)(model.config)
    changed = [
        copy.deepcopy(read),
        copy.deepcopy(read).to(torch.bfloat16),
        copy.deepcopy(read).to_empty(device="cpu"),
        t.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float16),
    ]
    for whole in (model, read, fresh, *changed):
        assert trainable(whole.model.vision_tower.tree) == expected
        assert all(p.requires_grad for p in whole.model.language_model.parameters())
    read.load_state_dict({n: p.clone() for n, p in model.state_dict().items()}, assign=True)
    assert trainable(read.model.vision_tower.tree) == expected


NEXT = {
    "llava_next": (t.LlavaNextConfig, t.LlavaNextForConditionalGeneration),
    "llava_onevision": (t.LlavaOnevisionConfig, t.LlavaOnevisionForConditionalGeneration),
}


@pytest.mark.parametrize("kind", NEXT)
def test_other_classes_on_a_tree(tree_of, lm, tmp_path, kind):
    tree, (language, _) = tree_of(), lm("qwen2")
    kind, whole = NEXT[kind]
    config = kind(
        vision_config=VSTVisionConfig.from_tree(tree.config), text_config=language.config, image_token_id=3,
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_grid_pinpoints=[[56, 56]],
    )  # fmt: skip
    model = whole(config)
    model.save_pretrained(tmp_path)
    again = whole.from_pretrained(tmp_path)
    for found in (model, again):
        (tower,) = (m for m in found.modules() if isinstance(m, VSTVisionModel))
        assert trainable(tower.tree) == own(tree)


def test_models_in_full_are_frozen_whole(tree_of, lm, tmp_path):
    model, _ = assemble(FullTower.from_config(tree_of().config), *lm())
    model.save_pretrained(tmp_path)
    again = t.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert trainable(again.model.vision_tower) == set()


@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_moves_no_foundation_model(tree_of, lm, pictures, tmp_path, adapters):
    """As TRL trains what AutoModelForImageTextToText gives, in full or by PEFT's adapters."""
    whole, processor = assemble(tree_of("dinov3", "clip"), *lm())
    whole.save_pretrained(tmp_path)
    model = t.AutoModelForImageTextToText.from_pretrained(tmp_path).train()
    tower = model.model.vision_tower
    before = {n: p.detach().clone() for n, p in tower.named_parameters()}
    frozen = {
        f"tree.{n}.{k}" for n, m in tower.tree.named_modules() if isinstance(m, VFM) for k, _ in m.named_parameters()
    }
    if adapters:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    batch = processor(images=pictures[0], text="<image> what is it?", return_tensors="pt")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    moved = {n for n, p in tower.named_parameters() if not torch.equal(p, before[n])}
    assert not moved & frozen
    assert bool(moved) != adapters


@pytest.mark.parametrize("build", ["from_config", "default"])
def test_rotary_tables_keep_their_precision_in_any_type(tree_of, build):
    """Angles are a function of the grid; a model built in half precision has the same ones as any other."""
    tree = tree_of("dinov3", "dinov3")
    config = VSTVisionConfig.from_tree(tree.config)
    if build == "from_config":
        made = t.AutoModel.from_config(config, dtype=torch.bfloat16).tree
    else:
        torch.set_default_dtype(torch.bfloat16)
        try:
            made = VSTEncoder(tree.config)
        finally:
            torch.set_default_dtype(torch.float32)
    for name, buffer in tree.named_buffers():
        if name.endswith("rope"):
            assert torch.equal(made.get_buffer(name), buffer)
