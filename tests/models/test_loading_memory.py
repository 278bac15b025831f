"""Memory of loading, in processes of their own: no more than the blocks that are asked for is ever held."""

import json
import subprocess
import sys

import pytest
import torch

from vst import VSTEncoder
from vst.measure.cost import weights_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status"),
]

# Anonymous memory is what a process holds by itself; pages of a file that is mapped can be dropped at any time.
WATCH = """
import gc, json, sys, threading, time
import torch
from vst import VSTEncoder
import vst.models.checkpoints, safetensors.torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

torch.zeros(8, 8) @ torch.zeros(8, 8)
peak, over, before = 0, False, anonymous()

def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
made = {call}
over = True
thread.join()
made.requires_grad_(False)
touched = sum(float(p.sum()) for p in made.parameters())  # also where a file is mapped, the pages are read now
gc.collect()
print(json.dumps({{"peak": peak - before, "left": anonymous() - before, "held": sum(
    t.numel() * t.element_size() for t in made.state_dict().values())}}))
"""


def measured(call):
    done = subprocess.run([sys.executable, "-c", WATCH.format(call=call)], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A tree of two ViT-L, random: 1.9 GB on disk in fp32."""
    tree = VSTEncoder.from_vfms("dinov2-l", ["clip-l-336"], [6, 22], 56, pretrained=False)
    assert weights_bytes(tree.config, 6) > 1e9
    folder = tmp_path_factory.mktemp("large") / "tree"
    tree.save_pretrained(folder)
    return folder, tree.config


@pytest.mark.parametrize("dtype", ["None", "torch.bfloat16"])
@pytest.mark.parametrize("split", [6, 22])
def test_loading_one_split_holds_no_more_than_its_blocks(large, split, dtype):
    folder, config = large
    found = measured(f"VSTEncoder.from_pretrained({str(folder)!r}, splits=[{split}], dtype={dtype})")
    size = weights_bytes(config, split, torch.float32 if dtype == "None" else torch.bfloat16)
    assert found["held"] == pytest.approx(size, rel=0.01)
    assert found["peak"] <= 1.15 * size
    assert found["left"] <= 1.15 * size


def test_building_a_tree_keeps_no_discarded_block(tmp_path):
    """Two whole ViT-L on disk, of which the tree holds 23 blocks and 1: 1.2 of 2.4 GB."""
    import transformers as t

    config = t.Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    t.Dinov2Model(config).save_pretrained(tmp_path)
    found = measured(f"VSTEncoder.from_vfms('hf:{tmp_path}', ['hf:{tmp_path}'], [22], 56)")
    assert found["held"] == pytest.approx(25 / 48 * 2.43e9, rel=0.05)
    assert found["peak"] <= 1.15 * found["held"]
    assert found["left"] <= 1.15 * found["held"]
