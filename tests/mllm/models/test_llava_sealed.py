"""transformers' Auto classes look at a tree's seal as ``VSTEncoder.from_pretrained`` does."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel

from llava_integration import VSTImageProcessor, VSTVisionModel
from vst.tree.folder import WEIGHTS


def flip(path, name):
    """Another value inside one tensor, finite, with the header and the file's length as they were."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + length])[name]["data_offsets"][0]
    data[8 + length + start] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=str)
def test_one_bit_in_the_weights_is_told(tree_of, tmp_path, options):
    tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")
    AutoModel.from_pretrained(tmp_path / "tree", **options)
    with safe_open(tmp_path / "tree" / WEIGHTS, "pt") as file:
        names = sorted(file.keys())
    for name in (names[0], names[-1]):
        flip(tmp_path / "tree" / WEIGHTS, name)
        with pytest.raises(ValueError, match=rf"other numbers than were saved in 1 tensors .{name}.*fetch it again"):
            AutoModel.from_pretrained(tmp_path / "tree", **options)
        flip(tmp_path / "tree" / WEIGHTS, name)
    AutoModel.from_pretrained(tmp_path / "tree", **options)


def test_a_config_that_is_not_the_weights_own_is_told(tree_of, tmp_path):
    tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")
    path = tmp_path / "tree" / "config.json"
    config = json.loads(path.read_text())
    config["trunk"]["norm_eps"] *= 10
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"norm_eps .* of the trunk, and model\.safetensors was saved with"):
        AutoModel.from_pretrained(tmp_path / "tree")


def test_weights_without_a_seal_are_read_as_they_are(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip")
    tree.save_pretrained(tmp_path / "tree")
    tensors = load_file(tmp_path / "tree" / WEIGHTS)
    name = min(tensors)
    tensors[name] += 1
    save_file(tensors, tmp_path / "tree" / WEIGHTS, metadata={"format": "pt"})
    read = VSTVisionModel.from_pretrained(tmp_path / "tree")
    torch.testing.assert_close(read.tree.state_dict()[name], tree.state_dict()[name] + 1)


def test_a_tree_in_the_hubs_cache_is_looked_at_too(tree_of, tmp_path):
    """The hub's own layout, by every reader, with the name given as transformers spells it."""
    place = tmp_path / "models--owner--tree"
    tree_of("dinov2", "clip").save_pretrained(place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    options = {"pretrained_model_name_or_path": "owner/tree", "cache_dir": tmp_path, "local_files_only": True}
    readers = (AutoModel, VSTVisionModel)
    for read in (*readers, AutoImageProcessor, VSTImageProcessor):
        read.from_pretrained(**options)
    weights = place / "snapshots" / ("0" * 40) / WEIGHTS
    with safe_open(weights, "pt") as file:
        name = min(file.keys())
    flip(weights, name)
    for read in readers:
        with pytest.raises(ValueError, match="other numbers than were saved in 1 tensors"):
            read.from_pretrained(**options)
