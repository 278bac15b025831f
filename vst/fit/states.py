"""Training states of a fit on disk: what ``--resume`` goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vst.results.folders import Run, read_json, write_json
from vst.results.room import room_for
from vst.results.sealed import newest_sound, seal

PROGRESS = "progress.json"
_FOLDER = "state"


def save_state(accelerator: Any, run: Run, facts: dict[str, Any]) -> None:
    """Save weights, optimizer and random states of all processes with ``facts`` (of which ``step`` names the state).

    Written to a temporary folder, sealed, then renamed; of the states before, the last one is kept. Every process calls
    this.

    Raises:
        NoRoom: the disk is full; the states before are kept.
    """
    states, name = run.path(_FOLDER), f"step-{facts['step']:08d}"
    temporary = states / f".{name}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    kept = "make room and call again with --resume (resume=True), which goes on from the last state that was saved"
    try:
        with room_for(f"the state at step {facts['step']} in {run.folder}", kept):
            accelerator.save_state(str(temporary))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                write_json(temporary / PROGRESS, facts)
                seal(temporary)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        shutil.rmtree(states / name, ignore_errors=True)
        temporary.rename(states / name)
        before = max((p.name for p in states.glob("step-*") if p.name < name), default=name)
        for old in states.iterdir():
            if old.name not in (name, before):
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_state(accelerator: Any, run: Run, steps: int) -> dict[str, Any] | None:
    """Load the newest sound state of a run into what the accelerator has prepared. Every process calls this.

    A damaged state is passed over for the one before it, with a warning.

    Args:
        accelerator: of the fit.
        run: of the fit.
        steps: of the whole fit.

    Returns:
        The facts that were saved with it; None if the run has no state.

    Raises:
        ValueError: none of its states is sound, or the newest sound one cannot be read.
    """
    from accelerate.utils import broadcast_object_list

    # One process looks, for all: they must not come to think differently of a disk that is failing.
    found: list[Any] = [None, ""]
    if accelerator.is_main_process:
        states = sorted(run.path(_FOLDER).glob("step-*"), reverse=True)
        anew = f"delete {run.path(_FOLDER)} and resume, which starts from the first step"
        try:
            found[0] = newest_sound(states, "state", lambda state: _implausible(state, steps), anew)
        except ValueError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    state, complaint = found
    if complaint:
        raise ValueError(complaint)
    if state is None:
        return None
    facts = read_json(state / PROGRESS)
    if accelerator.is_main_process and str(accelerator.distributed_type).endswith("DEEPSPEED"):
        print(
            f"going on from DeepSpeed's state {state}, which is read by unpickling: files of somebody else could run "
            "code here, so resume only runs of your own."
        )
    try:
        accelerator.load_state(str(state))
    except Exception as error:
        raise ValueError(
            f"The state at step {facts['step']} in {run.folder} cannot be read ({type(error).__name__}: {error}); "
            f"delete {state} to go on from the one before it or, if there is none, from the start."
        ) from error
    return facts


def has_state(run: Run | None) -> bool:
    """Whether a run has a state to go on from, sound or not."""
    return run is not None and any(run.path(_FOLDER).glob("step-*"))


def _implausible(state: Path, steps: int) -> str | None:
    """What cannot be in a state's facts."""
    try:
        facts = read_json(state / PROGRESS)
        step, history = facts["step"], facts["history"]
        logged = [line["step"] for line in history]
        dict(facts["explained"]), dict(facts["skipped"])
    except (OSError, ValueError, TypeError, KeyError):
        return f"{PROGRESS} is missing or not what was written"
    if type(step) is not int or state.name != f"step-{step:08d}" or not 0 < step <= steps:
        return f"{PROGRESS} says step {step} of {steps}"
    if any(type(at) is not int or not 0 < at <= step for at in logged):
        return f"{PROGRESS} has losses of steps after {step}"
    return None


def drop_states(run: Run) -> None:
    """Delete a run's states: it is finished, or starts again."""
    shutil.rmtree(run.path(_FOLDER), ignore_errors=True)
