"""configs/deepspeed: under transformers' Trainer each gives the losses of plain training; ``vst fit`` takes them too.

As a script this file is what the launched processes run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from vst.fit.processes import leave_group

ROOT = Path(__file__).parents[3]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs" / "deepspeed").glob("*.json"))}
LAUNCH = (ROOT / "docs" / "launch.md").read_text()
PROCESSES, CLIP = 2, 0.5


def train(out, deepspeed, bf16):
    """Three steps of a tiny Llama with a frozen table of embeddings; what was seen goes to ``out``."""
    torch.manual_seed(0)
    rows = torch.randint(0, 64, (8, 16)).repeat(3, 1)  # each step sees all eight sequences
    config = t.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = t.LlamaForCausalLM(config)
    model.model.embed_tokens.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    arguments = t.TrainingArguments(
        output_dir=f"{out}/trainer",
        use_cpu=True,
        bf16=bf16,
        deepspeed=deepspeed,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = t.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    facts = {
        "engine": type(trainer.model_wrapped).__name__,
        "losses": [row["loss"] for row in log],
        "norms": [row["grad_norm"] for row in log],
        "backend": torch.distributed.get_backend(),
        "trained": trained,
    }
    if deepspeed is not None:
        engine = trainer.model_wrapped
        facts |= {
            "stage": engine.zero_optimization_stage(),
            "clip": engine.gradient_clipping(),
            "batch": [engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()],
            "optimizer": type(engine.basic_optimizer).__name__,
            "offload": [
                part is not None and str(part.device)
                for part in (engine.zero_offload_optimizer(), engine.zero_offload_param())
            ],
            "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
            "optimizer_bytes": optimizer_bytes(engine.optimizer),
        }
    trainer.save_model(f"{out}/model")
    Path(out, f"{arguments.process_index}.json").write_text(json.dumps(facts))


def optimizer_bytes(optimizer):
    """What this process holds for the optimizer: moments, and fp32 weights that are not the model's own."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        steps_on, own = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups_flat
    else:
        steps_on, own = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat
    storages = {tensor.untyped_storage().data_ptr() for tensor in own}
    copies = [tensor for tensor in steps_on if tensor.untyped_storage().data_ptr() not in storages]
    moments = [v for state in optimizer.optimizer.state.values() for v in state.values() if v.numel() > 1]
    return sum(tensor.numel() * tensor.element_size() for tensor in copies + moments)


def launch(folder, deepspeed=None, bf16=False):
    """What each process of a run saw."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    command += [__file__, str(folder), str(deepspeed or ""), "bf16" if bf16 else ""]
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        out, _ = process.communicate(timeout=270)
    except subprocess.TimeoutExpired:
        for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
            victim.kill()
        out, _ = process.communicate()
        pytest.fail(f"no end after 270 s: {out[-3000:]}")
    assert process.returncode == 0, out[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return {**launch(folder)[0], "weights": load_file(folder / "model" / "model.safetensors")}


def test_there_are_configs_to_test():
    assert set(CONFIGS) == {"zero2", "zero2_offload", "zero3", "zero3_offload"}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_trainer_decides_is_left_to_it(name):
    facts = json.loads(CONFIGS[name].read_text())
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert facts[key] == "auto"
    assert facts["bf16"] == facts["fp16"] == {"enabled": "auto"}
    assert not {"optimizer", "scheduler", "train_batch_size"} & set(facts)
    zero = facts["zero_optimization"]
    assert str(zero["stage"]) in name
    assert ("offload_optimizer" in zero) == ("offload" in name)
    assert ("offload_param" in zero) == (name == "zero3_offload")
    assert facts.get("zero_force_ds_cpu_optimizer", True) == ("offload" not in name)


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", LAUNCH, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if "train/mllm.py" in line]


def test_launch_lines_parse():
    """The real launchers' parsers take them, the shell takes the batch script, and configs exist."""
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    found = {"torchrun": 0, "deepspeed": 0}
    for line in commands():
        words = shlex.split(line)
        words = words[next(i for i, word in enumerate(words) if word in found) :]
        known = parse_args(words[1:]) if words[0] == "deepspeed" else get_args_parser().parse_args(words[1:])
        found[words[0]] += 1
        script = known.user_script if words[0] == "deepspeed" else known.training_script
        assert script == "train/mllm.py"
        assert Path(ROOT, words[words.index("--trainer.deepspeed") + 1]).exists()
    assert found == {"torchrun": 6, "deepspeed": 2}
    (batch,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", LAUNCH, re.S)
    subprocess.run(["bash", "-n"], input=batch, text=True, check=True)
    assert set(re.findall(r"`(\w+)\.json`", LAUNCH)) - {"results"} == set(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_are_those_of_plain_training(name, plain, tmp_path):
    assert plain["engine"] == "DistributedDataParallel"
    assert plain["losses"][2] < plain["losses"][0] - 0.1  # or the losses would say little of the steps
    assert min(plain["norms"]) > CLIP
    zero = json.loads(CONFIGS[name].read_text())["zero_optimization"]
    stage, offload = zero["stage"], "offload_optimizer" in zero
    ranks = launch(tmp_path / "run", CONFIGS[name])
    for facts in ranks:
        assert facts["engine"] == "DeepSpeedEngine"
        assert facts["backend"] == "gloo"
        assert facts["losses"] == pytest.approx(plain["losses"], abs=1e-4)
        assert facts["norms"] == pytest.approx(plain["norms"], abs=1e-4)
        assert (facts["stage"], facts["clip"], facts["batch"]) == (stage, CLIP, [2, 2])
        assert facts["optimizer"] == "AdamW"
        assert facts["offload"] == ["cpu" if key in zero else False for key in ("offload_optimizer", "offload_param")]
        assert facts["dtypes"] == ["torch.float32"]
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")  # under ZeRO-3 gathered from all processes
    assert saved.keys() == plain["weights"].keys()
    for key, value in plain["weights"].items():
        torch.testing.assert_close(saved[key], value, atol=1e-4, rtol=0)
    plan = plan_of(stage, offload, bf16=False)
    held = [facts["optimizer_bytes"] for facts in ranks]
    assert held == [plan.optimizer_bytes * plain["trained"] // PROCESSES] * PROCESSES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_bf16_follows_the_trainer(name, plain, tmp_path):
    ranks = launch(tmp_path / "run", CONFIGS[name], bf16=True)
    plan = plan_of(int(name[-1]), False, bf16=True)
    for facts in ranks:
        assert facts["dtypes"] == ["torch.bfloat16"]
        assert facts["losses"] == pytest.approx(plain["losses"], abs=2e-2)
        assert facts["optimizer_bytes"] == plan.optimizer_bytes * plain["trained"] // PROCESSES


def plan_of(stage, offload, bf16):
    """The same run as the estimate of memory sees it."""
    from llava_integration.train.memory import Plan

    return Plan(
        llm="full", projector=False, param_bytes=2 if bf16 else 4, master=bf16, zero=stage, offload_optimizer=offload,
        processes=PROCESSES, batch=2, length=16,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero2_offload"])
def test_a_fit_of_stitches_takes_them_too(tiny, picture_folder, tmp_path, name):
    from test_fitting import _config, _launch, _stitches

    config = _config(tiny, picture_folder, epochs=2)
    _launch(config, tmp_path / "plain", tmp_path, processes=PROCESSES)
    config["fit"]["deepspeed"] = str(CONFIGS[name])
    _launch(config, tmp_path / "zero", tmp_path, processes=PROCESSES)  # fails unless the engine is DeepSpeed's
    a, b = _stitches(tmp_path / "plain"), _stitches(tmp_path / "zero")
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2] or None, sys.argv[3] == "bf16")
    leave_group()
