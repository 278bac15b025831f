"""Signals to real processes: a fit with workers, and one of two processes, as a cluster stops them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "train" / "stitch.py"


@pytest.fixture
def launch(tiny, picture_folder, tmp_path):
    """Start a fit of 240 steps, some seconds; ``wait`` gives what it printed."""
    tree = {"trunk": tiny("dinov2"), "branches": [tiny("clip", 48, seed=1)], "splits": [1, 3], "image_size": 56}
    fit = {"epochs": 60, "batch_size": 8, "save_every": 4, "lr": 0.003, "workers": 1}
    file = tmp_path / "fit.yaml"
    file.write_text(json.dumps({"tree": tree, "images": str(picture_folder), "fit": fit}))

    def start(out, *extra, processes=1, wait=True):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        command += [str(SCRIPT), "--config", str(file), "--out", str(out), *extra]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        if not wait:
            return process
        printed, _ = process.communicate(timeout=500)
        assert process.returncode == 0, printed[-3000:]
        return printed

    return start


def first_state(folder):
    deadline = time.monotonic() + 400
    while not list((folder / "state").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)


def same(one, two):
    one, two = (load_file(folder / "stitches" / "stitches.safetensors") for folder in (one, two))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_a_whole_group_is_told_and_goes_on_to_the_same(launch, tmp_path):
    """Its worker is told as well, and must not end before the step that is saved."""
    launch(tmp_path / "whole")
    process = launch(tmp_path / "stopped", wait=False)
    first_state(tmp_path / "stopped")
    os.killpg(process.pid, signal.SIGTERM)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == -signal.SIGTERM, printed
    assert "Stopped by SIGTERM; saved step " in printed
    launch(tmp_path / "stopped", "--resume")
    same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_agree_where_one_is_told(launch, tmp_path):
    launch(tmp_path / "whole", processes=2)
    process = launch(tmp_path / "stopped", processes=2, wait=False)
    first_state(tmp_path / "stopped")
    ranks = [c for c in psutil.Process(process.pid).children() if str(SCRIPT) in c.cmdline()]
    ranks[-1].send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode != 0
    assert "Stopped by SIGTERM; saved step " in printed
    launch(tmp_path / "stopped", "--resume", processes=2)
    same(tmp_path / "whole", tmp_path / "stopped")
