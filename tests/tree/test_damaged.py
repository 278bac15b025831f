"""Saved weights that were cut, emptied, overwritten or removed beside a sound config are named in one sentence."""

import os

import pytest
import torch

from vst import VSTEncoder, fit_stitches
from vst.tree.folder import STITCHES, WEIGHTS, check_weights


def half(file):
    os.truncate(file, file.stat().st_size // 2)


def one_byte_less(file):
    os.truncate(file, file.stat().st_size - 1)


def emptied(file):
    os.truncate(file, 0)


def noise(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def removed(file):
    file.unlink()


DAMAGES = (half, one_byte_less, emptied, noise, removed)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [WEIGHTS, STITCHES])
def test_a_damaged_tree_is_named(tree_of, tmp_path, damage, name):
    tree = tree_of("dinov2", "clip")
    folder = (tree.save_pretrained if name == WEIGHTS else tree.save_stitches)(tmp_path / "tree")
    check_weights(folder)
    damage(folder / name)
    for read in (VSTEncoder.from_pretrained, check_weights):
        with pytest.raises((ValueError, FileNotFoundError)) as raised:
            read(folder)
        said = str(raised.value)
        assert "\n" not in said
        assert str(folder) in said
        assert name in said
        assert any(word in said for word in ("fetch it again", "make it anew", "incomplete"))


def test_a_shard_that_is_missing_is_named(tmp_path):
    (tmp_path / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors is missing"):
        check_weights(tmp_path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_finished_fit_with_damaged_stitches_is_not_taken_for_finished(tree_of, pictures, tmp_path, damage):
    options = {"folder": tmp_path / "run", "objective": "ridge", "show_progress": False}
    fit_stitches(tree_of("dinov2", "clip"), pictures, **options)
    again = tree_of("dinov2", "clip")
    before = {k: v.clone() for k, v in again.state_dict().items()}
    damage(tmp_path / "run" / "stitches" / STITCHES)
    with pytest.raises((ValueError, FileNotFoundError), match=r"stitches\.safetensors"):
        fit_stitches(again, pictures, resume=True, **options)
    assert all(torch.equal(v, before[k]) for k, v in again.state_dict().items())
