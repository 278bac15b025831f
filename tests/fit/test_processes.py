"""How a process of many ends: its group is given up once all have come so far, and never stands in the way."""

import pytest

from vst.fit import processes
from vst.parsing import command


@pytest.fixture
def group(monkeypatch):
    """A process group that writes down what is done with it."""
    done = []
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(processes.dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: done.append("destroyed"))
    return done


def test_all_wait_and_then_leave(group, monkeypatch):
    processes.leave_group()
    assert group == ["barrier", "destroyed"]
    monkeypatch.setattr(processes.dist, "get_backend", lambda: "nccl")  # has no such threads, and waits for ever
    processes.leave_group()
    assert group[2:] == ["destroyed"]


def test_others_that_are_gone_are_not_waited_for(group, monkeypatch):
    def gone():
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(processes.dist, "barrier", gone)
    processes.leave_group()
    assert group == ["destroyed"]


def test_a_process_alone_has_nothing_to_leave(group, monkeypatch):
    monkeypatch.setattr(processes.dist, "is_initialized", lambda: False)
    processes.leave_group()
    assert group == []


def test_commands_leave_when_they_are_done_and_not_when_they_fail(group):
    def fails():
        """Fail."""
        raise ValueError("bad input")

    def ends():
        """End."""

    with pytest.raises(SystemExit, match="bad input"):
        command(fails, [])
    assert group == []
    command(ends, [])
    assert group == ["barrier", "destroyed"]
