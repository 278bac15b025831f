"""Training in one process: what moves, what resumes, what is refused; the loss against the model's own."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from llava_integration.models.vision import VSTVisionModel
from llava_integration.train import tuning
from llava_integration.train.config import TrainerConfig, TuneConfig, spread
from llava_integration.train.data import DataConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.training import train
from vst.parsing import command
from vst.tree.projector import ProjectorSpec

pytest_plugins = ("training_kit",)
STAGES = {
    "stage 1": TuneConfig(),
    "stitches": TuneConfig(stitches=True, stitch_lr=1e-2),
    "full": TuneConfig(llm="full"),
    "lora": TuneConfig(llm="lora", lora_rank=4, lora_alpha=8),
}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_trained_moves_and_the_rest_does_not(kit, stage, tmp_path):
    tune = STAGES[stage]
    train(kit.model, kit.data, str(tmp_path / "run"), tune, **kit.options(steps=4, split=1))
    before = kit.built().state_dict()
    after = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "run").state_dict()
    assert set(before) == set(after)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {n for n in before if tuning.part_of(n) == "projector"}
    if tune.stitches:
        expected |= {n for n, p in kit.built().named_parameters() if tuning.part_of(n) == "stitches"}
    if tune.llm == "full":
        expected |= {n for n in before if tuning.part_of(n) == "llm"}
    if tune.llm == "lora":
        linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        expected |= {n for n in before if tuning.part_of(n) == "llm" and any(part in n for part in linear)}
    assert moved <= expected
    untouched = expected - moved
    assert all("stitches.3" in n for n in untouched), untouched  # the split that was not run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("half", [True, False])
def test_every_tensor_is_saved_in_the_type_that_it_was_built_in(kit, stage, half, tmp_path):
    options = kit.options(steps=1, split=1, bf16=half)
    train(kit.model, kit.data, str(tmp_path / "run"), STAGES[stage], **options)
    kind = torch.bfloat16 if half else torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {kind}
    model = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {kind}


def test_parts_of_several_types_are_saved_each_in_its_own(kit, tmp_path, monkeypatch):
    build = ModelConfig.build

    def mixed(self, dtype, seed):
        model, processor = build(self, dtype, seed)
        model.model.language_model.float()
        return model, processor

    monkeypatch.setattr(ModelConfig, "build", mixed)
    train(kit.model, kit.data, str(tmp_path / "run"), STAGES["stitches"], **kit.options(steps=1, split=1, bf16=True))
    for name, tensor in weights(tmp_path / "run").items():
        assert tensor.dtype == (torch.float32 if "language_model.model." in name else torch.bfloat16), name
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dtype"] == "float32"


def test_the_loss_is_the_models_own(kit, tmp_path):
    """The first logged loss, taken at labelled positions alone, against cross entropy over all logits of that batch."""
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))
    logged = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["history"][0]["loss"]
    t.set_seed(42)
    model, processor = kit.model.build(torch.float32, 42)
    batch = next(iter(kit.trainer(model, processor).get_train_dataloader()))
    batch.pop("skipped")
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).item()
    assert logged == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stage", ["stage 1", "lora"])
def test_a_stopped_run_goes_on_to_the_same_weights(kit, stage, tmp_path, monkeypatch):
    tune, options = STAGES[stage], kit.options(steps=6, save=2, split="random")
    train(kit.model, kit.data, str(tmp_path / "whole"), tune, **options)

    class Stop(Exception):
        pass

    from llava_integration.train import trainer as module

    step = module.MLLMTrainer.training_step
    calls = []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise Stop
        return step(self, *args, **kwargs)

    monkeypatch.setattr(module.MLLMTrainer, "training_step", stopping)
    with pytest.raises(Stop):
        train(kit.model, kit.data, str(tmp_path / "parts"), tune, **options)
    monkeypatch.setattr(module.MLLMTrainer, "training_step", step)
    newest = tmp_path / "parts" / "checkpoints" / "checkpoint-6"
    newest.mkdir()  # what a process that was killed while it saved leaves behind
    (newest / "trainer_state.json").write_text("{")
    with pytest.raises(FileExistsError, match="resume"):
        train(kit.model, kit.data, str(tmp_path / "parts"), tune, **options)
    train(kit.model, kit.data, str(tmp_path / "parts"), tune, **options, resume=True)
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(one[n], two[n]) for n in one)
    losses = [
        [row["loss"] for row in json.loads((tmp_path / name / "results.json").read_text())["results"]["history"]]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert not (tmp_path / "parts" / "checkpoints").exists()


def test_random_splits_are_drawn_and_every_depth_runs(kit, tmp_path, pictures):
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=4, split="random"))
    import llava_integration  # noqa: F401

    model = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    tower = model.model.vision_tower
    assert tower.tree.splits == [1, 3]
    assert tower.split == 3
    processor = t.AutoProcessor.from_pretrained(tmp_path / "run")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}],
        add_generation_prompt=True,
    )
    batch = processor(images=pictures[0], text=text, return_tensors="pt")
    seen = []
    for split in (1, 3):
        tower.split = split
        with torch.no_grad():
            seen.append(model(**batch).logits)
    assert not torch.equal(*seen)


def test_stage_two_starts_from_stage_one(kit, tmp_path):
    train(kit.model, kit.data, str(tmp_path / "one"), **kit.options(steps=2))
    start = ModelConfig(start=str(tmp_path / "one"))
    train(start, kit.data, str(tmp_path / "two"), STAGES["full"], **kit.options(steps=1, rate=0.0))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_finished_run_is_left_alone(kit, tmp_path, capsys):
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))
    with pytest.raises(FileExistsError, match="overwrite"):
        train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1), resume=True)
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=2), overwrite=True)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["results"]["steps"] == 2
    assert (tmp_path / "run" / "loss.png").stat().st_size > 1000


def test_nothing_of_an_earlier_run_is_left_in_the_folder(kit, tmp_path):
    folder = tmp_path / "run"
    train(kit.model, kit.data, str(folder), **kit.options(steps=1))
    expected = {path.name for path in folder.iterdir()}
    model = t.AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="20KB")  # as a larger model's would be
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    for name in ("added_tokens.json", "merges.txt", ".model/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "notes.txt").write_text("a user's own")
    train(kit.model, kit.data, str(folder), **kit.options(steps=1), overwrite=True)
    assert {path.name for path in folder.iterdir()} == expected | {"notes.txt"}
    assert weights(folder)


def test_broken_pictures_are_counted(kit, tmp_path):
    broken = sorted((kit.folder / "images").glob("*.png"))[0]
    broken.write_bytes(b"not a picture")
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=6))
    skipped = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["skipped"]
    assert any("picture" in reason for reason in skipped.values()), skipped


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


def test_out_of_memory_is_told_with_advice(kit, tmp_path, monkeypatch):
    from llava_integration.train.trainer import MLLMTrainer

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(MLLMTrainer, "training_step", full)
    with pytest.raises(RuntimeError, match=r"Out of memory .*--dry-run"):
        train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))


def test_dry_run_prints_an_estimate_and_writes_nothing(kit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ModelConfig, "build", None)  # nothing may be loaded
    options = kit.options(steps=1)
    train(kit.model, kit.data, str(tmp_path / "run"), STAGES["lora"], **options, dry_run=True)
    out = capsys.readouterr().out
    assert "VST-1" in out
    assert "VST-3" in out
    assert not (tmp_path / "run").exists()


def test_typos_in_a_config_are_refused(kit, tmp_path, capsys, monkeypatch):
    config = kit.yaml(tmp_path / "run", tune={"lm": "full"})
    with pytest.raises(SystemExit):
        command(train, ["--config", str(config)])
    assert "lm" in capsys.readouterr().err
    config = kit.yaml(tmp_path / "run", trainer={"learning_rat": 1.0})
    with pytest.raises(SystemExit, match="did you mean learning_rate"):
        command(train, ["--config", str(config)])


def test_splits_by_branch_in_training(kit, tmp_path, tree_of):
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1, split={"clip": 1}))
    import llava_integration  # noqa: F401

    model = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert model.model.vision_tower.split == {"clip": 1}
    apart = tree_of("dinov2", "clip", "siglip", splits={"clip": [1, 2], "siglip": [3]}).save_pretrained(tmp_path / "x")
    drawn, own = [], VSTVisionModel.forward

    def noted(self, pixel_values, split=None, **others):
        drawn.append(self.split)
        return own(self, pixel_values, split, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VSTVisionModel, "forward", noted)
        model = dataclasses.replace(kit.model, tower=str(apart))
        train(model, kit.data, str(tmp_path / "drawn"), **kit.options(steps=8, split="random"))
    assert {tuple(split.items()) for split in drawn} == {(("clip", 1), ("siglip", 3)), (("clip", 2), ("siglip", 3))}
    one = tree_of("dinov2", "clip", "siglip", splits={"clip": [2], "siglip": [3]}).save_pretrained(tmp_path / "y")
    with pytest.raises(ValueError, match="holds one split alone"):
        train(
            dataclasses.replace(model, tower=str(one)), kit.data, str(tmp_path / "z"), **kit.options(1, split="random")
        )


def test_the_split_of_stage_one_is_the_split_of_stage_two(kit, tmp_path):
    train(kit.model, kit.data, str(tmp_path / "one"), **kit.options(steps=1, split=1))
    train(ModelConfig(start=str(tmp_path / "one")), kit.data, str(tmp_path / "two"), **kit.options(steps=1))
    for stage in ("one", "two"):
        model = t.AutoModelForImageTextToText.from_pretrained(tmp_path / stage)
        assert model.model.vision_tower.split == 1


@pytest.mark.parametrize("stage", ["stage 1", "stitches", "lora"])
def test_gradient_checkpointing_changes_nothing(kit, stage, tmp_path):
    found = []
    for on in (False, True):
        tune = dataclasses.replace(STAGES[stage], lora_dropout=0.0)
        folder = tmp_path / str(on)
        train(kit.model, kit.data, str(folder), tune, **kit.options(steps=3, split=1, gradient_checkpointing=on))
        found.append([r["loss"] for r in json.loads((folder / "results.json").read_text())["results"]["history"]])
    assert found[0] == pytest.approx(found[1], abs=1e-5)
