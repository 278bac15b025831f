"""One process at a time writes to a run folder."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vst.results.folders import Run, read_json
from vst.results.locks import LOCK, FolderInUse, held, hold, let_go

HOLDER = """
import sys, time, os
from vst.results.folders import Run
run = Run(sys.argv[1], {})
if len(sys.argv) > 2 and not os.fork():
    time.sleep(60)  # a worker that outlives the process
print("held", flush=True)
time.sleep(60)
"""


def holder(folder, *extra):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), *extra], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    first = holder(tmp_path / "run")
    try:
        before = (tmp_path / "run" / "run.json").read_bytes()
        for flags in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(FolderInUse, match=f"in use by another process .number {first.pid} .*another folder"):
                Run(tmp_path / "run", {}, **flags)
        assert (tmp_path / "run" / "run.json").read_bytes() == before
        Run(tmp_path / "other", {})
        Run(tmp_path / "run", {}, resume=True, lock=False)  # another process of the holder's job
    finally:
        first.kill()
        first.wait()
    assert (tmp_path / "run" / LOCK).exists()  # what the killed one left is in nobody's way
    Run(tmp_path / "run", {}, resume=True)


def test_a_killed_holders_workers_do_not_keep_the_folder(tmp_path):
    first = holder(tmp_path / "run", "fork")
    first.send_signal(signal.SIGKILL)
    first.wait()
    run = Run(tmp_path / "run", {}, resume=True)
    assert (tmp_path / "run" / LOCK).read_text().strip() == str(os.getpid())
    run.close()


def test_one_process_shares_its_folders_and_leaves_no_file(tmp_path):
    one = Run(tmp_path / "run", {})
    two = Run(tmp_path / "run", {}, resume=True)
    assert (tmp_path / "run" / LOCK).read_text().strip() == str(os.getpid())
    one.close()
    one.close()  # a second time changes nothing
    assert (tmp_path / "run" / LOCK).exists()
    del two
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_refused_run_holds_nothing(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        Run(tmp_path, {})
    assert not (tmp_path / LOCK).exists()


def test_a_killed_runs_lock_alone_is_an_empty_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("1\n")
    Run(tmp_path / "run", {"seed": 3})
    assert read_json(tmp_path / "run" / "run.json") == {"seed": 3}


def test_a_folder_that_was_made_for_nothing_is_taken_away(tmp_path):
    with held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with held(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        hold(tmp_path / "file")


def test_a_folder_that_can_only_be_read_needs_no_lock(tmp_path, monkeypatch):
    Run(tmp_path / "run", {}).close()
    (tmp_path / "run").chmod(0o555)
    try:
        monkeypatch.setattr(os, "open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        monkeypatch.setattr(os, "access", lambda *a: False)
        Run(tmp_path / "run", {}, resume=True).close()
        assert not (tmp_path / "run" / LOCK).exists()
    finally:
        (tmp_path / "run").chmod(0o755)


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(fcntl, "lockf", lambda *a: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with pytest.warns(UserWarning, match="cannot be locked .No locks available"):
        hold(tmp_path / "run")
    let_go(tmp_path / "run")


def test_many_at_once_let_one_in_at_a_time(tmp_path):
    """Processes that take and drop the folder as fast as they can never hold it together."""
    code = f"""
import sys, os, time
from vst.results.locks import held, FolderInUse
end, times = time.monotonic() + 1.5, 0
while time.monotonic() < end:
    try:
        with held({str(tmp_path / "run")!r}):
            os.close(os.open({str(tmp_path / "inside")!r}, os.O_CREAT | os.O_EXCL))
            os.unlink({str(tmp_path / "inside")!r})
            times += 1
    except FolderInUse:
        pass
print(times)
"""
    several = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    times = [int(process.communicate(timeout=120)[0]) for process in several]
    assert all(process.returncode == 0 for process in several)
    assert sum(times) > 10


def test_threads_count_right(tmp_path):
    def often():
        for _ in range(200):
            with held(tmp_path):
                time.sleep(0)

    threads = [threading.Thread(target=often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not (tmp_path / LOCK).exists()
