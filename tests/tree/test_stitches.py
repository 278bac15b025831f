"""Stitches against closed forms, naive code and peft."""

import numpy as np
import pytest
import torch
from torch import nn

from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.stitches import STITCHES, Calibration, StitchSpec

GRID = 4


def spec(width=16, cls=True, registers=0, **options):
    base = {
        "family": "vit",
        "depth": 3,
        "heads": 2 - width % 2,
        "patch": 14,
        "hidden": 2 * width,
        "image_size": 14 * GRID,
    }
    return VFMSpec(source=f"w{width}", width=width, cls=cls, registers=registers, **{**base, **options})


def tokens(model, batch, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.prefix + GRID**2, model.width, generator=generator)
    return x * torch.linspace(0.1, scale, model.width) + 5  # channels of very different scale, far from zero


def trunk_of(source):
    return VFM(source, GRID).reset_parameters().requires_grad_(False)


PREFIXES = [(True, 0), (False, 0), (True, 4), (False, 2)]


@pytest.mark.parametrize("family", sorted(STITCHES))
@pytest.mark.parametrize("target_prefix", PREFIXES)
@pytest.mark.parametrize("source_prefix", PREFIXES)
def test_every_family_bridges_every_prefix(family, source_prefix, target_prefix):
    source, target = spec(16, *source_prefix), spec(16, *target_prefix)
    stitch = StitchSpec(family).build(source, target, 2)
    x = tokens(source, 5)
    y = stitch(x, trunk_of(source))
    assert y.shape == (5, target.prefix + GRID**2, target.width)
    both = source.cls and target.cls
    learned = target.prefix - int(both)
    assert (stitch.learned is None) == (learned == 0)
    # the source's registers do not reach the patches (lora runs a whole block, where tokens attend to each other)
    if family != "lora" and source.registers:
        moved = x.clone()
        moved[:, int(source.cls) : source.prefix] += 10
        assert torch.equal(stitch(moved, None), y)
    # the class token is stitched to the class token alone
    if family != "lora" and source.cls:
        moved = x.clone()
        moved[:, 0] += 10
        changed = (stitch(moved, None) != y).any(-1).any(0)
        assert changed.nonzero().flatten().tolist() == ([0] if both else [])


@pytest.mark.parametrize("widths", [(12, 20), (20, 12)])
@pytest.mark.parametrize("family", ["linear", "mlp", "mlp_skip"])
def test_ridge_start_is_the_least_squares_map(family, widths):
    source, target = spec(widths[0]), spec(widths[1])
    x, y = tokens(source, 40), tokens(target, 40, seed=1)
    y[:, 1:] += x[:, 1:] @ torch.randn(widths, generator=torch.Generator().manual_seed(2))
    calibration = Calibration()
    for i in range(0, 40, 7):  # uneven batches: the sums are streamed
        calibration.update(source, target, x[i : i + 7], y[i : i + 7])
    stitch = StitchSpec(family).build(source, target, 2)
    explained = stitch.start(calibration, penalty=1e-9)
    flat, wanted = x[:, 1:].flatten(0, 1).double(), y[:, 1:].flatten(0, 1).double()
    design = torch.cat([flat, torch.ones(len(flat), 1, dtype=torch.double)], dim=1)
    best = (design @ torch.linalg.lstsq(design, wanted).solution).unflatten(0, (40, GRID**2))
    # mlp is the map where its ReLU is open: on all but the rare rows outside the sampled range
    off = (stitch(x, None)[:, 1:] - best).abs().amax(-1).detach()
    assert (off < 2e-3).float().mean() > (0.99 if family == "mlp" else 0.9999)
    residual = ((best.flatten(0, 1) - wanted) ** 2).sum(0) / ((wanted - wanted.mean(0)) ** 2).sum(0)
    assert explained == pytest.approx(1 - float(residual.mean()), abs=1e-3)


@pytest.mark.parametrize("widths", [(12, 20), (20, 12), (16, 16)])
def test_the_procrustes_start_is_the_textbook_one(widths):
    """Against numpy: centre, one scale a side, SVD of the cross-covariance, least squares scale."""
    source, target = spec(widths[0]), spec(widths[1])
    x, y = tokens(source, 40), tokens(target, 40, seed=1)
    y[:, 1:] += x[:, 1:] @ torch.randn(widths, generator=torch.Generator().manual_seed(2))
    calibration = Calibration()
    for i in range(0, 40, 7):
        calibration.update(source, target, x[i : i + 7], y[i : i + 7])
    stitch = StitchSpec("linear").build(source, target, 2)
    explained = stitch.start(calibration, form="procrustes")
    a, b = x[:, 1:].flatten(0, 1).double().numpy(), y[:, 1:].flatten(0, 1).double().numpy()
    a0, b0 = a - a.mean(0), b - b.mean(0)
    u, _, v = np.linalg.svd(b0.T @ a0, full_matrices=False)
    turned = a0 @ (u @ v).T
    scale = (turned * b0).sum() / (turned**2).sum()
    given = stitch(x, None)[:, 1:].flatten(0, 1).detach().double().numpy()
    np.testing.assert_allclose(given, scale * turned + b.mean(0), atol=2e-3 * np.abs(b).max())
    assert explained == pytest.approx(1 - ((scale * turned - b0) ** 2).sum() / (b0**2).sum(), abs=1e-4)
    inner = stitch.patches.inner.weight.detach()
    product = inner.T @ inner if widths[0] <= widths[1] else inner @ inner.T
    torch.testing.assert_close(product / product[0, 0], torch.eye(len(product)), atol=1e-4, rtol=0)


def test_the_procrustes_start_finds_a_rotation():
    model = spec(16)
    x = tokens(model, 40)
    turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3))).Q
    calibration = Calibration()
    calibration.update(model, model, x, x @ turn)
    stitch = StitchSpec("mlp_skip").build(model, model, 2)
    assert stitch.start(calibration, form="procrustes") == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(stitch(x, None)[:, 1:], (x @ turn)[:, 1:], atol=1e-3, rtol=1e-3)


def test_the_mlp_starts_open_on_tokens_whose_range_depends_on_their_place():
    """Pictures are not alike from top to bottom: the range is sampled all over them."""
    source, target = spec(12), spec(20)
    place = torch.linspace(0.2, 5, GRID**2)[:, None]
    x, y = tokens(source, 40, scale=1.0) - 5, tokens(target, 40, seed=1, scale=1.0) - 5
    x[:, 1:] *= place
    y[:, 1:] = x[:, 1:] @ torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    calibration = Calibration()
    calibration.update(source, target, x, y)
    linear, mlp = (StitchSpec(f).build(source, target, 2) for f in ("linear", "mlp"))
    linear.start(calibration)
    mlp.start(calibration)
    off = (linear(x, None) - mlp(x, None)).abs().amax(-1).detach()
    assert (off[:, 1:] < 1e-3).float().mean() > 0.9


def test_class_token_has_a_ridge_map_of_its_own():
    source, target = spec(6), spec(5)
    x, y = tokens(source, 400), tokens(target, 400, seed=1)
    map_ = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    y[:, 0] = x[:, 0] @ map_ + 2
    calibration = Calibration()
    calibration.update(source, target, x, y)
    stitch = StitchSpec("linear").build(source, target, 1)
    stitch.start(calibration, penalty=1e-10)
    assert torch.allclose(stitch(x, None)[:, 0], y[:, 0], atol=1e-3)


def test_learned_prefix_starts_as_the_targets_mean():
    source, target = spec(6, cls=False), spec(5, cls=True, registers=3)
    x, y = tokens(source, 30), tokens(target, 30, seed=1)
    calibration = Calibration()
    calibration.update(source, target, x[:11], y[:11])
    calibration.update(source, target, x[11:], y[11:])
    stitch = StitchSpec("mlp_skip").build(source, target, 1)
    stitch.start(calibration)
    assert torch.allclose(stitch(x, None)[:, :4], y[:, :4].mean(0).expand(30, -1, -1), atol=1e-4)


def test_random_start_keeps_the_statistics_but_not_the_map():
    source, target = spec(6), spec(5)
    calibration = Calibration()
    calibration.update(source, target, tokens(source, 30), tokens(target, 30, seed=1))
    stitch = StitchSpec("linear").build(source, target, 1)
    before = stitch.patches.inner.weight.clone()
    assert stitch.start(calibration, form=None) is None
    assert torch.equal(stitch.patches.inner.weight, before)
    assert torch.allclose(stitch.patches.y_mean, tokens(target, 30, seed=1)[:, 1:].flatten(0, 1).mean(0), atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"registers": 4}])
def test_lora_starts_as_the_trunks_own_block_and_equals_peft(options):
    import copy

    from peft import LoraConfig, inject_adapter_in_model

    source = spec(16, **options)
    trunk = trunk_of(source)
    stitch = StitchSpec("lora", {"rank": 4, "alpha": 6.0}).build(source, source, 2)
    x = tokens(source, 3, scale=1.0)
    own = trunk.run(x, 1, 2)
    y = stitch(x, trunk)
    assert torch.allclose(y[:, :1], own[:, :1], atol=1e-6)
    assert torch.allclose(y[:, source.prefix :], own[:, source.prefix :], atol=1e-6)
    with torch.no_grad():
        for pair in stitch.factors.values():
            pair.lora_B.normal_(0, 0.1)
    layers = [n for n, m in trunk.blocks["1"].named_modules() if isinstance(m, nn.Linear)]
    assert stitch.adapted == layers
    block = inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=6, target_modules=layers), copy.deepcopy(trunk.blocks["1"])
    )
    with torch.no_grad():
        for name in layers:
            theirs, ours = block.get_submodule(name), stitch.factors[name.replace(".", "_")]
            theirs.lora_A["default"].weight.copy_(ours.lora_A)
            theirs.lora_B["default"].weight.copy_(ours.lora_B)
    expected = block(x)
    y = stitch(x, trunk)
    assert not torch.allclose(y[:, source.prefix :], own[:, source.prefix :], atol=1e-2)
    assert torch.allclose(y[:, :1], expected[:, :1], atol=1e-5)
    assert torch.allclose(y[:, source.prefix :], expected[:, source.prefix :], atol=1e-5)
    y.sum().backward()
    assert all(p.grad is not None for p in stitch.factors.parameters())
    assert all(p.grad is None for p in trunk.parameters())


@pytest.mark.parametrize("swiglu", [False, True])
def test_lora_adapts_rotary_blocks(swiglu):
    source = spec(16, registers=4, family="dinov3", position="rotary", mlp="swiglu" if swiglu else "gelu")
    trunk = trunk_of(source)
    stitch = StitchSpec("lora").build(source, source, 2)
    x = tokens(source, 2, scale=1.0)
    assert torch.allclose(stitch(x, trunk)[:, 5:], trunk.run(x, 1, 2)[:, 5:], atol=1e-6)


def test_mlp_is_the_papers():
    source, target = spec(6), spec(5)
    stitch = StitchSpec("mlp").build(source, target, 1)
    first, _, second = stitch.patches.inner
    x = tokens(source, 2)
    naive = torch.relu(x[:, 1:] @ first.weight.T + first.bias) @ second.weight.T + second.bias
    assert torch.allclose(stitch(x, None)[:, 1:], naive, atol=1e-5)
    assert first.weight.shape == (5, 6)
    assert second.weight.shape == (5, 5)


def test_a_family_that_says_closed_form_has_to_have_one():
    from vst.tree.stitches import Stitch, register

    with pytest.raises(TypeError, match="'empty_for_test' says closed_form; give it a start"):
        register(type("Empty", (Stitch,), {"family": "empty_for_test", "closed_form": True}))
    assert "empty_for_test" not in STITCHES


def test_a_new_family_is_one_class():
    from vst.tree.stitches import Stitch, register

    @register
    class Scale(Stitch):
        family = "scale_for_test"

        def __init__(self, source, target, split, *, by: float = 1.0):
            super().__init__(source, target, split)
            self.by = nn.Parameter(torch.tensor(by))

        def transform(self, x, trunk):
            return (x[:, :1] if self.maps_cls else None), self.by * x[:, self.source.prefix :]

    try:
        model = spec(6)
        stitch = StitchSpec.parse({"family": "scale_for_test", "by": 2.0}).build(model, model, 1)
        x = tokens(model, 2)
        assert torch.equal(stitch(x, None)[:, 1:], 2 * x[:, 1:])
    finally:
        del STITCHES["scale_for_test"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StitchSpec("conv"), "Unknown stitch family 'conv'; known families: .*linear.*mlp"),
        (lambda: StitchSpec("linear", {"rank": 3}), "has no option .*rank"),
        (lambda: StitchSpec("lora").build(spec(16), spec(12), 1), "width 16.*width 12.*use linear"),
        (lambda: StitchSpec("mlp", {"hidden": 0}).build(spec(), spec(), 1), "0 hidden units"),
        (lambda: StitchSpec("linear", {"reads": 0}).reads(3), "A linear stitch that reads 0 depths was asked for"),
        (lambda: StitchSpec("linear", {"reads": "two"}), "linear stitch: reads"),
        (lambda: StitchSpec("lora", {"reads": 2}), "no option .*reads"),
        (lambda: StitchSpec("lora", {"rank": 0}).build(spec(), spec(), 1), "rank 0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_mlp_too_narrow_for_a_ridge_start_says_so():
    model = spec(8)
    calibration = Calibration()
    calibration.update(model, model, tokens(model, 5), tokens(model, 5))
    with pytest.raises(ValueError, match="4 hidden units cannot start from a ridge map of width 8"):
        StitchSpec("mlp", {"hidden": 4}).build(model, model, 1).start(calibration)


def test_ridge_sums_refuse_what_is_not_finite():
    model = spec(8)
    x = tokens(model, 3)
    x[0, 3, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        Calibration().update(model, model, x, tokens(model, 3))
