"""Training in one process: what moves, what is saved, what resumes; the loss against the model's own."""

import dataclasses
import json

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from llava_integration.models.vision import VSTVisionModel
from llava_integration.train import tuning
from llava_integration.train.config import TuneConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.training import train

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
