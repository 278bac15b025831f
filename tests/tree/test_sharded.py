"""Trees under what hooks the calls of modules: FSDP in two processes, and a listener on every module."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vst.tree.baseline import FullTower

TREES = {
    "plain": (("dinov2", "clip"), {}),
    "rotary": (("dinov3", "dinov3", "siglip"), {}),
    "lora": (("dinov2", "clip"), {"stitch": "lora", "widths": (32, 32)}),
    "lora-rotary": (("dinov3", "clip"), {"stitch": "lora", "widths": (32, 32)}),
    "normed": (("dinov2_registers", "clip"), {"feature_norm": True}),
    "other-parts": (("clip", "siglip"), {"stitch": "linear", "keep_trunk": False}),
}


@pytest.mark.slow
def test_sharded_trees_give_the_same(tree_of, tmp_path):
    for name, (models, options) in TREES.items():
        tree_of(*models, **options).save_pretrained(tmp_path / name)
    worker = str(Path(__file__).with_name("sharded_worker.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", worker]
    done = subprocess.run([*command, *(str(tmp_path / name) for name in TREES)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-4000:]
    told = [line.removeprefix("equal: ") for line in done.stdout.splitlines() if line.startswith("equal: ")]
    assert told == [f"{name} {how}" for name in TREES for how in ("root", "parts", "blocks")]


def found_in(out):
    """What hooks find in an output, which look into lists, tuples and mappings by name (DeepSpeed's, for one)."""
    if isinstance(out, dict):
        assert all(isinstance(name, str) for name in out)
        out = list(out.values())
    return [x for one in out for x in found_in(one)] if isinstance(out, (list, tuple)) else [out]


class _Calls:
    """Weights of a module, and of all below it, are NaN outside of its calls: what is read past them shows."""

    def __init__(self, module):
        self.kept = {p: p.detach().clone() for p in module.parameters()}
        self.depth = 0
        self.hide()
        module.register_forward_pre_hook(self.bring)
        module.register_forward_hook(self.take, always_call=True)

    def hide(self):
        with torch.no_grad():
            for p in self.kept:
                p.fill_(float("nan"))

    def bring(self, module, args):
        self.depth += 1
        if self.depth == 1:
            with torch.no_grad():
                for p, value in self.kept.items():
                    p.copy_(value)

    def take(self, module, args, out):
        assert all(isinstance(x, torch.Tensor) for x in found_in(out))
        self.depth -= 1
        if not self.depth:
            self.hide()


@torch.no_grad()
def everything(tree, pixels):
    taps = tree.taps(pixels)
    out = [tree(pixels, split=s) for s in tree.splits]
    out += [x for found in tree.sweep(pixels).values() for x in found.values()]
    out += list(tree.branch_tokens(pixels).values()) + [f.map for f in tree.features(pixels).values()]
    return out + [x for s in tree.splits for x in tree.from_taps(taps, s).values()]


@pytest.mark.parametrize("name", [name for name in TREES if not name.startswith("lora")])
@pytest.mark.parametrize("where", ["root", "parts"])
def test_all_is_computed_in_calls(tree_of, name, where):
    models, options = TREES[name]
    tree = tree_of(*models, **options)
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size)
    wanted = everything(tree, pixels)
    for module in [tree] if where == "root" else [tree.trunk, *tree.branches.values()]:
        _Calls(module)
    assert all(torch.equal(a, b) for a, b in zip(everything(tree, pixels), wanted, strict=True))
    assert all(p.isnan().all() for p in tree.parameters())


def test_models_in_full_are_computed_in_calls(tree_of):
    tower = FullTower.from_config(tree_of("dinov3", "dinov2_registers").config)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = tower(pixels)
        for model in tower.models.values():
            _Calls(model)
        assert torch.equal(tower(pixels), wanted)


def test_a_vfm_is_computed_in_calls(tree_of):
    trunk = tree_of("dinov2_registers", "clip", feature_norm=True).trunk
    pixels = torch.randn(2, 3, 56, 56)

    def whole():
        taps = trunk.taps(pixels, [0, 2, 3])
        walked = dict(trunk.walk(pixels, [1, 3]))
        return [
            *taps.values(),
            *walked.values(),
            trunk.embed(pixels),
            trunk.run(taps[2], 2, 3),
            trunk.features(taps[3]),
        ]

    with torch.no_grad():
        wanted = whole()
        _Calls(trunk)
        assert all(torch.equal(a, b) for a, b in zip(whole(), wanted, strict=True))
