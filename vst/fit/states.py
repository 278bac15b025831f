"""Training states of a fit on disk: what ``--resume`` goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from vst.results.folders import Run, write_json

PROGRESS = "progress.json"
_FOLDER = "state"


def save_state(accelerator: Any, run: Run, facts: dict[str, Any]) -> None:
    """Save weights, optimizer and random states of all processes with ``facts`` (of which ``step`` names the state).

    Written to a temporary folder, then renamed; the state before is dropped last. Every process calls this.
    """
    states, name = run.path(_FOLDER), f"step-{facts['step']:08d}"
    temporary = states / f".{name}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / PROGRESS, facts)
        shutil.rmtree(states / name, ignore_errors=True)
        temporary.rename(states / name)
        for old in states.iterdir():
            if old.name != name:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def latest_state(run: Run | None) -> Path | None:
    """Folder of the last whole state of a run, if there is one."""
    if run is None or not run.path(_FOLDER).is_dir():
        return None
    states = sorted(p for p in run.path(_FOLDER).glob("step-*") if (p / PROGRESS).exists())
    return states[-1] if states else None


def check_step(state: Path, step: Any, steps: int) -> None:
    """See that what a state tells of its step can be.

    Args:
        state: folder of the state, named after its step.
        step: that it tells of.
        steps: of the whole run, after the last of which no state is saved.

    Raises:
        ValueError: it is another step than the folder's, or none of the run's.
    """
    if type(step) is not int or state.name != f"step-{step:08d}" or not 0 < step < steps:
        raise ValueError(
            f"{state / PROGRESS} tells of step {step} of {steps}, in the folder {state.name}: the state is damaged; "
            "delete that folder and resume, or start the run again (--overwrite)."
        )


def drop_states(run: Run) -> None:
    """Delete a run's states: it is finished, or starts again."""
    shutil.rmtree(run.path(_FOLDER), ignore_errors=True)
