"""Helpers of the parity tests: random models, and what their blocks put out."""

import pytest
import torch
from torch import nn

from vst.models.vfm import VFM

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Nothing here may reach a hub, and what would has to say so at once."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms and scales included, so that a mixed-up or dropped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            matrix = p.ndim == 2 and "embed" not in name and "token" not in name
            around_one = p.ndim == 1 and not name.endswith("bias") and "class_embedding" not in name
            p.copy_(noise / p.shape[-1] ** 0.5 if matrix else 0.5 * noise + 1.0 * around_one)
    return module.eval()


def pixels(side: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(7))


def recorded(model: nn.Module, first: nn.Module, blocks, last: nn.Module, run) -> tuple[list, torch.Tensor]:
    """Input of the first block, output of every block, output of the final norm on all tokens."""
    seen: list[torch.Tensor] = []

    def keep(_, __, out):
        seen.append((out[0] if isinstance(out, tuple) else out).detach())

    hooks = [first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))]
    hooks += [b.register_forward_hook(keep) for b in blocks]
    try:
        with torch.no_grad():
            run()
            return seen, last(seen[-1])
    finally:
        for hook in hooks:
            hook.remove()


def assert_same(vfm: VFM, states: list, final: torch.Tensor, x: torch.Tensor) -> None:
    with torch.no_grad():
        ours = vfm.taps(x, range(vfm.spec.depth + 1))
        assert len(states) == vfm.spec.depth + 1
        for depth, theirs in enumerate(states):
            torch.testing.assert_close(ours[depth], theirs, atol=TOLERANCE, rtol=0, msg=lambda m, d=depth: f"{d}: {m}")
        torch.testing.assert_close(vfm(x), final, atol=TOLERANCE, rtol=0)
    assert 0.1 < states[-1].std() < 100


def timm_states(model: nn.Module, x: torch.Tensor) -> tuple[list, torch.Tensor]:
    last = model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm
    return recorded(model, model.blocks[0], model.blocks, last, lambda: model.forward_features(x))
