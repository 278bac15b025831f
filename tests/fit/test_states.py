"""What a fit's folder holds while it runs: two states with digests; what damage, a full disk or a signal costs."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from vst.fit.loop import fit_stitches
from vst.fit.steps import Steps
from vst.results.locks import FolderInUse, held
from vst.results.room import NoRoom
from vst.results.sealed import SEAL, damage

OPTIONS = {"epochs": 4, "batch_size": 8, "heldout": 8, "lr": 0.003, "save_every": 4, "show_progress": False}
STEPS = 16


class Killed(BaseException):
    pass


def at_step(monkeypatch, step, act):
    """Call ``act`` before a step is made; counted from 0 in this process."""
    own, made = Steps.step, []

    def stepping(self, *args):
        made.append(1)
        if len(made) == step + 1:
            act()
        return own(self, *args)

    monkeypatch.setattr(Steps, "step", stepping)


def kill():
    raise Killed


def stitches(folder):
    return load_file(folder / "stitches" / "stitches.safetensors")


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


@pytest.fixture
def fit(tree_of, pictures):
    return lambda folder, **changes: fit_stitches(tree_of(), pictures, folder=folder, **{**OPTIONS, **changes})


@pytest.fixture
def killed(fit, tmp_path, monkeypatch):
    """A run that was killed after states at steps 4 and 8."""
    with monkeypatch.context() as patch:
        at_step(patch, 10, kill)
        with pytest.raises(Killed):
            fit(tmp_path / "killed")
    return tmp_path / "killed"


@pytest.fixture
def whole(fit, tmp_path):
    fit(tmp_path / "whole")
    return tmp_path / "whole"


def same(whole, resumed):
    one, two = stitches(whole), stitches(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert results(whole)["history"] == results(resumed)["history"]


def test_two_states_are_kept_and_a_moved_folder_goes_on(killed, whole, fit, tmp_path):
    assert sorted(path.name for path in (killed / "state").iterdir()) == ["step-00000004", "step-00000008"]
    assert all(damage(path) is None and (path / SEAL).is_file() for path in (killed / "state").iterdir())
    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(killed, moved)
    shutil.rmtree(killed)
    fit(moved, resume=True)
    same(whole, moved)


def edited(state):
    facts = json.loads((state / "progress.json").read_text())
    (state / "progress.json").write_text(json.dumps({**facts, "step": 99999}))


DAMAGE = {
    "cut": lambda state: os.truncate(state / "model.safetensors", 100),
    "empty": lambda state: os.truncate(state / "optimizer.bin", 0),
    "lost": lambda state: (state / "model.safetensors").unlink(),
    "a byte": lambda state: (state / "optimizer.bin").write_bytes(b"\1" + (state / "optimizer.bin").read_bytes()[1:]),
    "an edited step": edited,
    "no digests": lambda state: (state / SEAL).write_text("{"),
    "old, without digests": lambda state: [(state / SEAL).unlink(), edited(state)],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_is_passed_over_with_a_word(kind, killed, whole, fit):
    DAMAGE[kind](killed / "state" / "step-00000008")
    with pytest.warns(UserWarning, match=r"step-00000008 is damaged \(.*\); going on from step-00000004\."):
        fit(killed, resume=True)
    same(whole, killed)


def test_without_a_sound_state_the_way_on_is_named(killed, whole, fit):
    for state in (killed / "state").iterdir():
        DAMAGE["cut"](state)
    with pytest.raises(ValueError, match=r"step-00000004 is damaged \(model.safetensors has 100 bytes.*delete .*state"):
        fit(killed, resume=True)
    shutil.rmtree(killed / "state")
    fit(killed, resume=True)
    same(whole, killed)


def test_an_old_state_that_cannot_be_read_is_told_in_a_sentence(killed, fit):
    state = killed / "state" / "step-00000008"
    (state / SEAL).unlink()
    DAMAGE["cut"](state)
    with pytest.raises(
        ValueError, match=r"state at step 8 in .* cannot be read .*delete .*step-00000008 to go on from"
    ):
        fit(killed, resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("step", [0, 6, STEPS - 1])
def test_a_signal_saves_at_the_next_step(number, step, whole, fit, tmp_path, monkeypatch, capsys):
    obeyed = []
    before = signal.signal(number, lambda *_: obeyed.append(number))
    folder = tmp_path / "stopped"
    try:
        with monkeypatch.context() as patch:
            at_step(patch, step, lambda: os.kill(os.getpid(), number))
            with pytest.raises(SystemExit) as ended:
                fit(folder)
    finally:
        signal.signal(number, before)
    assert obeyed == [number]
    assert ended.value.code == 128 + number
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert said.startswith(f"Stopped by {number.name}; saved step {step + 1} of {STEPS} in {folder}.")
    assert "--resume" in said
    assert (folder / "state" / f"step-{step + 1:08d}").is_dir()
    assert not (folder / "results.json").exists()
    fit(folder, resume=True)
    same(whole, folder)
    assert results(folder)["seconds"]["total"] >= results(folder)["seconds"]["calibration"]


def test_seconds_are_of_all_calls(fit, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit):
                fit(tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    facts = tmp_path / "run" / "state" / "step-00000003"
    progress = json.loads((facts / "progress.json").read_text())
    progress["seconds"] = {"calibration": 100.0, "fit": 1000.0, "total": 1200.0}
    (facts / "progress.json").write_text(json.dumps(progress))
    (facts / SEAL).unlink()
    seconds = fit(tmp_path / "run", resume=True).seconds
    assert seconds["calibration"] == 100.0
    assert 1000 < seconds["fit"] < 1100
    assert 1200 < seconds["total"] < 1300
    assert results(tmp_path / "run")["seconds"] == seconds


def test_without_a_folder_signals_do_what_they_did(fit, monkeypatch):
    seen = []
    at_step(monkeypatch, 1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    fit(None)
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize("full", [OSError(errno.ENOSPC, "No space left on device"), "file size"])
def test_a_full_disk_is_told_and_keeps_the_state_before(full, fit, whole, tmp_path, monkeypatch):
    folder, soft = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if full == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, soft[1]))
        else:
            from accelerate import Accelerator

            monkeypatch.setattr(Accelerator, "save_state", lambda *_: (_ for _ in ()).throw(full))

    with monkeypatch.context() as patch:
        at_step(patch, 5, fill)
        try:
            with pytest.raises(NoRoom, match=rf"No room to save the state at step 8 in {folder}; make room"):
                fit(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    monkeypatch.undo()
    assert [path.name for path in (folder / "state").iterdir()] == ["step-00000004"]
    fit(folder, resume=True)
    same(whole, folder)


def test_a_folder_in_use_is_refused_to_every_writer(fit, killed, tmp_path):
    code = (
        f"import time; from vst.results.locks import hold; hold({str(killed)!r}); print(1, flush=True); time.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        states = sorted((killed / "state").rglob("*"))
        for flags in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(FolderInUse):
                fit(killed, **flags)
        assert sorted((killed / "state").rglob("*")) == states
    finally:
        other.kill()
        other.wait()
    with held(killed):  # a caller's own hold is no obstacle
        fit(killed, resume=True)
