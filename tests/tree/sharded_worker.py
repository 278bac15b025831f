"""Run by test_sharded.py in two processes: trees that FSDP shards give what they gave before."""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from vst import VSTEncoder
from vst.fit.processes import leave_group

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:  # torch < 2.6
    from torch.distributed._composable.fsdp import fully_shard


def shard(tree, how, mesh):
    """Shard a tree whole, or its parts each by itself, or every block by itself, and then what is left."""
    if how == "blocks":
        for module in tree.modules():
            if type(module).__name__ in ("Block", "EvaBlock"):
                fully_shard(module, mesh=mesh)
    if how in ("parts", "blocks"):
        for part in (tree.trunk, *tree.branches.values()):
            fully_shard(part, mesh=mesh)
    fully_shard(tree, mesh=mesh)


@torch.no_grad()
def outputs(tree, pixels):
    """All that a tree offers, by name."""
    out = {f"fused {s}": tree(pixels, split=s) for s in tree.splits}
    out |= {f"swept {s} {n}": x for s, found in tree.sweep(pixels).items() for n, x in found.items()}
    out |= {f"features {n}": f.tokens for n, f in tree.features(pixels).items()}
    taps = tree.taps(pixels)
    out |= {f"from taps {s} {n}": x for s in tree.splits for n, x in tree.from_taps(taps, s).items()}
    return out


def gradients(tree, pixels):
    """Of the stitches, whole, by name."""
    tree.zero_grad()
    tree(pixels).square().mean().backward()
    found = {n: p.grad for n, p in tree.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def main(folders):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for folder in folders:
        for how in ("root", "parts", "blocks"):
            tree = VSTEncoder.from_pretrained(folder).eval()
            pixels = torch.randn(2, 3, tree.image_size, tree.image_size, generator=torch.Generator().manual_seed(0))
            wanted, slopes = outputs(tree, pixels), gradients(tree, pixels)
            shard(tree, how, mesh)
            assert all(isinstance(p, DTensor) for p in tree.parameters())
            for _ in range(2):
                found = outputs(tree, pixels)
                assert found.keys() == wanted.keys()
                assert all(torch.equal(found[name], x) for name, x in wanted.items()), (folder, how)
            again = gradients(tree, pixels)
            assert again.keys() == slopes.keys()
            assert slopes
            for name, slope in slopes.items():
                torch.testing.assert_close(again[name], slope, msg=f"{folder} {how} {name}")
            if dist.get_rank() == 0:
                print("equal:", folder.rpartition("/")[2], how, flush=True)
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1:])
