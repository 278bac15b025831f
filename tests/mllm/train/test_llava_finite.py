"""Numbers that are not finite end a training: the step is named, nothing is exported, what was good is kept."""

import json

import pytest
import torch
from safetensors.torch import load_file

from llava_integration.train.config import TuneConfig
from llava_integration.train.finite import NotFinite
from llava_integration.train.trainer import MLLMTrainer
from llava_integration.train.training import train
from vst.models.finite import not_finite

pytest_plugins = ("training_kit",)
FULL = TuneConfig(llm="full")


def poisoned(monkeypatch, call, value=float("nan")):
    """From the given call on, one batch's pixels are not numbers."""
    own, calls = MLLMTrainer.compute_loss, []

    def compute_loss(self, model, inputs, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], value)
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(MLLMTrainer, "compute_loss", compute_loss)


def nothing_is_exported(folder):
    left = {path.name for path in folder.iterdir()}
    assert left <= {"run.json", "environment.json", "pictures.json", "checkpoints"}


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_rate_that_blows_up_ends_the_run(kit, tmp_path, clip):
    with pytest.raises(NotFinite, match=r"is not finite at step \d of 4.*learning_rate \(it is 1e\+30\)") as error:
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **kit.options(steps=4, rate=1e30, max_grad_norm=clip))
    assert "\n" not in str(error.value)
    nothing_is_exported(tmp_path / "run")


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_one_bad_batch_is_named_and_the_checkpoint_before_it_is_kept(kit, tmp_path, monkeypatch, logging_steps):
    poisoned(monkeypatch, 4)
    options = kit.options(steps=6, save=2, logging_steps=logging_steps)
    with pytest.raises(NotFinite, match=r"The loss is not finite at step 4 of 6.*checkpoint-2 is kept"):
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **options)
    nothing_is_exported(tmp_path / "run")
    (kept,) = (tmp_path / "run" / "checkpoints").glob("checkpoint-*")
    assert kept.name == "checkpoint-2"
    assert not not_finite(load_file(kept / "trained.safetensors"))
    monkeypatch.undo()
    train(kit.model, kit.data, str(tmp_path / "run"), FULL, **options, resume=True)  # the batch was mended
    train(kit.model, kit.data, str(tmp_path / "whole"), FULL, **options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_bad_part_of_an_accumulated_step_is_found(kit, tmp_path, monkeypatch):
    poisoned(monkeypatch, 3)
    options = kit.options(steps=2, per_device_train_batch_size=2)  # two parts a step
    with pytest.raises(NotFinite, match="The loss is not finite at step 2 of 2"):
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **options)


def test_a_bad_gradient_is_found_where_the_loss_is_finite(kit, tmp_path, monkeypatch):
    own = MLLMTrainer.training_step

    def spoiled(self, model, *args, **kwargs):
        loss = own(self, model, *args, **kwargs)
        if self.state.global_step == 1:
            model.lm_head.weight.grad[3, 2] = float("inf")
        return loss

    monkeypatch.setattr(MLLMTrainer, "training_step", spoiled)
    with pytest.raises(NotFinite, match=r"The gradient of .* is not finite at step 2 of 3"):
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **kit.options(steps=3))
    nothing_is_exported(tmp_path / "run")


@pytest.mark.parametrize("last", [True, False])
def test_bad_weights_are_neither_saved_nor_exported(kit, tmp_path, monkeypatch, last):
    """An update can overflow after the last look at losses and gradients."""
    own = MLLMTrainer.create_optimizer

    def spoiling(self, *args, **kwargs):
        optimizer = own(self, *args, **kwargs)

        def spoil(*_):
            if self.state.global_step == 1:
                self.model.lm_head.weight.data[0, 0] = float("inf")

        optimizer.register_step_post_hook(spoil)
        return optimizer

    monkeypatch.setattr(MLLMTrainer, "create_optimizer", spoiling)
    options = kit.options(steps=2 if last else 4, save=2, save_strategy="no" if last else "steps")
    with pytest.raises(NotFinite, match=r"A weight \(lm_head.weight\) is not finite at step 2"):
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **options)
    nothing_is_exported(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*/trained.safetensors"))


def test_damaged_weights_are_told_before_the_first_step(kit, tmp_path, monkeypatch):
    from llava_integration.train.model import ModelConfig

    build = ModelConfig.build

    def damaged(self, *args):
        model, processor = build(self, *args)
        model.lm_head.weight.data[5] = float("nan")
        return model, processor

    monkeypatch.setattr(ModelConfig, "build", damaged)
    with pytest.raises(NotFinite, match="to be trained holds values that are not finite in lm_head"):
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **kit.options(steps=3))


class Scaler:
    """A loss scale as torch's, at a given height."""

    def __init__(self, scale):
        self.scale = scale

    def is_enabled(self):
        return True

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize(("scale", "stops"), [(65536.0, False), (1.0, False), (0.5, True)])
def test_a_loss_scale_may_skip_steps_until_it_is_used_up(kit, scale, stops):
    model, processor = kit.model.build(torch.float32, 0)
    trainer = kit.trainer(model, processor)
    trainer.accelerator.scaler = Scaler(scale)
    projector = next(p for n, p in model.named_parameters() if "multi_modal_projector" in n)
    projector.grad = torch.full_like(projector, float("inf"))
    state = trainer.state

    def look():
        trainer.finite.on_pre_optimizer_step(trainer.args, state, trainer.control)

    if stops:
        with pytest.raises(NotFinite, match="The gradient of"):
            look()
    else:
        look()
    trainer.finite.see(torch.tensor(float("inf")))  # no scale makes a loss infinite
    with pytest.raises(NotFinite, match="The loss is not finite"):
        look()


class Engine:
    """What is asked of DeepSpeed's engine."""

    class optimizer:
        overflow = True

    def __init__(self, fp16):
        self.fp16 = fp16

    def fp16_enabled(self):
        return self.fp16

    def get_global_grad_norm(self):
        return float("inf")


@pytest.mark.parametrize("fp16", [True, False])
def test_an_overflow_under_deepspeed_is_the_scales_or_the_end(kit, fp16):
    model, processor = kit.model.build(torch.float32, 0)
    trainer = kit.trainer(model, processor)
    trainer.deepspeed = Engine(fp16)
    if fp16:
        trainer.finite.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)
    else:
        with pytest.raises(NotFinite, match="The gradient is not finite at step 1"):
            trainer.finite.on_pre_optimizer_step(trainer.args, trainer.state, trainer.control)


@pytest.mark.parametrize("changes", [{"logging_steps": 10}, {"logging_strategy": "no"}, {"logging_steps": 2}])
def test_losses_told_less_often_than_the_run_is_long(kit, tmp_path, changes):
    train(kit.model, kit.data, str(tmp_path / "run"), FULL, **kit.options(steps=3, **changes))
    train(kit.model, kit.data, str(tmp_path / "each"), FULL, **kit.options(steps=3))
    files = (tmp_path / name / "results.json" for name in ("run", "each"))
    rare, each = (json.loads(file.read_text())["results"]["history"] for file in files)
    steps = [2, 3] if changes == {"logging_steps": 2} else [3]
    assert [row["step"] for row in rare] == steps
    losses = [row["loss"] for row in each]
    since = losses[2:] if len(steps) == 2 else losses
    assert rare[-1]["loss"] == pytest.approx(sum(since) / len(since), abs=1e-5)
    assert (tmp_path / "run" / "loss.png").is_file()


def test_a_plot_that_fails_costs_nothing(kit, tmp_path, monkeypatch):
    from llava_integration.train import plots

    def fail(*args):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(plots, "loss_curve", fail)
    with pytest.warns(UserWarning, match=r"loss\.png could not be drawn \(no fonts\)"):
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **kit.options(steps=2))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["results"]["steps"] == 2
    assert (tmp_path / "run" / "model.safetensors").is_file()
