"""Training in two gloo processes on a CPU: DeepSpeed against plain DDP, killed runs against uninterrupted ones."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]
pytest_plugins = ("training_kit",)
pytestmark = pytest.mark.slow
ZERO = {"zero2": "configs/deepspeed/zero2.json", "zero3": "configs/deepspeed/zero3.json"}
STAGES = {
    "stage 1": {"llm": "none"},
    "stitches": {"llm": "none", "stitches": True, "stitch_lr": 1e-3},
    "full": {"llm": "full"},
    "lora": {"llm": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0},
}
STEPS = 10


def start(kit, out, tune, engine=None, steps=STEPS, **more):
    """Two processes of the script; conversations 5 and 6 make a batch without any picture in one of them."""
    trainer = {"max_steps": steps, "save_steps": 3, "learning_rate": 1e-3, "warmup_steps": 0}
    trainer |= {"per_device_train_batch_size": 2, "seed": 0, "dataloader_num_workers": 0}
    if engine:
        trainer["deepspeed"] = str(ROOT / ZERO[engine])
    config = kit.yaml(out, tune=tune, trainer=trainer, batch_size=4, **({"split": 1} | more))
    file = out.with_suffix(".yaml")
    config.rename(file)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [*command, str(ROOT / "train" / "mllm.py"), "--config", str(file), "--resume"],
        stdout=out.with_suffix(".log").open("w"), stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
    )  # fmt: skip
    return process, out.with_suffix(".log")  # a file and not a pipe: nobody reads while a test waits for a checkpoint


def finish(started, timeout=240):
    process, log = started
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"the run hangs: {log.read_text()[-3000:]}")
    assert process.returncode == 0, log.read_text()[-3000:]
    return log.read_text()


def kill(process):
    """The launcher and its workers, at once."""
    for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        child.kill()
    process.wait()


def results(folder):
    found = json.loads((folder / "results.json").read_text())["results"]
    return found, [row["loss"] for row in found["history"]]


@pytest.fixture(scope="module")
def plain():
    """Losses of plain DDP, by stage, computed once."""
    return {}


@pytest.fixture
def ddp(kit, tmp_path, plain):
    def losses(stage):
        if stage not in plain:
            finish(start(kit, tmp_path / "ddp", STAGES[stage]))
            found, plain[stage] = results(tmp_path / "ddp")
            assert found["engine"] == "DistributedDataParallel"
        return plain[stage]

    return losses


@pytest.mark.parametrize(
    ("engine", "stage"), [("zero2", "stage 1"), ("zero2", "stitches"), ("zero3", "full"), ("zero3", "lora")]
)
def test_losses_are_those_of_plain_ddp(kit, tmp_path, ddp, engine, stage):
    expected = ddp(stage)
    out = finish(start(kit, tmp_path / "run", STAGES[stage], engine))
    found, losses = results(tmp_path / "run")
    assert found["engine"] == "DeepSpeedEngine"
    assert "training runs in DeepSpeedEngine, 2 processes" in out
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0]
    before = kit.built().state_dict()
    after = load_file(tmp_path / "run" / "model.safetensors")
    names = {n.removeprefix("model."): p for n, p in before.items()}
    tower = {n: p for n, p in after.items() if "vision_tower" in n}
    moved = {n for n, p in tower.items() if not torch.equal(p, names[n.removeprefix("model.")])}
    frozen = {n for n in tower if ".stitches." not in n}
    assert tower
    assert not moved & frozen
    assert bool(moved) == (stage == "stitches")
    if moved:
        assert all(".stitches.1." in n for n in moved)


@pytest.mark.parametrize(("engine", "stage"), [("zero2", "stage 1"), ("zero3", "full")])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(kit, tmp_path, engine, stage):
    finish(start(kit, tmp_path / "whole", STAGES[stage], engine, split="random"))
    process, log = start(kit, tmp_path / "parts", STAGES[stage], engine, split="random")
    marks = tmp_path / "parts" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(marks.glob("checkpoint-3/complete")):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process)
    assert not (tmp_path / "parts" / "results.json").exists()
    log = finish(start(kit, tmp_path / "parts", STAGES[stage], engine, split="random"))
    assert "which is read by unpickling" in log
    assert results(tmp_path / "parts")[1] == pytest.approx(results(tmp_path / "whole")[1], abs=1e-6)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], atol=1e-6), name


@pytest.mark.parametrize("engine", [None, "zero3"])
def test_steps_without_any_picture_do_not_hang(kit, tmp_path, engine):
    """Every process, in every step, sees text alone."""
    records = [r for r in json.loads((kit.folder / "data.json").read_text()) if "image" not in r]
    (kit.folder / "data.json").write_text(json.dumps(records * 4))
    finish(start(kit, tmp_path / "run", {"llm": "full"}, engine, steps=2))
    assert len(results(tmp_path / "run")[1]) == 2
