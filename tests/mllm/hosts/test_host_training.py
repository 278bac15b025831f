"""What of a tower is trained, however a host says that the tower is."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava_integration.hosts.tower import VSTVisionTower

ARGS = SimpleNamespace(mm_vision_select_layer=-2)
PIXELS = torch.linspace(-1, 1, 3 * 56 * 56).view(1, 3, 56, 56)


@pytest.fixture
def folder(tree_of, tmp_path):
    return tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")


class Host(nn.Module):
    """A model with the tower where LLaVA has it."""

    def __init__(self, name):
        super().__init__()
        self.vision_tower = VSTVisionTower(name, ARGS)
        self.mm_projector = nn.Linear(self.vision_tower.hidden_size, 8)

    def forward(self, pixels):
        return self.mm_projector(self.vision_tower(pixels))


def by_switch(host):
    host.vision_tower.requires_grad_(True)


def by_name(host):
    """``mm_tunable_parts`` of LLaVA-NeXT."""
    host.requires_grad_(False)
    for name, parameter in host.named_parameters():
        if "vision_tower" in name:
            parameter.requires_grad_(True)


def by_parameter(host):
    """Cambrian."""
    for parameter in host.vision_tower.parameters():
        parameter.requires_grad = True


def all_of_it(host):
    host.requires_grad_(True)


def inside(host):
    host.vision_tower.vision_tower.requires_grad_(True)


WAYS = [by_switch, by_name, by_parameter, all_of_it, inside]


def trained(host):
    """The names that an optimizer is given."""
    return {n for n, p in host.named_parameters() if p.requires_grad and "vision_tower" in n}


@pytest.mark.parametrize("free", WAYS)
class TestWhatIsTrained:
    def test_its_stitches_alone(self, folder, free, caplog):
        host = Host(f"vst:{folder}")
        free(host)
        found = trained(host)
        assert found
        assert all(".stitches.3." in name for name in found)
        assert caplog.text.count("its stitches alone are") == 1
        before = {n: p.detach().clone() for n, p in host.named_parameters()}
        optimizer = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        host(PIXELS).sin().sum().backward()
        optimizer.step()
        moved = {n for n, p in host.named_parameters() if not torch.equal(p, before[n]) and "vision_tower" in n}
        assert moved
        assert all(".stitches.3." in name for name in moved)

    def test_all_of_it_by_one_word(self, folder, free, caplog):
        host = Host(f"vst:{folder}+whole")
        free(host)
        found = trained(host)
        host(PIXELS).sin().sum().backward()
        assert found == {n for n, p in host.named_parameters() if p.grad is not None and "vision_tower" in n}
        assert any("patch_embed" in name for name in found)
        assert not any(".stitches.1." in name for name in found)
        assert "+whole" not in caplog.text.replace(f"{folder}+whole", "")

    def test_another_split(self, folder, free):
        host = Host(f"vst:{folder}")
        free(host)
        assert trained(host)
        host.vision_tower.split = 1
        assert all(".stitches.1." in name for name in trained(host))
        assert trained(host)


def test_what_is_freed_by_hand_is_left(folder, caplog):
    host = Host(f"vst:{folder}")
    host.vision_tower.vision_tower.freeze()
    assert {name.split(".stitches.")[1][0] for name in trained(host)} == {"1", "3"}
    host.requires_grad_(False)
    assert not trained(host)
    assert not caplog.records


def test_a_frozen_tower_is_not_touched(folder, caplog):
    host = Host(f"vst:{folder}")
    host.mm_projector.requires_grad_(True)
    assert not trained(host)
    assert not host.vision_tower(PIXELS).requires_grad
    assert not caplog.records


def test_float16_is_told_before(folder, caplog):
    caplog.set_level(logging.WARNING, "llava_integration")
    host = Host(f"vst:{folder}")
    host.vision_tower.half()
    host(PIXELS)
    assert not caplog.records
    by_switch(host)
    host(PIXELS)
    host(PIXELS)
    assert caplog.text.count("is trained in float16") == 1


PROCESSES = """
import sys, torch
from types import SimpleNamespace
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from llava_integration.hosts.tower import VSTVisionTower
torch.distributed.init_process_group("gloo")
class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = VSTVisionTower(sys.argv[1], SimpleNamespace())
        self.mm_projector = nn.Linear(self.vision_tower.hidden_size, 8)
    def forward(self, pixels):
        return self.mm_projector(self.vision_tower(pixels))
torch.manual_seed(0)
host = Host()
if sys.argv[2] == "host":
    host.requires_grad_(True)
else:
    host.vision_tower.vision_tower.freeze()
model = DistributedDataParallel(host)
for step in range(3):
    torch.manual_seed(step + 10 * torch.distributed.get_rank())
    model(torch.randn(2, 3, 56, 56)).sin().sum().backward()
print("DONE")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "who", "works"),
    [("", "host", True), ("+whole", "host", True), ("", "hand", False), ("@3", "hand", True)],
)
def test_two_processes_and_two_splits(folder, tmp_path, suffix, who, works):
    """What no split reaches ends such a run: the host's own choice leaves it out, another one is told."""
    (tmp_path / "run.py").write_text(PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(tmp_path / "run.py"), f"vst:{folder}{suffix}", who]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert (done.returncode == 0) == works, done.stderr[-3000:]
    assert done.stdout.count("DONE") == 2 * works
    assert ("name the split (vst:PATH@SPLIT)" in done.stderr) != works
