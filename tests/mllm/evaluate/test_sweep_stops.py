"""A sweep that is told to stop hands it on to the commands that it has started, and starts no more."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from llava_integration.evaluate import sweep as module
from llava_integration.evaluate.sweep import RowConfig, _Sweep
from vst.results.folders import Run


def test_commands_are_told_and_no_more_are_started(tmp_path, monkeypatch, capsys):
    rows = {name: RowConfig(model=str(tmp_path / name), kind="one", train=[["x"]]) for name in ("a", "b", "c")}
    started = []
    own = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda words, env=None: own([sys.executable, "-c", SLEEP]))
    monkeypatch.setattr(_Sweep, "_call", watched(_Sweep._call, started))
    obeyed = []
    before = signal.signal(signal.SIGTERM, lambda *_: obeyed.append(1))
    told = threading.Thread(target=lambda: (wait_for(started), os.kill(os.getpid(), signal.SIGTERM)))
    began = time.monotonic()
    try:
        told.start()
        job = _Sweep(Run(tmp_path / "run", {}), rows, {"seeds": [0], "tasks": [], "batch_size": 1})
        with pytest.raises(SystemExit) as ended:
            job.scores(0)
    finally:
        signal.signal(signal.SIGTERM, before)
        told.join()
    assert ended.value.code == 128 + signal.SIGTERM
    assert obeyed == [1]
    assert started == ["a, seed 0"]  # of three rows
    assert time.monotonic() - began < 40
    assert f"saved in {tmp_path / 'run'} what was finished" in capsys.readouterr().out


SLEEP = "import time; time.sleep(60)"


def watched(call, started):
    def calling(self, words, title, gpu):
        started.append(title)
        return call(self, words, title, gpu)

    return calling


def wait_for(started):
    while not started:
        time.sleep(0.01)
    time.sleep(0.5)
