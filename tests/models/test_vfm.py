"""The substrate itself: ranges of blocks, partial builds, position tables, specs and their errors."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vst.models.blocks import resample_positions
from vst.models.inputs import check_tensors
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM

BASE = {"width": 32, "depth": 4, "heads": 4, "patch": 4, "hidden": 48, "image_size": 20}
SPECS = {
    "clip": VFMSpec("x:clip", "clip", **BASE, mlp="quick_gelu", pre_norm=True, norm_eps=1e-5),
    "siglip": VFMSpec("x:siglip", "siglip", **BASE, mlp="gelu_tanh", cls=False, mean=(0.5,) * 3, std=(0.5,) * 3),
    "dinov2": VFMSpec("x:dinov2", "dinov2", **BASE, layer_scale=True),
    "dinov2-swiglu": VFMSpec("x:dinov2g", "dinov2", **BASE, layer_scale=True, mlp="swiglu", registers=3),
    "dinov2-reg": VFMSpec("x:dinov2r", "dinov2", **BASE, layer_scale=True, registers=4, antialias=True),
    "dinov3": VFMSpec("x:dinov3", "dinov3", **BASE, layer_scale=True, registers=4, position="rotary"),
    "dinov3-gated": VFMSpec(
        "x:dinov3g", "dinov3", **BASE, layer_scale=True, registers=1, position="rotary", mlp="swiglu", qkv_bias=False
    ),
    "vit": VFMSpec("x:vit", "vit", **BASE, qkv_bias=False),
}
every_family = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def random_vfm(spec: VFMSpec, grid: int = 5, seed: int = 0) -> VFM:
    """Every parameter random and large enough to matter."""
    vfm, generator = VFM(spec, grid), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in vfm.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.5 * noise + (p.ndim == 1 and "bias" not in name))
    return vfm.eval()


def pixels(vfm: VFM, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, vfm.image_size, vfm.image_size, generator=torch.Generator().manual_seed(3))


@every_family
def test_ranges_of_blocks_make_the_whole(spec):
    vfm = random_vfm(spec)
    x = pixels(vfm)
    with torch.no_grad():
        whole = vfm(x)
        assert whole.shape == (2, spec.prefix + 25, 32) == (2, vfm.tokens, spec.width)
        tokens = vfm.embed(x)
        for cut in range(spec.depth + 1):
            by_hand = vfm.norm(vfm.run(vfm.run(tokens, 0, cut), cut, spec.depth))
            assert torch.equal(by_hand, whole)
        taps = vfm.taps(x, [3, 0, 3, 1])
        assert list(taps) == [0, 1, 3]
        assert torch.equal(taps[0], tokens)
        assert torch.equal(taps[3], vfm.run(taps[1], 1, 3))
        assert not torch.allclose(taps[3], taps[1], atol=0.1)
        assert vfm.patches(whole).shape == (2, 25, 32)
        assert torch.equal(vfm.patches(whole)[:, -1], whole[:, -1])


@every_family
def test_partial_builds_hold_and_compute_the_same(spec):
    vfm = random_vfm(spec)
    state, x = vfm.state_dict(), pixels(vfm)
    head = VFM.from_tensors(spec, state, 5, stop=2, norm=False)
    tail = VFM.from_tensors(spec, state, 5, start=2, stem=False)
    nothing = VFM.from_tensors(spec, state, 5, start=2, stop=2, norm=False)
    assert set(head.state_dict()) | set(tail.state_dict()) == set(state)
    assert not set(head.state_dict()) & set(tail.state_dict())
    with torch.no_grad():
        depth2 = head(x)
        assert torch.equal(depth2, vfm.run(vfm.embed(x), 0, 2))
        assert torch.equal(tail.norm(tail.run(depth2, 2, 4)), vfm(x))
        assert torch.equal(nothing.embed(x), vfm.embed(x))
    for wrong in ((0, 3), (3, 2), (2, 3)):
        with pytest.raises(ValueError, match=r"are held: load the model with the blocks"):
            head.run(depth2, *wrong)
    with pytest.raises(ValueError, match="built without its stem"):
        tail.embed(x)


def test_cls_position_belongs_to_patches_only():
    """The stem against the plain formula: tokens first, positions on patches, then CLIP's norm."""
    vfm = random_vfm(SPECS["clip"])
    x = pixels(vfm)
    with torch.no_grad():
        patches = F.conv2d(x, vfm.patch_embed.proj.weight, stride=4).permute(0, 2, 3, 1).reshape(2, 25, 32)
        tokens = torch.cat([vfm.cls_token.expand(2, 1, 32), patches + vfm.pos_embed], dim=1)
        want = F.layer_norm(tokens, (32,), vfm.norm_pre.weight, vfm.norm_pre.bias, 1e-5)
        torch.testing.assert_close(vfm.embed(x), want, atol=1e-6, rtol=0)
    assert vfm.patch_embed.proj.bias is None


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("native", "grid"), [(5, 3), (5, 8), (7, 2), (4, 4)])
def test_resample_positions(native, grid, antialias):
    table = torch.randn(1, native * native, 6)
    want = torch.stack(
        [
            F.interpolate(
                table[0, :, c].reshape(1, 1, native, native), (grid, grid), mode="bicubic", antialias=antialias
            ).flatten()
            for c in range(6)
        ],
        dim=-1,
    )[None]
    got = resample_positions(table, grid, antialias=antialias)
    torch.testing.assert_close(got, want if native != grid else table, atol=1e-5, rtol=0)


def test_resample_positions_details():
    table = torch.randn(1, 49, 6)
    assert resample_positions(table, 7, antialias=True) is table
    assert not torch.allclose(*(resample_positions(table, 3, antialias=a) for a in (True, False)), atol=1e-2)
    half = resample_positions(table.bfloat16(), 5, antialias=False)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, resample_positions(table.bfloat16().float(), 5, antialias=False).bfloat16())
    with pytest.raises(ValueError, match="48 entries is not square"):
        resample_positions(table[:, :48], 5, antialias=False)


@pytest.mark.parametrize("name", ["clip", "dinov2-reg", "dinov3"])
def test_from_tensors_at_another_grid(name):
    spec = SPECS[name]
    vfm = random_vfm(spec)
    other = VFM.from_tensors(spec, vfm.state_dict(), 3)
    assert (other.grid, other.image_size, other.tokens) == (3, 12, spec.prefix + 9)
    assert other(pixels(other)).shape == (2, other.tokens, 32)
    if spec.position == "learned":
        want = resample_positions(vfm.pos_embed, 3, antialias=spec.antialias)
        assert torch.equal(other.pos_embed, want)
    else:
        assert torch.equal(other.rope, VFM(spec, 3).rope)
        assert other.rope.shape == (9, 2 * 8)
    same = {n: t for n, t in vfm.state_dict().items() if n != "pos_embed"}
    assert all(torch.equal(t, other.state_dict()[n]) for n, t in same.items())


def test_from_tensors_shares_memory_and_trains():
    vfm = random_vfm(SPECS["dinov3"])
    other = VFM.from_tensors(SPECS["dinov3"], vfm.state_dict(), 5)
    assert other.blocks["0"].mlp.fc1.weight.data_ptr() == vfm.blocks["0"].mlp.fc1.weight.data_ptr()
    assert all(p.requires_grad and not p.is_meta for p in other.parameters())
    assert not any(b.is_meta for b in other.buffers())
    assert torch.equal(other(pixels(other)), vfm(pixels(vfm)))
    other(pixels(other)).sum().backward()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.bias"), r"1 missing \(blocks.1.attn.proj.bias\)"),
        (lambda s: s.update({"head.weight": torch.ones(2)}), r"1 foreign \(head.weight\)"),
        (lambda s: s.update({"blocks.4.norm1.bias": torch.ones(32)}), r"foreign \(blocks.4.norm1.bias\)"),
        (lambda s: s.update({"blocks.0.attn.q_norm.weight": torch.ones(8)}), r"foreign \(blocks.0.attn.q_norm.weight"),
        (lambda s: s.update({"reg_token": torch.ones(1, 1, 32)}), r"foreign \(reg_token\)"),
        (lambda s: s.update({"norm.bias": torch.ones(31)}), r"1 of another shape \(norm.bias is \[31\], not \[32\]\)"),
    ],
)
def test_from_tensors_refuses(change, message):
    state = dict(random_vfm(SPECS["clip"]).state_dict())
    change(state)
    with pytest.raises(ValueError, match=f"x:clip do not fit it: .*{message}"):
        VFM.from_tensors(SPECS["clip"], state, 5)


def test_a_partial_build_leaves_out_but_does_not_overlook():
    state = dict(random_vfm(SPECS["clip"]).state_dict())
    state["blocks.3.surprise"] = torch.ones(1)
    VFM.from_tensors(SPECS["clip"], state, 5, stop=3)
    with pytest.raises(ValueError, match=r"foreign \(blocks.3.surprise\)"):
        VFM.from_tensors(SPECS["clip"], state, 5, start=3)


def test_check_tensors_names_at_most_five():
    with pytest.raises(ValueError, match=r"7 missing \(a0, a1, a2, a3, a4, \.\.\.\)\. Do this\.") as error:
        check_tensors("m", {f"a{i}": (1,) for i in range(7)}, {}, "Do this.")
    assert "foreign" not in str(error.value)
    check_tensors("m", {"a": (1, 2)}, {"a": torch.Size([1, 2])})


@every_family
def test_random_weights_are_seeded(spec):
    one, same, other = (VFM(spec, 5).reset_parameters(seed) for seed in (1, 1, 2))
    tail = VFM(spec, 5, start=2, stem=False).reset_parameters(1)
    state = one.state_dict()
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in state.items())
    assert all(torch.equal(t, state[n]) for n, t in tail.state_dict().items())
    matrices = [n for n, p in one.named_parameters() if p.ndim > 1]
    assert all(not torch.equal(state[n], other.state_dict()[n]) for n in matrices)
    assert len({state[n].flatten()[:4].sum().item() for n in matrices}) == len(matrices)
    assert all(0.01 < state[n].std() < 0.03 for n in matrices)


@pytest.mark.parametrize("name", ["dinov3", "dinov3-gated"])
def test_half_precision_keeps_the_rotary_table_exact(name):
    vfm = random_vfm(SPECS[name])
    exact, x = vfm.rope.clone(), pixels(vfm)
    with torch.no_grad():
        want = vfm(x)
        for move in (lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.float()):
            move(vfm)
            assert vfm.rope.dtype == torch.float32
            assert torch.equal(vfm.rope, exact)
        got = vfm.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.99
    assert "rope" not in vfm.state_dict()


def test_checkpointing_changes_nothing_but_memory():
    vfm = random_vfm(SPECS["dinov3"])
    vfm(pixels(vfm)).square().mean().backward()
    want = {n: p.grad.clone() for n, p in vfm.named_parameters()}
    vfm.zero_grad()
    vfm.checkpointing = True
    vfm(pixels(vfm)).square().mean().backward()
    for name, p in vfm.named_parameters():
        torch.testing.assert_close(p.grad, want[name], atol=1e-6, rtol=1e-5)


def test_wrong_pictures():
    vfm = random_vfm(SPECS["dinov2"])
    for shape in ((2, 3, 24, 24), (2, 3, 20, 24), (2, 1, 20, 20), (3, 20, 20)):
        with pytest.raises(ValueError, match=r"x:dinov2 got pictures of shape \[.*expected \[batch, 3, 20, 20\]"):
            vfm(torch.zeros(shape))


def test_wrong_builds():
    for start, stop in ((-1, 2), (3, 2), (0, 5)):
        with pytest.raises(ValueError, match=f"blocks {start} to {stop} were asked for; it has 4"):
            VFM(SPECS["clip"], 5, start=start, stop=stop)
    with pytest.raises(ValueError, match="grid is 0; expected 1 to 1024"):
        VFM(SPECS["clip"], 0)
    with pytest.raises(ValueError, match="gelu or swiglu MLP, not quick_gelu"):
        VFM(replace(SPECS["dinov3"], mlp="quick_gelu"), 5)


@every_family
def test_spec_round_trip(spec):
    values = json.loads(json.dumps(spec.to_dict()))
    assert VFMSpec.from_dict(values) == spec
    assert hash(VFMSpec.from_dict(values)) == hash(spec)
    assert spec.prefix == VFM(spec, 2).tokens - 4


def test_spec_errors():
    good = SPECS["clip"].to_dict()
    with pytest.raises(ValueError, match=r"no field \['colour'\]"):
        VFMSpec.from_dict({**good, "colour": 1})
    with pytest.raises(ValueError, match=r"needs more fields .*width"):
        VFMSpec.from_dict({k: v for k, v in good.items() if k != "width"})
    with pytest.raises(ValueError, match=r"VFMSpec.family is 'mae'; expected one of clip, "):
        VFMSpec.from_dict({**good, "family": "mae"})
    with pytest.raises(ValueError, match=r"VFMSpec.mlp is 'relu'"):
        replace(SPECS["clip"], mlp="relu")
    with pytest.raises(ValueError, match=r"VFMSpec.position is"):
        replace(SPECS["clip"], position="sincos")
    with pytest.raises(ValueError, match="width 32 is not a multiple of its 5 heads"):
        replace(SPECS["clip"], heads=5)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("source", x) for x in ("", "x\nlicense: mit", 5, None)),
        *(("license", x) for x in (["mit"], None)),
        *(("depth", x) for x in (0, -1, 10**9, 12.5, "12", True, None, float("nan"))),
        *(("heads", x) for x in (0, -2, 2.5)),
        *(("patch", x) for x in (0, 8.5, [8, 8])),
        *(("image_size", x) for x in (0, 3, 10**12)),
        *(("registers", x) for x in (-1, 10**9, None)),
        *(("cls", x) for x in ("no", 1, None)),
        *(("norm_eps", x) for x in (0, -1e-6, "1e-6", float("nan"), float("inf"), 2.0, 10**400)),
        *(("rope_temperature", x) for x in (0.0, -100.0, float("inf"), "100")),
        *(("mean", x) for x in (0.5, "abc", (0.5, 0.5), (0.5, 0.5, float("nan")), (123.7, 116.3, 103.5), (-0.1, 0, 0))),
        *(("std", x) for x in ((0, 1, 1), (58.4, 57.1, 57.4), (1, 1, -1), {"r": 1})),
        *(("family", x) for x in ([], None)),
    ],
)
def test_a_spec_takes_only_what_a_model_can_be(field, bad):
    with pytest.raises(ValueError, match=f"{field}.*; expected") as caught:
        VFMSpec.from_dict({**SPECS["clip"].to_dict(), field: bad})
    assert "\n" not in str(caught.value)


def test_rotary_heads_have_a_width_of_fours():
    with pytest.raises(ValueError, match=r"VFMSpec.heads is 16; expected heads of a width of 4"):
        replace(SPECS["dinov3"], heads=16)


def test_spec_grid():
    spec = replace(SPECS["clip"], patch=14)
    assert [spec.grid(s) for s in (14, 224, 336)] == [1, 16, 24]
    for size, low, high in ((384, 378, 392), (13, 14, 28), (0, 14, 28)):
        with pytest.raises(ValueError, match=f"image size {size} is not a multiple .* use {low} or {high}"):
            spec.grid(size)


def test_swiglu_hidden_width_is_exact():
    """timm takes a ratio and rounds down; every hidden width up to a few thousand has to survive that."""
    for width, heads, hidden in ((384, 6, 1024), (1152, 16, 4304), (1536, 24, 4096), (1000, 10, 2667), (768, 12, 2049)):
        spec = replace(SPECS["clip"], width=width, heads=heads, hidden=hidden, depth=1)
        with torch.device("meta"):
            plain = VFM(spec, 1)
            gated = VFM(replace(spec, mlp="swiglu"), 1)
        assert isinstance(plain.blocks["0"].mlp.fc1, nn.Linear)
        assert plain.blocks["0"].mlp.fc1.out_features == hidden
        assert gated.blocks["0"].mlp.fc2.in_features == hidden
        assert gated.blocks["0"].mlp.fc1.out_features == 2 * hidden
