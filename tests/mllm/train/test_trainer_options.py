"""Every field of transformers' TrainingArguments is served or refused by name, before anything is loaded."""

import dataclasses
import json

import pytest
import torch
import transformers as t

from llava_integration.train import options
from llava_integration.train.config import TrainerConfig, TuneConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.training import train

pytest_plugins = ("training_kit",)
FULL = TuneConfig(llm="full")
KNOWN = {f.name: f for f in dataclasses.fields(t.TrainingArguments) if f.init}


def resolve(**values):
    return TrainerConfig(values).resolve(TuneConfig(), 4, "x")


def test_every_field_is_in_one_table():
    assert not options.SERVED & set(options.REFUSED)
    assert set(KNOWN) <= options.SERVED | set(options.REFUSED), set(KNOWN) - options.SERVED - set(options.REFUSED)


OTHER = {
    "eval_strategy": "steps", "include_for_metrics": ["loss"], "hub_strategy": "end", "length_column_name": "x",
    "use_cache": True, "fsdp": True, "dataloader_in_order": False, "eval_do_concat_batches": False, "local_rank": 0,
    "per_device_eval_batch_size": 3,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(options.REFUSED) & set(KNOWN)))
def test_what_is_not_served_is_refused_by_name(kit, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ModelConfig, "plan", None)  # nothing is read
    default = KNOWN[name].default
    value = OTHER.get(name, (not default) if isinstance(default, bool) else 8 if isinstance(default, int) else "x")
    with pytest.raises(ValueError, match=rf"^trainer\.{name} is .*, but ") as error:
        train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1, **{name: value}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_defaults_that_are_written_out_change_nothing():
    own = {"output_dir", "gradient_accumulation_steps", "remove_unused_columns", "per_device_train_batch_size"}
    plain = {
        name: field.default
        for name, field in KNOWN.items()
        if field.default is not dataclasses.MISSING and name not in own and name in options.REFUSED
    }
    assert {k: v for k, v in resolve(**plain).items() if k not in plain} == resolve()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": "1e-3"}, r"learning_rate is '1e-3', of type str; expected float or int"),
        ({"learning_rate": -1.0}, r"learning_rate is -1.0; expected a number from 0 up"),
        ({"learning_rate": float("nan")}, r"learning_rate is nan; expected"),
        ({"max_steps": 0}, r"max_steps is 0; expected at least 1, or -1"),
        ({"max_steps": 2.5}, r"max_steps is 2.5, of type float; expected int"),
        ({"bf16": "yes"}, r"bf16 is 'yes', of type str; expected bool"),
        ({"seed": True}, r"seed is True, of type bool"),
        ({"label_smoothing_factor": 1.0}, r"label_smoothing_factor is 1.0; expected a number from 0 to below 1"),
        ({"adam_beta2": 1.5}, r"adam_beta2 is 1.5"),
        ({"save_total_limit": 0}, r"save_total_limit is 0; expected at least 1"),
        ({"logging_steps": 0}, r"logging_steps is 0; expected a number above 0"),
        ({"fp16": True, "bf16": True}, "both true"),
        ({"fp16": True, "use_cpu": True}, "a CPU does not train in fp16"),
        ({"optim": "galore_adamw"}, "optim is 'galore_adamw'.*expected one of adamw_torch"),
        ({"optim": "adam"}, "optim is 'adam'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "goes by scores"),
        ({"lr_scheduler_type": "cosin"}, "options of trainer do not suit.*cosin"),
        ({"save_strategy": "best"}, "goes by scores"),
        ({"report_to": "nowhere"}, "'nowhere' is not installed here"),
        ({"deepspeed": "no/where.json"}, "there is no such file"),
        ({"dataloader_prefetch_factor": 2, "dataloader_num_workers": 0}, "prefetch_factor"),
        ({"debug": "everything"}, "do not suit.*everything"),
    ],
)  # fmt: skip
def test_values_are_checked_before_anything_is_loaded(kit, tmp_path, monkeypatch, values, message):
    monkeypatch.setattr(ModelConfig, "plan", None)
    with pytest.raises(ValueError, match=message) as error:
        train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1, **values))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_smoothed_labels(kit, tmp_path, parts):
    """The first loss against the definition: (1 - e) of the label, e of the mean over the vocabulary."""
    changes = {"label_smoothing_factor": 0.25, "per_device_train_batch_size": 4 // parts}
    train(kit.model, kit.data, str(tmp_path / "run"), FULL, **kit.options(steps=2, **changes))
    logged = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["history"][0]["loss"]
    train(kit.model, kit.data, str(tmp_path / "plain"), FULL, **kit.options(steps=1))
    plain = json.loads((tmp_path / "plain" / "results.json").read_text())["results"]["history"][0]["loss"]
    t.set_seed(42)
    model, processor = kit.model.build(torch.float32, 42)
    trainer = kit.trainer(model, processor)
    trainer.args.train_sampling_strategy = "group_by_length"  # as a run of stage 2 orders them
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch.pop("labels")[:, 1:].flatten()
    batch.pop("skipped")
    with torch.no_grad():
        logs = model(**batch).logits[:, :-1].flatten(0, 1).log_softmax(-1)[labels >= 0]
    own = -logs[torch.arange(len(logs)), labels[labels >= 0]].mean().item()
    assert plain == pytest.approx(own, abs=1e-4)
    assert logged == pytest.approx(0.75 * own - 0.25 * logs.mean().item(), abs=1e-4)


RUN = {
    "sgd": {"optim": "sgd"},
    "adafactor": {"optim": "adafactor"},
    "neftune": {"neftune_noise_alpha": 5.0},
    "compiled": {"torch_compile_backend": "eager"},
    "tokens counted": {"include_num_input_tokens_seen": "non_padding", "skip_memory_metrics": False},
    "sequential": {"train_sampling_strategy": "sequential", "dataloader_drop_last": True, "data_seed": 3},
    "schedule": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.5, "lr_scheduler_kwargs": None},
    "keep all": {"save_total_limit": None, "save_steps": 1, "save_strategy": "steps"},
    "by epoch": {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch", "logging_strategy": "epoch"},
    "progress": {"disable_tqdm": False, "logging_first_step": True, "run_name": "x"},
    "watched": {"debug": "underflow_overflow", "torch_empty_cache_steps": 1},
    "checkpointed": {"activation_checkpointing": True},
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "dataloader_persistent_workers": True},
}


@pytest.mark.parametrize("case", RUN)
def test_what_is_served_runs(kit, tmp_path, case):
    chosen = kit.options(steps=2)
    chosen["trainer"] |= RUN[case]
    train(kit.model, kit.data, str(tmp_path / "run"), FULL, **chosen)
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results["steps"] == (3 if case == "by epoch" else 2)
    assert (tmp_path / "run" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_the_estimate_knows_checkpointing_by_either_name(kit, tmp_path, capsys, name):
    told = []
    for on in (False, True):
        values = kit.options(steps=1, **{name: on})
        train(kit.model, kit.data, str(tmp_path / "run"), FULL, **values, dry_run=True)
        told.append(capsys.readouterr().out)
    assert told[0] != told[1]
