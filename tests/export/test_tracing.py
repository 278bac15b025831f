"""Trees under torch.compile and torch.export: no graph break at any split, any number of pictures."""

import subprocess
import sys

import pytest
import torch
from export_kit import FAMILIES, built, pixels_of


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_whole_at_one_split_and_then_another(tree_of, name):
    tree = built(tree_of, name)
    compiled = torch.compile(tree, fullgraph=True, backend="eager")
    with torch.no_grad():
        for batch, split in ((2, 1), (2, 3), (2, 1), (2, None), (3, 3)):
            pixels = pixels_of(tree, batch)
            assert torch.equal(compiled(pixels, split=split), tree(pixels, split=split))


def test_compiled_whole_with_splits_by_branch(tree_of):
    tree = built(tree_of, "dinov3-siglip-clip")
    compiled = torch.compile(tree, fullgraph=True, backend="eager")
    names, pixels = [b.name for b in tree.config.branches], pixels_of(tree, 2)
    with torch.no_grad():
        for depths in ((1, 1), (1, 3), (3, 1)):
            split = dict(zip(names, depths, strict=True))
            assert torch.equal(compiled(pixels, split=split), tree(pixels, split=split))


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_with_any_number_of_pictures(tree_of, name):
    tree = built(tree_of, name)
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}, "split": None}
    with torch.no_grad():
        for split in tree.splits:
            program = torch.export.export(tree, (pixels_of(tree, 2),), {"split": split}, dynamic_shapes=shapes).module()
            for batch in (1, 2, 5):
                pixels = pixels_of(tree, batch)
                torch.testing.assert_close(
                    program(pixels, split=split), tree(pixels, split=split), rtol=1e-5, atol=1e-5
                )


def test_the_compiler_itself(tree_of, tmp_path):
    """torch's own compiler at two splits, to rounding, in a process of its own as its users have."""
    tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")
    done = subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path / "tree")], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-4000:]


COMPILED = """
import sys, torch, vst
tree = vst.VSTEncoder.from_pretrained(sys.argv[1])
compiled, pixels = torch.compile(tree, fullgraph=True), torch.randn(2, 3, tree.image_size, tree.image_size)
with torch.no_grad():
    for split in tree.splits:
        torch.testing.assert_close(compiled(pixels, split=split), tree(pixels, split=split), rtol=1e-4, atol=1e-4)
"""
