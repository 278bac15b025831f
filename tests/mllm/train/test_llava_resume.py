"""A run goes on as what it was, or not at all: its checkpoints are whole, and its names still stand for the same."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_integration.train.config import TuneConfig
from llava_integration.train.content import content
from llava_integration.train.model import ModelConfig
from llava_integration.train.trainer import MLLMTrainer
from llava_integration.train.training import train

pytest_plugins = ("training_kit",)
FULL = TuneConfig(llm="full")


class Stop(Exception):
    pass


@pytest.fixture
def stopped(kit, tmp_path, monkeypatch):
    """A run of 6 steps that ended within the fifth, with its options."""

    def run(**options):
        chosen, step, calls = kit.options(steps=6, save=2, **options), MLLMTrainer.training_step, []

        def stopping(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 5:
                raise Stop
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(MLLMTrainer, "training_step", stopping)
            with pytest.raises(Stop):
                train(kit.model, kit.data, str(tmp_path / "run"), FULL, **chosen)
        return tmp_path / "run", chosen

    return run


def test_checkpoints_without_an_optimizer_are_not_gone_on_from(kit, stopped, capsys, monkeypatch):
    folder, options = stopped(save_only_model=True)
    assert "cannot be resumed" in capsys.readouterr().out
    monkeypatch.setattr(ModelConfig, "build", None)  # told before the model is loaded
    with pytest.raises(ValueError, match=r"checkpoint-4 holds no random states, optimizer, schedule .*--overwrite"):
        train(kit.model, kit.data, str(folder), FULL, **options, resume=True)


def test_models_alone_are_saved_where_that_is_asked_for(kit, tmp_path):
    options = kit.options(steps=2, save=1)
    train(kit.model, kit.data, str(tmp_path / "run"), FULL, **options)
    options["trainer"]["save_only_model"] = True
    train(kit.model, kit.data, str(tmp_path / "alone"), FULL, **options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "alone"))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_checkpoints_that_lost_a_file_are_not_gone_on_from(kit, stopped, file):
    folder, options = stopped()
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        (checkpoint / file).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-4 is damaged .*{file}.*checkpoint-2 is damaged"):
        train(kit.model, kit.data, str(folder), FULL, **options, resume=True)


@pytest.mark.parametrize("step", [99999, 2])
def test_a_checkpoint_that_tells_of_another_step_is_passed_over(kit, stopped, tmp_path, step):
    train(kit.model, kit.data, str(tmp_path / "whole"), FULL, **kit.options(steps=6, save=2))
    folder, options = stopped()
    file = folder / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": step}))
    with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged .*going on from checkpoint-2"):
        train(kit.model, kit.data, str(folder), FULL, **options, resume=True)
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", folder))
    assert all(torch.equal(one[n], two[n]) for n in one)


def fewer(kit):
    file = kit.folder / "data.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:5]))
    return "data.json"


def other_words(kit):
    file = kit.folder / "data.json"
    file.write_text(file.read_text().replace("a cat 1", "a dog 1"))
    return "data.json.*sha256"


def other_tree(kit, tree_of):
    tree = tree_of("dinov2", "clip", split=3)
    with torch.no_grad():
        next(iter(tree.stitches().values())).patches.inner.linear.weight.mul_(2)
    tree.save_pretrained(kit.folder / "tree", overwrite=True)
    return r"content\.model\.tower"


def other_splits(kit, tree_of):
    tree_of("dinov2", "clip", splits=(1, 2, 3), split=3).save_pretrained(kit.folder / "tree", overwrite=True)
    return r"content\.model\.tower"


def other_language_model(kit):
    path = kit.folder / "llm" / "model.safetensors"
    tensors = load_file(path)
    name = next(n for n in tensors if n.endswith("up_proj.weight"))
    save_file({**tensors, name: tensors[name] + 1}, path, metadata={"format": "pt"})
    return r"content\.model\.llm"


@pytest.mark.parametrize("change", [fewer, other_words, other_tree, other_splits, other_language_model])
def test_a_name_that_stands_for_something_else_is_refused(kit, stopped, change, tree_of, monkeypatch):
    folder, options = stopped()
    named = change(kit, tree_of) if change in (other_tree, other_splits) else change(kit)
    monkeypatch.setattr(ModelConfig, "build", None)
    with pytest.raises(ValueError, match=rf"cannot be resumed because its config differs in .*{named}"):
        train(kit.model, kit.data, str(folder), FULL, **options, resume=True)


def test_a_folder_of_pictures_that_is_gone_is_told_first(kit, stopped, monkeypatch):
    folder, options = stopped()
    shutil.rmtree(kit.folder / "images")
    monkeypatch.setattr(ModelConfig, "build", None)
    with pytest.raises(FileNotFoundError, match="no folder of pictures"):
        train(kit.model, kit.data, str(folder), FULL, **options, resume=True)


def test_a_run_of_an_earlier_version_goes_on(kit, stopped, tmp_path):
    folder, options = stopped()
    noted = json.loads((folder / "run.json").read_text())
    del noted["content"]
    (folder / "run.json").write_text(json.dumps(noted))
    train(kit.model, kit.data, str(folder), FULL, **options, resume=True)
    train(kit.model, kit.data, str(tmp_path / "whole"), FULL, **options)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_finished_run_needs_its_files_no_more(kit, tmp_path, capsys):
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))
    (kit.folder / "data.json").unlink()
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1), resume=True)
    assert "is complete" in capsys.readouterr().out


def test_content_is_what_the_files_hold(kit):
    found = content(kit.model, kit.data)
    file = kit.folder / "data.json"
    held = file.read_bytes()
    assert found["records"] == {str(file): {"bytes": len(held), "sha256": hashlib.sha256(held).hexdigest()}}
    copy = kit.folder.parent / "copy"
    shutil.copytree(kit.folder, copy)
    moved = dataclasses.replace(kit.model, llm=str(copy / "llm"), tower=str(copy / "tree"))
    assert content(moved, kit.data)["model"] == found["model"]
    weights = copy / "llm" / "model.safetensors"
    weights.write_bytes(b"\xff" * 40)  # damaged: somebody else says so
    assert content(moved, kit.data)["model"]["llm"] != found["model"]["llm"]
    assert content(ModelConfig(llm="owner/name", tower="owner/tree"), kit.data)["model"] == {}


def test_other_pictures_under_the_same_names_are_refused(kit, stopped):
    folder, options = stopped()
    (kit.folder / "images" / "8.png").write_bytes((kit.folder / "images" / "9.png").read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"cannot be resumed because the pictures in .*images are not those.*names"):
        train(kit.model, kit.data, str(folder), FULL, **options, resume=True)
    for text in ("[", "[]", "{}", '{"pictures": "many"}'):
        (folder / "pictures.json").write_text(text)
        with pytest.raises(ValueError, match=r"pictures\.json is .*; delete it, and the pictures are taken for those"):
            train(kit.model, kit.data, str(folder), FULL, **options, resume=True)


def test_pictures_staged_anew_and_everything_moved_goes_on_to_the_same(kit, stopped, tmp_path):
    """Other times of files and other names of everything that the run was begun with."""
    train(kit.model, kit.data, str(tmp_path / "whole"), FULL, **kit.options(steps=6, save=2))
    folder, options = stopped()
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    shutil.copytree(kit.folder, tmp_path / "staged", copy_function=shutil.copyfile)
    shutil.rmtree(kit.folder)
    staged = tmp_path / "staged"
    model = ModelConfig(llm=str(staged / "llm"), tower=str(staged / "tree"))
    data = dataclasses.replace(kit.data, files=[str(staged / "data.json")], images=str(staged / "images"))
    train(model, data, str(moved), FULL, **options, resume=True)
    one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "whole", moved))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_run_that_noted_no_pictures_goes_on(kit, stopped):
    folder, options = stopped()
    (folder / "pictures.json").unlink()
    (kit.folder / "images" / "8.png").unlink()
    train(kit.model, kit.data, str(folder), FULL, **options, resume=True)
    assert json.loads((folder / "pictures.json").read_text())["missing"] == 1


def test_pictures_are_noted_by_names_and_sizes(kit, tmp_path):
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))
    names = [f"{i}.png" for i in (0, 1, 2, 3, 4, 4, 7, 8, 9)]  # the records', in order; the fourth has two
    sizes = [(kit.folder / "images" / name).stat().st_size for name in names]
    told = "".join(f"{name}\0{size}\n" for name, size in zip(names, sizes, strict=True))
    expected = {"pictures": 9, "missing": 0, "bytes": sum(sizes), "sha256": hashlib.sha256(told.encode()).hexdigest()}
    assert json.loads((tmp_path / "run" / "pictures.json").read_text()) == expected


def test_a_run_that_was_stopped_as_it_finished_is_finished(kit, tmp_path):
    folder = tmp_path / "run"
    train(kit.model, kit.data, str(folder), **kit.options(steps=2))
    (folder / "loss.png").unlink()
    (folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    train(kit.model, kit.data, str(folder), **kit.options(steps=2), resume=True)
    assert (folder / "loss.png").is_file()
    assert not (folder / "checkpoints").exists()
    (folder / "loss.png").unlink()
    for text in ("[]", "{", '{"config": {}}', '{"results": 3}'):
        (folder / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json is .*; restore it, or move it away"):
            train(kit.model, kit.data, str(folder), **kit.options(steps=2), resume=True)
