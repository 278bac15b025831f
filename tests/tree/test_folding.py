"""Folded stitches: the same map with the standardisation inside of the linear layers."""

import copy

import pytest
import torch
from torch import nn

from vst import VSTEncoder
from vst.tree.stitches.standardised import Standardised

FAMILIES = ("linear", "mlp", "mlp_skip")


def moved(tree, seed=0):
    """A tree whose stitches have weights and statistics as a fit leaves them: outlier channels among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for stitch in tree.stitches().values():
            for p in stitch.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
            for name, b in stitch.named_buffers():
                drawn = torch.randn(b.shape, generator=generator)
                b.copy_(drawn.abs() + 0.3 if name.endswith("std") else 3 * drawn)
                b[0] *= 20
    return tree


def naive(standardised, x):
    """The formula, in float64."""
    s = copy.deepcopy(standardised).double()
    return s.inner((x.double() - s.x_mean) / s.x_std) * s.y_std + s.y_mean


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_is_the_formula(tree_of, family):
    tree = moved(tree_of("dinov2", "clip", stitch=family))
    for stitch in tree.stitches().values():
        for part in (stitch.patches, stitch.cls):
            x = torch.randn(3, 5, 32)
            want = naive(part, x)
            part = part.double()
            part.fold()
            assert part.folded
            torch.testing.assert_close(part(x.double()), want, rtol=1e-12, atol=1e-10)
            part.fold()  # once is enough
            torch.testing.assert_close(part(x.double()), want, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("family", [*FAMILIES, "lora"])
def test_a_folded_tree_gives_the_same_tokens(tree_of, tmp_path, family):
    tree = moved(tree_of("dinov2", "clip", stitch=family, widths=(32, 32)))
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size)
    with torch.no_grad():
        want = {s: tree(pixels, split=s) for s in tree.splits}
        folder = tree.save_pretrained(tmp_path / "tree")
        read = VSTEncoder.from_pretrained(folder, fold=True)
        assert tree.fold() is tree
        for split, tokens in want.items():
            torch.testing.assert_close(tree(pixels, split=split), tokens, rtol=1e-4, atol=1e-4)
            assert torch.equal(read(pixels, split=split), tree(pixels, split=split))
        # It is a tree as any other: saved, read by all that reads trees, and known as folded again.
        again = VSTEncoder.from_pretrained(tree.save_pretrained(tmp_path / "folded"))
    parts = [m for m in again.modules() if isinstance(m, Standardised)]
    assert bool(parts) == (family != "lora")
    with torch.no_grad():
        torch.testing.assert_close(again(pixels), want[again.split], rtol=1e-4, atol=1e-4)
    again.fold()
    assert all(p.folded for p in parts)
    assert torch.equal(again(pixels), tree(pixels))
    again.load_state_dict(VSTEncoder.from_pretrained(folder).state_dict())
    assert not any(p.folded for p in parts)
    with torch.no_grad():
        assert all(torch.equal(again(pixels, split=s), tokens) for s, tokens in want.items())


def test_folded_before_a_cast(tree_of, tmp_path):
    """In bfloat16, a mean that is large beside its spread loses digits; what is folded is as near as what is not."""
    tree = moved(tree_of("dinov2", "clip"))
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size)
    folder = tree.save_pretrained(tmp_path / "tree")
    read = {f: VSTEncoder.from_pretrained(folder, dtype="bfloat16", fold=f) for f in (False, True)}
    assert {p.dtype for p in read[True].state_dict().values()} == {torch.bfloat16}
    exact = VSTEncoder.from_pretrained(folder, fold=True)
    for (name, split), stitch in exact.stitches().items():
        cast = read[True].branches[name].stitches[str(split)].state_dict()
        assert all(torch.equal(cast[k], v.bfloat16()) for k, v in stitch.state_dict().items())
    with torch.no_grad():
        want = tree(pixels)
        errors = {f: (t(pixels.bfloat16()).float() - want).norm() / want.norm() for f, t in read.items()}
    assert errors[True] < 1.5 * errors[False] + 1e-3


def test_stitches_alone_can_be_folded(tree_of, tmp_path):
    tree = moved(tree_of("dinov2", "clip"))
    pixels = torch.randn(1, 3, tree.image_size, tree.image_size)
    read = VSTEncoder.from_pretrained(tree.save_stitches(tmp_path / "stitches"), fold=True)
    with torch.no_grad():
        torch.testing.assert_close(read(pixels), tree(pixels), rtol=1e-4, atol=1e-4)
    assert all(m.folded for m in read.modules() if isinstance(m, Standardised))


class Bent(nn.Module):
    def forward(self, x):
        return x.tanh()


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Rectified(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


TIED = nn.Linear(4, 4)
STAYS = {
    "bent": Bent(),
    "begins bent": nn.Sequential(Bent(), nn.Linear(4, 4)),
    "no bias": nn.Linear(4, 4, bias=False),
    "residual": Residual(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "rectified": Rectified(4, 4),
    "tied": nn.Sequential(TIED, nn.ReLU(), TIED),
    "empty": nn.Sequential(),
}


@pytest.mark.parametrize("inner", STAYS.values(), ids=STAYS)
def test_what_has_no_linear_ends_stays(inner):
    part = Standardised(inner, 4, 4)
    with torch.no_grad():
        part.x_mean.fill_(2)
    x = torch.randn(2, 4)
    want = part(x)
    part.fold()
    assert not part.folded
    assert torch.equal(part(x), want)


def test_wrong_calls(tree_of, tmp_path):
    folder = tree_of().save_pretrained(tmp_path / "tree")
    with pytest.raises(ValueError, match=r"fold is 'yes'"):
        VSTEncoder.from_pretrained(folder, fold="yes")


@pytest.mark.parametrize("alone", [False, True])
def test_what_was_saved_in_few_digits_is_folded_in_many(tree_of, tmp_path, alone):
    """A file of bf16 loaded in fp32: folded as it is loaded it is what folding after it gives."""
    tree = tree_of("dinov2", "clip", stitch="mlp")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for stitch in tree.stitches().values():
            for name, buffer in stitch.named_buffers():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5 * name.endswith("std"))
    for stitch in tree.stitches().values():
        stitch.bfloat16()
    folder = tmp_path / "tree"
    (tree.save_stitches if alone else tree.bfloat16().save_pretrained)(folder)
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size, generator=generator)
    expected = VSTEncoder.from_pretrained(folder, dtype="float32").fold()
    found = VSTEncoder.from_pretrained(folder, dtype="float32", fold=True)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(found(pixels), expected(pixels), rtol=1e-5, atol=1e-5)
