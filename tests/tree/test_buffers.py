"""What no checkpoint carries is there after every kind of load: rotary tables and zero key biases."""

import copy
import pickle

import pytest
import torch
from conftest import FAMILIES
from tree_kit import pixels_of

from vst import VSTEncoder, load_vfm
from vst.tree.baseline import FullTower


def spoiled(module):
    """As ``to_empty`` leaves a module, at its worst: every buffer and weight holds something else."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(7.0)
    return module


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_that_was_emptied_and_loaded_is_itself(tree_of, family):
    tree = tree_of(family, "dinov3", splits=[1, 2])
    state, pixels = tree.state_dict(), pixels_of(tree)
    state = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        wanted = tree(pixels)
        again = spoiled(copy.deepcopy(tree))
        again.load_state_dict(state, strict=True)
        assert torch.equal(again(pixels), wanted)
        skeleton = VSTEncoder.skeleton(tree.config).to_empty(device="cpu")
        skeleton.load_state_dict(state, strict=True)
        assert torch.equal(skeleton(pixels), wanted)
        assigned = VSTEncoder.skeleton(tree.config).to(device="meta")
        assigned.load_state_dict(state, strict=True, assign=True)
        assert torch.equal(assigned(pixels), wanted)


def test_the_models_in_full_and_a_model_alone_too(tiny, tree_of):
    tower = FullTower.from_config(tree_of("dinov3", "dinov3").config)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted, state = tower(pixels), {n: t.clone() for n, t in tower.state_dict().items()}
        spoiled(tower).load_state_dict(state)
        assert torch.equal(tower(pixels), wanted)
        model = load_vfm(tiny("dinov3"), grid=4)
        wanted, state = model(pixels), {n: t.clone() for n, t in model.state_dict().items()}
        spoiled(model).load_state_dict(state)
        assert torch.equal(model(pixels), wanted)
        random = load_vfm(tiny("dinov3"), grid=4, pretrained=False, seed=3)
        assert torch.equal(spoiled(copy.deepcopy(random)).reset_parameters(3).rope, random.rope)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_the_angles_and_follows_the_weights(tree_of, kind):
    tree = tree_of("dinov3", "dinov3", splits=[1, 2])
    rope, state = tree.trunk.rope.clone(), {n: t.to(kind) for n, t in tree.state_dict().items()}
    pixels = pixels_of(tree)
    with torch.no_grad():
        wanted = copy.deepcopy(tree).to(kind)(pixels)
        for assign, module in ((True, tree), (True, VSTEncoder.skeleton(tree.config))):
            module.load_state_dict(state, strict=True, assign=assign)
            assert torch.equal(module.trunk.rope, rope)
            assert {b.dtype for n, b in module.named_buffers() if n.endswith("k_bias")} == {kind}
            assert torch.equal(module(pixels), wanted)


def test_every_buffer_outside_of_checkpoints_is_known(tree_of):
    """A new one has to be renewed after a load: see ``VFM.renew_buffers``."""
    for family in FAMILIES:
        tree = tree_of(family, "dinov3", splits=[1, 2])
        unsaved = {name.rpartition(".")[2] for name, _ in tree.named_buffers()} - {
            name.rpartition(".")[2] for name in tree.state_dict()
        }
        assert unsaved <= {"rope", "k_bias"}


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_are_copied_in_one_by_one_after_to_empty(tree_of, family):
    """As trainers do that build on meta: no hook of a load sees it."""
    tree = tree_of(family, "dinov3", splits=[1, 2])
    pixels, again = pixels_of(tree), VSTEncoder.skeleton(tree.config).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in again.state_dict().items():
            tensor.copy_(tree.state_dict()[name])
        assert torch.equal(again(pixels), tree(pixels))


def test_a_cast_that_changes_nothing_keeps_what_a_graph_has_captured(tree_of):
    tree = tree_of("dinov3", "dinov3", splits=[1, 2])
    before = {name: buffer.data_ptr() for name, buffer in tree.named_buffers()}
    tree.float().to("cpu").load_state_dict(tree.state_dict())
    assert {name: buffer.data_ptr() for name, buffer in tree.named_buffers()} == before


def test_a_tree_goes_to_another_process(tree_of):
    tree = tree_of("dinov2", "dinov3", splits=[1, 2])
    again, pixels = pickle.loads(pickle.dumps(tree)), pixels_of(tree)
    with torch.no_grad():
        assert torch.equal(again(pixels), tree(pixels))
