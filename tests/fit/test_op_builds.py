"""Locks of operators that DeepSpeed builds: living, left, and those of which nobody here can tell."""

import os
import subprocess
import sys

import pytest

from vst.fit.op_builds import builds_folder, clear_stale_locks, stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    return lock


def age(lock, seconds):
    then = lock.stat().st_mtime - seconds
    for path in (lock, lock.parent):
        os.utime(path, (then, then))


def test_the_lock_of_a_killed_build_is_removed_with_a_word(lock, capsys):
    age(lock, 3600)
    assert stale_locks() == [lock]
    clear_stale_locks()
    assert not lock.exists()
    assert f"Removed {lock}" in capsys.readouterr().err
    clear_stale_locks()
    assert capsys.readouterr().err == ""


def test_a_fresh_lock_without_a_builder_is_named(lock, capsys):
    clear_stale_locks()
    assert lock.exists()  # another machine with the same folder may be at it
    assert "shm_comm is being built, but no process of this machine" in capsys.readouterr().err


def test_a_living_build_is_left_alone(lock, capsys):
    """torch's own lock, as another process holds it."""
    lock.unlink()
    code = (
        "import os, sys, time; fd = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(1, flush=True); time.sleep(60)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    try:
        builder.stdout.readline()
        age(lock, 3600)
        assert stale_locks() == []
        clear_stale_locks()
        assert f"by process {builder.pid}" in capsys.readouterr().err
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    assert stale_locks() == [lock]


def test_the_folder_is_torchs_own(monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/tmp/somewhere")
    assert str(builds_folder()) == "/tmp/somewhere"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    # In a process of its own, since torch's builder replaces distutils where it is imported.
    code = "from torch.utils.cpp_extension import get_default_build_root as root; print(root())"
    own = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert own.strip() == os.path.realpath(builds_folder())


def test_doctor_names_it(lock):
    from llava_integration.hosts.doctor import _builds

    (problem,) = _builds()
    assert str(lock) in problem
    lock.unlink()
    assert _builds() == []
