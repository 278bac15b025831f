"""The checkpoints of a training: which are whole and sound, and how a training that is told to stop saves one."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vst.results.folders import read_json
from vst.results.sealed import newest_sound, seal
from vst.results.stopping import Stop, stopping

COMPLETE, SECONDS = "complete", "seconds.json"
_STATE = "trainer_state.json"


def finish_checkpoint(folder: Path) -> None:
    """Seal a checkpoint whose files are all written, and mark it as whole."""
    seal(folder)
    (folder / COMPLETE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole and sound checkpoint of a run; those that a killed process left half written are deleted.

    A damaged one is passed over for the one before it, with a warning.

    Raises:
        ValueError: there are whole ones, and none is sound.
    """
    whole: list[Path] = []
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path)
    anew = f"delete {folder} and resume, which starts from the first step"
    return newest_sound(sorted(whole, key=_step, reverse=True), "checkpoint", _implausible, anew)


def check_resumable(checkpoint: Path, *, engine: bool) -> None:
    """See that a checkpoint holds all that a run goes on with, beside the trained parameters.

    Args:
        checkpoint: whole.
        engine: DeepSpeed wrote it, which keeps optimizer and schedule in files of its own.

    Raises:
        ValueError: optimizer, schedule or random states are missing.
    """
    wanted = {"trainer_state.json": _STATE, "random states": "rng_state*.pth"}
    wanted |= {"optimizer": "latest"} if engine else {"optimizer": "optimizer.pt", "schedule": "scheduler.pt"}
    missing = [what for what, pattern in wanted.items() if not any(checkpoint.glob(pattern))]
    if missing:
        raise ValueError(
            f"{checkpoint} holds no {', '.join(missing)} to go on with (trainer.save_only_model leaves them out), and "
            f"a run that begins them anew would be another one: start the run again with --overwrite."
        )


def spent_before(checkpoint: Path | None) -> float:
    """Seconds of the calls that led to a checkpoint; 0 where it does not tell."""
    if checkpoint is None or not (checkpoint / SECONDS).is_file():
        return 0.0
    return float(read_json(checkpoint / SECONDS)["seconds"])


class StopWhenTold(TrainerCallback):
    """Saves a checkpoint after the step in which SIGTERM or SIGHUP came, and ends the training.

    Args:
        block: at whose end the signal is obeyed; listening begins in it with the first step.
        run_folder: that is told.
    """

    def __init__(self, block: ExitStack, run_folder: Path) -> None:
        self.block, self.run_folder = block, run_folder
        self.stop = Stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop = self.block.enter_context(stopping())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.asked(args.device):
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                self.stop.saved = f"step {state.global_step} of {state.max_steps} in {self.run_folder}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _implausible(checkpoint: Path) -> str | None:
    """What cannot be in a checkpoint's state."""
    try:
        state = read_json(checkpoint / _STATE)
        step, steps = state["global_step"], state["max_steps"]
    except (OSError, ValueError, TypeError, KeyError):
        return f"{_STATE} is missing or not what was written"
    if type(step) is not int or type(steps) is not int or step != _step(checkpoint) or not 0 < step <= steps:
        return f"{_STATE} says step {step} of {steps}"
    return None
