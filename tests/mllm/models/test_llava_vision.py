"""A tree as transformers' own vision model: its default split, the dtype of its tokens, and how it is saved."""

import pytest
import torch
import transformers as t
from conftest import FAMILIES

from llava_integration import VSTVisionConfig, VSTVisionModel
from vst import VSTEncoder


@pytest.mark.parametrize("trunk", FAMILIES)
def test_auto_classes_read_saved_trees(tree_of, trunk, tmp_path):
    tree = tree_of(trunk, "dinov3", "clip")
    tree.save_pretrained(tmp_path / "tree")
    config = t.AutoConfig.from_pretrained(tmp_path / "tree")
    assert isinstance(config, VSTVisionConfig)
    assert config.tree_config() == tree.config
    assert (config.hidden_size, config.image_size, config.num_image_tokens) == (32 + 48 + 48, tree.image_size, 16)
    model = t.AutoModel.from_pretrained(tmp_path / "tree")
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size)
    for split in tree.splits:
        out = model(pixels, split=split, output_hidden_states=[-2], return_dict=True)
        assert torch.equal(out.hidden_states[-2], tree(pixels, split=split))
        assert torch.equal(out.last_hidden_state, out.hidden_states[-2])
    model.save_pretrained(tmp_path / "again")
    again = VSTEncoder.from_pretrained(tmp_path / "again")
    assert again.config == tree.config
    assert torch.equal(again(pixels), tree(pixels))


def test_default_split_can_be_set_and_is_saved(tree_of, tmp_path):
    model = VSTVisionModel.from_tree(tree_of())
    pixels = torch.randn(1, 3, 56, 56)
    model.split = 1
    assert torch.equal(model(pixels).last_hidden_state, model.tree(pixels, split=1))
    model.save_pretrained(tmp_path / "tree")
    assert t.AutoModel.from_pretrained(tmp_path / "tree").split == 1
    with pytest.raises(ValueError, match="holds no stitch at split 2"):
        model.split = 2


def test_a_default_split_by_branch_is_saved(tree_of, tmp_path):
    tree, pixels, mixed = tree_of("dinov2", "clip", "siglip"), torch.randn(1, 3, 56, 56), {"clip": 1, "siglip": 3}
    model = VSTVisionModel.from_tree(tree)
    model.split = mixed
    model.save_pretrained(tmp_path / "tree")
    again = t.AutoModel.from_pretrained(tmp_path / "tree")
    assert again.split == mixed
    torch.testing.assert_close(again(pixels).last_hidden_state, tree(pixels, split=mixed))
    turned = {"clip": 3, "siglip": 1}
    torch.testing.assert_close(again(pixels, split=turned).last_hidden_state, tree(pixels, split=turned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_come_in_the_dtype_of_the_weights(tree_of, dtype):
    model = VSTVisionModel.from_tree(tree_of()).to(dtype)
    assert model(torch.randn(1, 3, 56, 56)).last_hidden_state.dtype == dtype


def test_what_a_tree_cannot_give_is_refused(tree_of):
    model = VSTVisionModel.from_tree(tree_of())
    pixels = torch.randn(1, 3, 56, 56)
    tokens = model(pixels).last_hidden_state
    for name, value in (("output_attentions", True), ("interpolate_pos_encoding", True), ("image_sizes", [[56, 56]])):
        with pytest.raises(ValueError, match=f"{name} is .* leave it out"):
            model(pixels, **{name: value})
        assert torch.equal(model(pixels, **{name: None}).last_hidden_state, tokens)
    out = model(pixels, return_dict=False, output_hidden_states=True, num_items_in_batch=torch.tensor(3))
    assert isinstance(out, tuple)
    assert torch.equal(out[0], tokens)


def test_given_tensors_are_saved(tree_of, tmp_path):
    tree = tree_of()
    model = VSTVisionModel.from_tree(tree)
    halved = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "tree", state_dict=halved, max_shard_size="5GB", variant=None)
    again = t.AutoModel.from_pretrained(tmp_path / "tree").state_dict()
    assert all(torch.equal(again[name], halved[name]) for name in halved)
    with pytest.raises(ValueError, match="1 missing"):
        model.save_pretrained(tmp_path / "tree", state_dict=dict(list(halved.items())[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "1KB"}, "max_shard_size is 1KB, but a tree is saved in one file"),
        ({"variant": "fp16"}, "given variant"),
        ({"safe_serialization": False}, "given safe_serialization"),
        ({"distributed_checkpoint": True}, "given distributed_checkpoint"),
        ({"overwrit": True}, "given overwrit"),
        ({"repo_id": "someone/tree"}, "repo_id are for an upload only"),
    ],
)
def test_saving_refuses_what_it_cannot_serve(tree_of, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        VSTVisionModel.from_tree(tree_of()).save_pretrained(tmp_path / "tree", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tree").exists()


def test_only_the_main_process_saves(tree_of, tmp_path):
    VSTVisionModel.from_tree(tree_of()).save_pretrained(tmp_path / "tree", is_main_process=False)
    assert not (tmp_path / "tree").exists()


def test_a_tree_is_uploaded_as_it_was_saved(tree_of, tmp_path, monkeypatch):
    import huggingface_hub

    seen = []
    repo = type("Repo", (), {"repo_id": "someone/tree"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **o: seen.append((name, o)) or repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **o: seen.append(o))
    model = VSTVisionModel.from_tree(tree_of())
    model.save_pretrained(tmp_path / "tree", push_to_hub=True, private=True, commit_message="a tree", token="x")
    assert seen[0] == ("tree", {"exist_ok": True, "private": True})
    assert seen[1]["repo_id"] == "someone/tree"
    assert seen[1]["commit_message"] == "a tree"
    assert set(seen[1]["allow_patterns"]) == {path.name for path in (tmp_path / "tree").iterdir()}
