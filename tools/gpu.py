"""Everything that is to be run on a GPU, in one call: ``make gpu``, or ``python tools/gpu.py``.

Steps run one after another, each in a process of its own with a time limit; one that fails or runs out of time stops no
other. What they find is written as it comes, below docs/results/gpu/DEVICE. A second call goes on: steps that finished
are left out (--again runs them anew), others go on from what they saved. Nothing is installed and nothing is fetched.

  tests       the tests that are marked cuda
  latency     trees of ViT-L beside their models in full, bf16, by tokens, batch and execution
  throughput  steps of a fit, and how many cores have to read pictures for them
  evidence    the demo and the stitching protocol on real weights at the full grid
  mllm        the language demo

docs/gpu.md tells what each needs, how long it takes, and how to read what it leaves.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

LIMITS = {"tests": 300, "latency": 600, "throughput": 180, "evidence": 1800, "mllm": 1800}
"""Steps in their order, and the seconds that each may take."""
GRACE = 20  # seconds between SIGTERM, at which a fit saves, and SIGKILL
FIELDS = (
    "name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm",
    "clocks.mem", "pstate", "temperature.gpu", "mig.mode.current",
)  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run the steps; 0 where every one that was asked for is finished, or had nothing to do here."""
    given = _read(words)
    import torch

    from vst.results.locks import held
    from vst.results.stopping import ending

    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("No CUDA device was found: run this on a machine with a GPU, or with --dry-run (make gpu DRY=1).")
    facts = environment()
    name = "gpu-dry" if given.dry_run else slug(facts["device_name"])
    out = (given.out or ROOT / ("runs" if given.dry_run else "docs/results/gpu") / name).resolve()
    work = (given.work or (out / "work" if given.dry_run or given.out else ROOT / "runs" / "gpu" / name)).resolve()
    with ending() as advise:
        advise("The same call goes on from what was saved.")
        try:
            with held(work):
                return run_steps(given, facts, out, work)
        except (ValueError, RuntimeError, OSError) as error:
            sys.exit(f"{type(error).__name__}: {error}")


def run_steps(given: argparse.Namespace, facts: dict[str, Any], out: Path, work: Path) -> int:
    """Run the steps that were asked for and are not finished, the summary written before and after each."""
    from vst.results.folders import read_json, write_json

    summary = out / "summary.json"
    told: dict[str, Any] = {"device": facts["device_name"], "dry_run": given.dry_run, "steps": {}}
    if summary.is_file():
        before = read_json(summary, "restore it, or give another folder (--out)")
        if (before["device"], before["dry_run"]) != (told["device"], told["dry_run"]):
            dry = "a dry run on " if before["dry_run"] else ""
            raise ValueError(
                f"{summary} is of {dry}{before['device']}: give another folder (--out), or delete that one."
            )
        told["steps"] = before["steps"]
    write_json(out / "environment.json", facts)
    for step in given.steps:
        if told["steps"].get(step, {}).get("outcome") == "finished" and not given.again:
            print(f"{step} is finished; --again runs it anew.", flush=True)
            continue
        row = {"outcome": "stopped", "limit_s": given.limits[step], "said": ""}
        told["steps"][step] = {**row, "outcome": "running"}
        write_json(summary, told)
        print(f"{step}: at most {given.limits[step]:g} s, log in {_shown(work / 'logs' / f'{step}.log')}", flush=True)
        try:
            row |= run_step(step, out / step, work / step, given)
        except KeyboardInterrupt:
            show({**told, "steps": {**told["steps"], step: row}}, out)
            raise
        finally:
            told["steps"][step] = row
            write_json(summary, told)
        print(f"{step}: {row['outcome']}. {row['said']}", flush=True)
    show(told, out)
    return 0 if all(told["steps"][step]["outcome"] in ("finished", "skipped") for step in given.steps) else 1


def run_step(step: str, out: Path, scratch: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Run one step within its limit, and keep what it left; its outcome, seconds and last word."""
    from gpu_steps.work import SAID, keep, said

    if given.again:
        for folder in (out, scratch):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in (out, scratch, log := scratch.parent / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    (scratch / SAID).unlink(missing_ok=True)  # of a call before this one
    began = time.monotonic()
    with (log / f"{step}.log").open("ab") as file:
        process = subprocess.Popen(
            command(step, out, scratch, given.dry_run), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            cwd=ROOT, env=_surroundings(), start_new_session=True,
        )  # fmt: skip
        try:
            outcome = "finished" if process.wait(given.limits[step]) == 0 else "failed"
        except subprocess.TimeoutExpired:
            outcome = "timed out"
        finally:
            end(process)
            keep(scratch, out)
    last = said(scratch)
    if outcome == "finished" and last.get("outcome") == "skipped":
        outcome = "skipped"
    how = f"it ended with status {process.returncode}" if outcome == "failed" else "it said nothing"
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "said": last.get("said", how)}


def command(step: str, out: Path, scratch: Path, dry: bool) -> list[str]:
    """What runs a step."""
    words = [sys.executable, "-m", "gpu_steps", step, "--out", str(out), "--scratch", str(scratch)]
    return [*words, "--dry-run"] if dry else words


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started; one that is over has left workers behind at the most."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, Any]:
    """On what is measured: what every run tells, and what the driver says of the GPU (None where there is none)."""
    import torch

    from vst.results.folders import environment as known

    facts = known()
    gpu: dict[str, Any] | None = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "capability": f"{properties.major}.{properties.minor}", "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 2**30, 1), "cudnn": torch.backends.cudnn.version(),
            "devices": torch.cuda.device_count(), "driver": _driver(),
        }  # fmt: skip
    return {**facts, "gpu": gpu}


def _driver() -> dict[str, str]:
    """Fields of nvidia-smi, with its units; or under ``error`` why it tells none."""
    words = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except subprocess.CalledProcessError as error:
        return {"error": f"nvidia-smi: {' '.join((error.stdout + error.stderr).split())[:300]}"}
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": f"nvidia-smi: {type(error).__name__}"}
    values = told.split(", ")
    if len(values) != len(FIELDS):
        return {"error": f"nvidia-smi tells {len(values)} fields of {len(FIELDS)}: {told[:300]}"}
    return dict(zip(FIELDS, values, strict=True))


def slug(name: str) -> str:
    """A device's name as a folder: ``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def show(told: dict[str, Any], out: Path) -> None:
    """The summary as a table."""
    from vst.results.tables import table

    rows = [
        (step, row["outcome"], f"{row['seconds']:.0f}" if "seconds" in row else "", _shown(out / step))
        for step, row in told["steps"].items()
    ]
    table(f"On {told['device']}", ["step", "outcome", "seconds", "where"], rows, _shown(out / "summary.json"))


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _surroundings() -> dict[str, str]:
    """The environment of a step: this checkout, whether it is installed or not, and no network."""
    paths = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(paths)}


def _read(words: list[str] | None) -> argparse.Namespace:
    lines = (__doc__ or "").strip()

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            sys.exit(f"{message[:1].upper()}{message[1:]}; --help tells what there is.")

    parser = Parser(description=lines, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--steps", default=",".join(LIMITS), help="which, with commas between them (default: %(default)s)"
    )
    limits = " ".join(f"{step}={seconds}" for step, seconds in LIMITS.items())
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STEP=SECONDS", help=f"time of a step, once for each ({limits})"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of results (default: docs/results/gpu/DEVICE; dry: runs/gpu-dry)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of logs and of what steps need meanwhile (default: runs/gpu/DEVICE; OUT/work with --out, or dry)",
    )
    parser.add_argument("--again", action="store_true", help="delete what the chosen steps left, and run them anew")
    parser.add_argument(
        "--dry-run", action="store_true", help="everything in miniature, on a CPU as well: to see that it works"
    )
    given = parser.parse_args(words)
    given.steps = [step for step in dict.fromkeys(given.steps.split(",")) if step]
    if unknown := [step for step in given.steps if step not in LIMITS] or not given.steps:
        parser.error(f"--steps names {unknown[0] if given.steps else 'none'!r}; expected some of {', '.join(LIMITS)}")
    given.limits = dict(LIMITS)
    for word in given.limit:
        step, _, seconds = word.partition("=")
        if step not in LIMITS or not re.fullmatch(r"\d{1,6}(\.\d+)?", seconds) or not float(seconds):
            parser.error(f"--limit is {word!r}; expected STEP=SECONDS, such as tests=180")
        given.limits[step] = float(seconds)
    return given


if __name__ == "__main__":
    sys.exit(main())
