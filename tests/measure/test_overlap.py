"""Branches that overlap give the tokens of branches in turn, and start where they leave the trunk."""

import pytest
import torch

from vst import VSTEncoder
from vst.measure.overlap import Overlapped, Streams
from vst.tree.baseline import FullEncoders, FullTower

TREES = {
    "four": {"trunk": "dinov2", "branches": ("clip", "siglip", "dinov3"), "options": {}},
    "no trunk": {"trunk": "dinov3", "branches": ("clip",), "options": {"keep_trunk": False}},
    "beyond the trunk's features": {
        "trunk": "dinov2",
        "branches": ("clip",),
        "options": {"splits": (1, 3, 4), "enters": {"clip": [1, 3, 3]}},
    },
    "norm": {"trunk": "clip", "branches": ("dinov2",), "options": {"feature_norm": True, "stitch": "linear"}},
}


def made(tree_of, name, device):
    kind = TREES[name]
    tree = tree_of(kind["trunk"], *kind["branches"], **kind["options"]).to(device)
    return tree, torch.randn(2, 3, tree.image_size, tree.image_size, device=device)


@pytest.mark.parametrize("name", TREES)
def test_streams_give_the_trees_tokens(tree_of, name, device):
    tree, pixels = made(tree_of, name, device)
    fast = Overlapped(tree)
    close = {"atol": 1e-6 if device == "cpu" else 1e-5, "rtol": 0}  # a GPU may choose other kernels on a side stream
    for split in tree.splits:
        torch.testing.assert_close(fast(pixels, split=split), tree(pixels, split=split), **close)
    torch.testing.assert_close(fast(pixels), tree(pixels), **close)
    names = [b.name for b in tree.config.branches]
    unequal = dict(zip(names, [tree.splits[-1], 1, 3][: len(names)], strict=True))
    torch.testing.assert_close(fast(pixels, split=unequal), tree(pixels, split=unequal), **close)
    assert not fast(pixels).requires_grad


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TREES)
def test_graphs_give_the_trees_tokens_call_after_call(tree_of, name, dtype):
    tree, _ = made(tree_of, name, "cuda")
    tree = tree.to(dtype)
    fast = Overlapped(tree, "graphs")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    kept = []
    for batch in (1, 2, 1):
        for split in tree.splits:
            pixels = torch.randn(batch, 3, tree.image_size, tree.image_size, device="cuda", dtype=dtype)
            with torch.no_grad():  # in which the tree takes the same kernels
                kept.append((fast(pixels, split=split), tree(pixels, split=split)))
    for tokens, expected in kept:  # after all replays: none was written over
        torch.testing.assert_close(tokens, expected, atol=tolerance, rtol=tolerance)
    assert len(fast._graphs) == 2 * len(tree.splits)
    assert len({graph.pool() for graph, _, _ in fast._graphs.values()}) == 1  # working memory is shared


@pytest.mark.cuda
def test_graphs_see_what_is_written_into_the_weights_and_can_be_forgotten(tree_of):
    tree, pixels = made(tree_of, "four", "cuda")
    fast = Overlapped(tree, "graphs")
    before = fast(pixels, split=1)
    with torch.no_grad():
        for p in tree.parameters():
            p.mul_(1.05)
    after = fast(pixels, split=1)
    torch.testing.assert_close(after, tree(pixels, split=1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    fast.forget()
    assert not fast._graphs
    torch.testing.assert_close(fast(pixels, split=1), after, atol=1e-5, rtol=1e-5)


def test_models_in_full_overlap_as_well(tree_of, device):
    tree = tree_of("dinov2", "siglip")
    full = FullEncoders.load(tree.config).to(device)
    pixels = {n: torch.randn(2, 3, m.image_size, m.image_size, device=device) for n, m in full.models.items()}
    torch.testing.assert_close(Overlapped(full)(pixels), full(pixels), atol=1e-5, rtol=0)
    tower, one = FullTower.from_config(tree.config).to(device), pixels["dinov2"]
    torch.testing.assert_close(Overlapped(tower)(one), tower(one), atol=1e-5, rtol=0)
    if device == "cuda":
        graphs = Overlapped(tower, "graphs")
        for _ in range(2):
            one = torch.randn_like(one)
            torch.testing.assert_close(graphs(one), tower(one), atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
def test_a_graph_is_of_its_fusion_autocast_and_place(tree_of):
    tree, pixels = made(tree_of, "four", "cuda")
    fast = Overlapped(tree, "graphs")
    with torch.inference_mode():
        fast(pixels)
    torch.testing.assert_close(fast(pixels), tree(pixels), atol=1e-5, rtol=1e-5)  # what was held can be written to
    tree.set_fusion("sequence" if tree.config.fusion != "sequence" else "channel", normalise="none")
    torch.testing.assert_close(fast(pixels), tree(pixels), atol=1e-5, rtol=1e-5)
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(fast(pixels), tree(pixels), atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(fast(pixels), tree(pixels), atol=1e-5, rtol=1e-5)
    fast.to(torch.bfloat16)
    assert not fast._graphs
    few = pixels.to(torch.bfloat16)
    torch.testing.assert_close(fast(few), tree(few), atol=2e-2, rtol=2e-2)


def test_a_model_that_is_there_twice_runs_once(tiny):
    source = tiny("dinov2")
    tree = VSTEncoder.from_vfms(source, [source], [1, 3], 56)
    full = FullEncoders.load(tree.config)
    pixels = torch.randn(1, 3, tree.image_size, tree.image_size)
    each, ran = dict.fromkeys(full.models, pixels), []
    for name, model in full.models.items():
        model.blocks["0"].register_forward_hook(lambda *_, name=name: ran.append(name))
    torch.testing.assert_close(Overlapped(full)(each), full(each), atol=1e-6, rtol=0)
    assert ran == ["dinov2", "dinov2"]  # once in each of the two calls, and the other of the pair never


def test_a_move_or_a_cast_is_followed(tree_of):
    tree, pixels = made(tree_of, "norm", "cpu")
    fast = Overlapped(tree)
    before = fast._streams
    fast.to(torch.bfloat16)
    assert fast._streams is not before
    assert fast(pixels.to(torch.bfloat16)).dtype == torch.bfloat16


def test_an_error_leaves_nothing_open(tree_of):
    tree, pixels = made(tree_of, "four", "cpu")
    fast = Overlapped(tree)
    fast._streams._open.append("left by a call that failed")
    torch.testing.assert_close(fast(pixels), tree(pixels), atol=1e-6, rtol=0)
    assert fast._streams._open == []


def test_a_branch_is_launched_before_the_trunk_goes_on_and_all_are_joined(tree_of):
    tree, pixels = made(tree_of, "four", "cpu")
    fast, order = Overlapped(tree), []

    class Told(Streams):
        def join(self, *outputs):
            order.append(f"join {len(outputs)}")
            super().join(*outputs)

    fast._streams = Told(torch.device("cpu"))
    for number, block in tree.trunk.blocks.items():
        block.register_forward_hook(lambda *_, number=number: order.append(f"trunk {number}"))
    for name, branch in tree.branches.items():
        for number, block in branch.tail.blocks.items():
            block.register_forward_hook(lambda *_, name=name, number=number: order.append(f"{name} {number}"))
    fast(pixels, split={"clip": 1, "siglip": 3, "dinov3": 1})
    assert order == [
        "trunk 0", "clip 1", "clip 2", "dinov3 1", "dinov3 2", "trunk 1", "trunk 2", "join 4",
    ]  # fmt: skip


def test_what_cannot_be_is_named(tree_of):
    tree, pixels = made(tree_of, "four", "cpu")
    with pytest.raises(ValueError, match="overlap is 'threads'"):
        Overlapped(tree, "threads")
    with pytest.raises(ValueError, match="graphs need CUDA"):
        Overlapped(tree, "graphs")
    with pytest.raises(ValueError, match="no stitch at split 2"):
        Overlapped(tree)(pixels, split=2)
