"""Cutting and joining: the parts are the stream, whatever their size."""

import random
import tarfile
from io import BytesIO

import pytest
from bundle_kit import sha

from vst.bundle.contents import member
from vst.bundle.packing import write_parts
from vst.bundle.parts import Megabytes, PartsReader, PartsWriter, bytes_of, told
from vst.results.progress import Progress


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("60MB", 60_000_000),
        ("1GB", 10**9),
        ("1.5 gb", 1_500_000_000),
        ("64MiB", 67_108_864),
        ("2000", 2000),
        (1000, 1000),
    ],
)
def test_sizes(size, count):
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "60", "0MB", "-1GB", "60 parsecs", "MB", 0, "1e9"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=r"part_size is .* expected a size such as 60MB"):
        bytes_of(size)


def test_sizes_in_words():
    assert [told(n) for n in (10, 78_462_149, 2_500_000_000)] == ["10 bytes", "78.5 MB", "2.5 GB"]


@pytest.mark.parametrize("size", [1000, 1024, 4096, 9999, 100_000])
def test_parts_are_the_stream(tmp_path, size):
    """Written in pieces of any length, and read in pieces of any other."""
    rng = random.Random(size)
    content, at = rng.randbytes(10_000), 0
    with PartsWriter(tmp_path, size, lambda _: None) as writer:
        while at < len(content):
            step = rng.randrange(1, 3000)
            assert writer.write(content[at : at + step]) == len(content[at : at + step])
            at += step
        parts = writer.finish()
    paths = sorted(tmp_path.iterdir())
    assert (
        [p.name for p in paths] == [part.name for part in parts] == [f"part-{i:04}" for i in range(1, len(parts) + 1)]
    )
    assert b"".join(p.read_bytes() for p in paths) == content
    assert [(part.size, part.sha256) for part in parts] == [(p.stat().st_size, sha(p.read_bytes())) for p in paths]
    assert all(part.size == size for part in parts[:-1])
    assert 0 < parts[-1].size <= size
    read = b""
    with PartsReader(paths) as reader:
        while block := reader.read(rng.randrange(1, 3000)):
            read += block
    assert read == content
    assert reader.at == parts[-1].name


def test_joined_parts_are_a_plain_tar_and_always_the_same(tmp_path):
    (tmp_path / "a").write_bytes(b"a" * 5000)
    (tmp_path / "b").write_bytes(b"")
    members = [member(f"home/x/{'long' * 60}/a", tmp_path / "a"), member("home/x/b", tmp_path / "b")]
    streams = []
    for name in ("one", "two"):
        (out := tmp_path / name).mkdir()
        _, entries = write_parts(out, members, 3000, Megabytes(Progress("x", 1, show=False)))
        streams.append(b"".join(p.read_bytes() for p in sorted(out.iterdir())))
        (tmp_path / "a").touch()
    assert streams[0] == streams[1]
    with tarfile.open(fileobj=BytesIO(streams[0])) as tar:
        inside = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    assert inside == {members[0].path: b"a" * 5000, members[1].path: b""}
    assert [(e.path, e.size, e.sha256) for e in entries] == [(n, len(c), sha(c)) for n, c in inside.items()]
