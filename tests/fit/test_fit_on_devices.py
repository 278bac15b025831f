"""A fit on a CPU and on a GPU, each in a process of its own: against a CPU in fp32, resumed, cached, by DeepSpeed."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TUNE = {"trunk": "lora", "tails": "lora", "rank": 4}  # what is compared holds its changes as well
OPTIONS = {"epochs": 2, "batch_size": 8, "heldout": 8, "lr": 1e-3, "save_every": 3, "tune": TUNE}
KILLED = 137


class Kit:
    """Fits of one tree on one folder of pictures, whose results lie below ``root``."""

    def __init__(self, root):
        self.root, self.pictures, self.tree = root, root / "pictures", root / "tree"
        self.plain = functools.cache(self._plain)

    def _plain(self, device, precision):
        """An uninterrupted fit, made once for all tests."""
        return self.run(f"plain-{device}-{precision}", device, precision=precision)

    def run(self, name, device, launch=(), status=0, **options):
        told = {"tree": str(self.tree), "images": str(self.pictures), "folder": str(self.root / name)}
        words = [sys.executable, *launch, __file__, json.dumps({**told, **OPTIONS, **options})]
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == status, done.stdout + done.stderr
        if status:
            return None
        environment = json.loads((self.root / name / "environment.json").read_text())
        assert environment["device"].startswith(device)
        results = json.loads((self.root / name / "results.json").read_text())["results"]
        return load_file(self.root / name / "stitches" / "stitches.safetensors"), results


@pytest.fixture(scope="module")
def kit(tree_of, pictures, tmp_path_factory):
    kit = Kit(tmp_path_factory.mktemp("fits"))
    tree_of("dinov2", "clip", splits=[1, 2]).save_pretrained(kit.tree)
    kit.pictures.mkdir()
    for i, picture in enumerate(pictures):
        picture.save(kit.pictures / f"{i:02d}.png")
    return kit


def apart(found, expected):
    """How far two sets of weights lie from each other, over the length of the second."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in expected)
    return (difference / sum(float(x.double().square().sum()) for x in expected.values())) ** 0.5


def errors(results):
    return torch.tensor([[r["seam"]["channel_error"], r["final"]["channel_error"]] for r in results["reports"]])


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_as_on_a_cpu_in_fp32(kit, device, precision, close):
    """In fp32 sums differ in their order alone; a number in bf16 has 8 bits, so that it is rounded by up to 0.4 %."""
    expected, told = kit.plain("cpu", "fp32")
    found, said = kit.plain(device, precision)
    assert apart(found, expected) < close
    torch.testing.assert_close(errors(said), errors(told), rtol=2 * close, atol=2 * close)
    losses = [torch.tensor([row["mean"] for row in results["history"]]) for results in (said, told)]
    torch.testing.assert_close(*losses, rtol=2 * close, atol=0)


@pytest.mark.cuda
def test_stitches_alone(kit):
    found, expected = (kit.run(f"alone-{on}", on, precision="fp32", tune={})[0] for on in ("cuda", "cpu"))
    assert not any(name.startswith("changes.") for name in expected)
    assert apart(found, expected) < 1e-3


def test_a_resumed_fit_is_the_uninterrupted_one(kit, device):
    whole, told = kit.plain(device, "bf16")
    kit.run(f"killed-{device}", device, precision="bf16", status=KILLED, kill_at=5)
    assert [path.name for path in (kit.root / f"killed-{device}" / "state").iterdir()] == ["step-00000003"]
    resumed, said = kit.run(f"killed-{device}", device, precision="bf16", resume=True)
    # The same kernels in the same order; those that add in any order are switched off in the script below.
    assert apart(resumed, whole) < (1e-12 if device == "cpu" else 1e-6)
    assert [row["step"] for row in said["history"]] == [row["step"] for row in told["history"]]


def test_targets_on_disk(kit, device):
    """Written by a fit, read by the next; both as one that computes them, to what fp16 and bf16 round off."""
    plain, cache = kit.plain(device, "bf16")[0], kit.root / f"cache-{device}"
    options = {"precision": "bf16", "cache": str(cache)}
    written, read = (kit.run(f"{name}-{device}", device, **options)[0] for name in ("written", "read"))
    assert list(cache.glob("*/rows.f16"))
    assert apart(read, written) < 1e-2
    assert apart(written, plain) < 1e-2


@pytest.mark.slow
def test_by_deepspeed_in_one_process(kit, device):
    """Over NCCL on a GPU, over gloo on a CPU; the run fails unless the engine is DeepSpeed's."""
    pytest.importorskip("deepspeed")
    config = kit.root / "zero2.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"]
    plain = kit.plain(device, "fp32")[0]
    backend = {"cpu": "gloo", "cuda": "nccl"}[device]
    zero = kit.run(f"zero-{device}", device, launch, precision="fp32", deepspeed=str(config), backend=backend)[0]
    assert apart(zero, plain) < 1e-3


def main(tree, images, kill_at=None, backend=None, **options):
    import torch.distributed as dist

    from vst import VSTEncoder, fit_stitches
    from vst.fit.processes import leave_group
    from vst.fit.steps import Steps

    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    own, made = Steps.step, []

    def step(self, *args):
        made.append(1)
        if len(made) == kill_at:
            os._exit(KILLED)
        return own(self, *args)

    Steps.step = step
    fit_stitches(VSTEncoder.from_pretrained(tree), images, show_progress=False, **options)
    assert backend is None or backend in dist.get_backend()
    assert kill_at is None
    leave_group()


if __name__ == "__main__":
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent]
    main(**json.loads(sys.argv[1]))
