"""What a training is told: rates by part, batches spread over processes, defaults of LLaVA, and what is refused."""

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers as t

from llava_integration.train import tuning
from llava_integration.train.config import TrainerConfig, TuneConfig, spread
from llava_integration.train.data import DataConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.training import train
from vst.parsing import command
from vst.tree.projector import ProjectorSpec

pytest_plugins = ("training_kit",)


def test_learning_rates_by_part(kit):
    model, _ = kit.model.build(torch.float32, 0)
    tune = TuneConfig(llm="full", stitches=True, projector_lr=0.5, stitch_lr=0.25)
    tuning.prepare(model, tune)
    found = tuning.groups(model, tune, 0.125, 0.01)
    names = {id(p): n for n, p in model.named_parameters()}
    assert sum(len(g["params"]) for g in found) == sum(p.requires_grad for p in model.parameters())
    for group in found:
        parts = {tuning.part_of(names[id(p)]) for p in group["params"]}
        assert len(parts) == 1
        assert group["lr"] == {"projector": 0.5, "stitches": 0.25, "llm": 0.125}[parts.pop()]
        assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] > 0}


def test_defaults_are_those_of_llava():
    one = TrainerConfig().resolve(TuneConfig(), None, "x", 8)
    two = TrainerConfig().resolve(TuneConfig(llm="full"), None, "x", 8)
    assert (one["learning_rate"], two["learning_rate"]) == (1e-3, 2e-5)
    for values, total in ((one, 256), (two, 128)):
        assert values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * 8 == total
        assert (values["num_train_epochs"], values["lr_scheduler_type"], values["weight_decay"]) == (1, "cosine", 0.0)
        args = t.TrainingArguments(**values)
        assert args.get_warmup_steps(1000) == 30
    lora = TuneConfig(llm="lora")
    assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout) == (128, 256, 0.05)
    assert TrainerConfig().resolve(lora, None, "x")["learning_rate"] == 2e-4
    assert lora.learning_rates()["projector"] == 2e-5
    assert TuneConfig().learning_rates()["projector"] is None


# (conversations a step, wanted a process, processes): a process at a time, times a step
SPREAD = {
    (256, 32, 8): (32, 1),
    (256, 32, 16): (16, 1),
    (128, 16, 8): (16, 1),
    (128, 16, 16): (8, 1),
    (128, 16, 4): (16, 2),
    (128, 16, 64): (2, 1),
    (64, 16, 8): (8, 1),
    (256, 32, 64): (4, 1),
    (120, 16, 4): (15, 2),
    (96, 20, 2): (16, 3),
    (26, 4, 2): (1, 13),
    (8, 3, 1): (2, 4),
    (4, 32, 1): (4, 1),
    (3, 1, 3): (1, 1),
}


@pytest.mark.parametrize(("asked", "found"), SPREAD.items())
def test_a_batch_is_spread_exactly(asked, found):
    total, wanted, world = asked
    assert spread(*asked) == found
    assert found[0] * found[1] * world == total
    for tune in (TuneConfig(), TuneConfig(llm="full")):
        values = TrainerConfig({"per_device_train_batch_size": wanted}).resolve(tune, total, "x", world)
        assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == found


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("llm", ["none", "full", "lora"])
def test_the_published_batch_fits_any_usual_number_of_processes(llm, world):
    values = TrainerConfig().resolve(TuneConfig(llm=llm), None, "x", world)
    step = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * world
    assert step == {"none": 256, "full": 128, "lora": 128}[llm]


def test_a_batch_that_cannot_be_spread_evenly_is_refused():
    with pytest.raises(ValueError, match=r"128 cannot be spread evenly over 6 processes; .* such as 126 or 132\."):
        spread(128, 16, 6)
    with pytest.raises(ValueError, match=r"such as 8\."):
        spread(4, 16, 8)


def test_what_a_batch_became_is_told_in_one_line(kit, tmp_path, capsys):
    options = kit.options(steps=1, per_device_train_batch_size=3)
    train(kit.model, kit.data, str(tmp_path / "run"), **options, dry_run=True)
    line = "a step of 4 conversations over 1 processes is 2 at a time and process, not 3, and 2 of them a step"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1), dry_run=True)
    assert "not" not in capsys.readouterr().out.splitlines()[0]


def test_a_ridge_start_is_trained_gently():
    """Adam's first steps are as large as its rate; the closed form's weights are of the order of 0.01."""
    assert TuneConfig(start="ridge").learning_rates()["projector"] == 1e-4
    assert TuneConfig(start="ridge", projector_lr=0.5).learning_rates()["projector"] == 0.5


@pytest.mark.parametrize(
    ("trainer", "batch", "message"),
    [
        ({"learning_rat": 1}, None, "did you mean learning_rate"),
        ({"output_dir": "x"}, None, "set by the run itself"),
        ({"per_device_train_batch_size": 0}, 8, r"trainer\.per_device_train_batch_size is 0; expected at least 1"),
        ({}, 0, "batch_size is 0; expected at least 1"),
    ],
)
def test_trainer_options_are_checked(trainer, batch, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(trainer).resolve(TuneConfig(), batch, "x")


def test_a_language_model_below_home(kit, monkeypatch):
    monkeypatch.setenv("HOME", str(kit.folder))
    config = dataclasses.replace(kit.model, llm="~/llm")
    assert config.plan()[1].to_dict() == kit.model.plan()[1].to_dict()
    assert torch.equal(*(m.build(torch.float32, 0)[0].lm_head.weight for m in (config, kit.model)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": 2}, "holds no stitch at split 2"),
        ({"split": "shallow"}, "expected a trunk depth"),
        ({"model": {"llm": "no/where"}}, "language model 'no/where' is neither a folder here nor in the cache"),
        ({"model": {"tower": "no/where/at-all"}}, "There is no tree 'no/where/at-all'"),
        ({"model": {"template": "nothing.jinja"}}, "nothing.jinja"),
        ({"data": {"max_length": 4}}, "max_length"),
        ({"data": {"files": ["nothing.json"]}}, "nothing.json"),
    ],
)
def test_bad_input_is_one_sentence(kit, tmp_path, changes, message):
    model = dataclasses.replace(kit.model, **changes.pop("model", {}))
    data = dataclasses.replace(kit.data, **changes.pop("data", {}))
    with pytest.raises((ValueError, OSError), match=message) as error:
        train(model, data, str(tmp_path / "run"), **(kit.options(steps=1) | changes))
    assert "\n" not in str(error.value)


def test_tune_is_checked():
    with pytest.raises(ValueError, match=r"tune\.llm is 'some'"):
        TuneConfig(llm="some")
    with pytest.raises(ValueError, match="trains nothing"):
        TuneConfig(projector=False)
    with pytest.raises(ValueError, match="A new model needs"):
        ModelConfig(llm="x")
    with pytest.raises(ValueError, match=r"model\.fusion is 'mix'"):
        ModelConfig(llm="x", tower="y", fusion="mix")
    with pytest.raises(ValueError, match="brings its own"):
        ModelConfig(start="x", llm="y")
    for own in (
        {"full": True},
        {"fusion": "interleave"},
        {"template": "chatml"},
        {"projector": ProjectorSpec("linear")},
    ):
        with pytest.raises(ValueError, match=f"brings its own {next(iter(own))}"):
            ModelConfig(start="x", **own)
    assert ModelConfig(llm=Path("x"), tower=Path("y")) == ModelConfig(llm="x", tower="y")
    with pytest.raises(ValueError, match="files is"):
        DataConfig(files=[])


def test_typos_in_a_config_are_refused(kit, tmp_path, capsys, monkeypatch):
    config = kit.yaml(tmp_path / "run", tune={"lm": "full"})
    with pytest.raises(SystemExit):
        command(train, ["--config", str(config)])
    assert "lm" in capsys.readouterr().err
    config = kit.yaml(tmp_path / "run", trainer={"learning_rat": 1.0})
    with pytest.raises(SystemExit, match="did you mean learning_rate"):
        command(train, ["--config", str(config)])
