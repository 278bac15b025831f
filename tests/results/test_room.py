"""What a full disk costs: one sentence, and nothing of what was there before."""

import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from vst.results.folders import atomic_path, write_json
from vst.results.room import NoRoom, room_for


@pytest.fixture
def little_room():
    """Files may not grow beyond 4 KB, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "safetensors": lambda path: save_file({"x": torch.ones(5000)}, path),
    "torch": lambda path: torch.save({"x": torch.ones(5000)}, path),
    "bytes": lambda path: path.write_bytes(b"x" * 5000),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_tells_it_alike_and_the_old_file_stays(kind, tmp_path, little_room):
    target = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(3)}, target)
    with (
        pytest.raises(NoRoom, match=rf"No room to save {target}; make room"),
        atomic_path(target) as path,
    ):
        WRITERS[kind](path)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert torch.equal(load_file(target)["x"], torch.zeros(3))
    with pytest.raises(NoRoom, match="No room to save the state; wait"), room_for("the state", "wait"):
        write_json(tmp_path / "x.json", ["x" * 5000])


def test_other_errors_stay_as_they_are(tmp_path):
    for error in (ValueError("bad"), PermissionError(13, "Permission denied")):
        with pytest.raises(type(error)) as seen, room_for("x"):
            raise error
        assert seen.value is error
