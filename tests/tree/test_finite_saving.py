"""A tree that holds numbers which are not finite is not saved over one that is sound."""

import pytest
import torch

from vst import VSTEncoder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("way", ["save_pretrained", "save_stitches"])
def test_numbers_that_are_not_finite_are_not_saved(tree_of, tmp_path, value, way):
    tree = tree_of()
    sound = getattr(tree, way)(tmp_path / "tree")
    before = {path.name: path.read_bytes() for path in sound.iterdir()}
    next(iter(tree.stitches().values())).patches.inner.linear.weight.data[1, 2] = value
    with pytest.raises(ValueError, match=r"not finite in 1 tensors \(branches\..*\), so it is not saved"):
        getattr(tree, way)(tmp_path / "tree", overwrite=True)
    with pytest.raises(ValueError, match="not saved"):
        getattr(tree, way)(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in sound.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_state_dict_of_another_hand_is_looked_at_too(tree_of, tmp_path):
    tree = tree_of()
    tensors = {n: t.clone() for n, t in tree.state_dict().items()}
    tree.save_pretrained(tmp_path / "tree", state_dict=tensors)
    name = next(iter(tensors))
    tensors[name].fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite in 1 tensors"):
        tree.save_pretrained(tmp_path / "bad", state_dict=tensors)
    read = VSTEncoder.from_pretrained(tmp_path / "tree").state_dict()
    assert all(torch.equal(read[n], t) for n, t in tree.state_dict().items())
