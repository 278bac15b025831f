"""Checkpoints of a training: two with digests; what damage, a full disk, a signal or a second process costs."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from llava_integration.train import trainer as module
from llava_integration.train import training
from llava_integration.train.checkpoints import COMPLETE, last_checkpoint
from llava_integration.train.training import train
from vst.results.room import NoRoom
from vst.results.sealed import SEAL, damage

pytest_plugins = ("training_kit",)
STEPS = 5  # of three an epoch: the last checkpoint lies inside one


class Killed(BaseException):
    pass


def weights(folder):
    return load_file(folder / "model.safetensors")


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def at_step(patch, step, act):
    own, made = module.MLLMTrainer.training_step, []

    def stepping(self, *args, **kwargs):
        made.append(1)
        if len(made) == step + 1:
            act()
        return own(self, *args, **kwargs)

    patch.setattr(module.MLLMTrainer, "training_step", stepping)


def kill(*args, **kwargs):
    raise Killed


@pytest.fixture
def run(kit):
    return lambda folder, **flags: train(kit.model, kit.data, str(folder), **kit.options(steps=STEPS, save=2), **flags)


@pytest.fixture
def whole(run, tmp_path):
    run(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def killed(run, tmp_path, monkeypatch):
    """Killed after checkpoints at steps 2 and 4."""
    with monkeypatch.context() as patch:
        at_step(patch, 4, kill)
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    return tmp_path / "killed"


def same(whole, resumed):
    one, two = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert results(whole)["history"] == results(resumed)["history"]
    assert results(resumed)["steps"] == STEPS


def test_a_moved_folder_goes_on_and_seconds_are_of_all_calls(killed, whole, run, tmp_path):
    folder = killed / "checkpoints"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert all(damage(path) is None and (path / SEAL).is_file() for path in folder.glob("checkpoint-*"))
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(killed, moved)
    shutil.rmtree(killed)
    newest = moved / "checkpoints" / "checkpoint-4"
    (newest / "seconds.json").write_text('{"seconds": 1000.0}')
    (newest / SEAL).unlink()  # as a version before left it
    run(moved, resume=True)
    same(whole, moved)
    assert 1000 < results(moved)["seconds"] < 1100


def edited(checkpoint):
    facts = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**facts, "global_step": 99999}))


DAMAGE = {
    "cut": lambda path: os.truncate(path / module.TRAINED, 100),
    "lost": lambda path: (path / "optimizer.pt").unlink(),
    "a byte": lambda path: (path / "optimizer.pt").write_bytes(b"\1" + (path / "optimizer.pt").read_bytes()[1:]),
    "an edited step, without digests": lambda path: [(path / SEAL).unlink(), edited(path)],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_word(kind, killed):
    """That what is gone on from gives the same weights is held by the tests around this one."""
    DAMAGE[kind](killed / "checkpoints" / "checkpoint-4")
    with pytest.warns(UserWarning, match=r"checkpoint-4 is damaged \(.*\); going on from checkpoint-2"):
        assert last_checkpoint(killed / "checkpoints").name == "checkpoint-2"
    DAMAGE["cut"](killed / "checkpoints" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 is damaged .*100 bytes.*delete .*checkpoints and resume"):
        last_checkpoint(killed / "checkpoints")


def test_going_on_from_the_older_checkpoint_gives_the_same(killed, whole, run):
    DAMAGE["a byte"](killed / "checkpoints" / "checkpoint-4")
    with pytest.warns(UserWarning, match="going on from checkpoint-2"):
        run(killed, resume=True)
    same(whole, killed)


@pytest.mark.parametrize("step", [2, STEPS - 1])
def test_a_signal_saves_at_the_next_step(step, whole, run, tmp_path, monkeypatch, capsys):
    obeyed = []
    before = signal.signal(signal.SIGTERM, lambda *_: obeyed.append(1))
    folder = tmp_path / "stopped"
    try:
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit) as ended:
                run(folder)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert obeyed == [1]
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith(f"Stopped by SIGTERM; saved step {step + 1} of {STEPS} in {folder}.")
    assert "--resume" in said
    assert (folder / "checkpoints" / f"checkpoint-{step + 1}" / COMPLETE).is_file()
    assert not (folder / "model.safetensors").exists()
    run(folder, resume=True)
    same(whole, folder)


def test_a_run_that_was_killed_while_it_wrote_the_model_trains_no_further(whole, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(training, "export", kill)
        with pytest.raises(Killed):
            run(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    same(whole, tmp_path / "run")


def test_a_full_disk_is_told_and_keeps_the_checkpoint_before(run, whole, tmp_path, monkeypatch):
    folder, (soft, hard) = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard)))
        try:
            with pytest.raises(NoRoom, match=rf"No room to save the checkpoint at step 4 in {folder}.*--resume"):
                run(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    run(folder, resume=True)
    same(whole, folder)
