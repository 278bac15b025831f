"""A bundle or an unbundling that is stopped in the middle leaves nothing half, and the same call goes on."""

import shutil

import pytest
from bundle_kit import MADE, bundle, refusal, toy, tree_of_files, unbundle

from vst.bundle import packing, parts, placing
from vst.demo import assets

__all__ = ["toy"]


class Killed(BaseException):
    """As a kill: nothing catches it."""


def killed_at(calls, function):
    left = [calls]

    def wrapped(*args, **options):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return function(*args, **options)

    return wrapped


@pytest.fixture
def whole(toy, tmp_path):
    """A bundle in five members, as an uninterrupted call writes it."""
    bundle(tmp_path / "whole", "--for", "toy", "--made")
    return tree_of_files(tmp_path / "whole")


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_stopped_bundle_has_no_manifest_and_starts_again(toy, tmp_path, monkeypatch, whole, after):
    with monkeypatch.context() as patch:
        patch.setattr(parts.PartsWriter, "_end_part", killed_at(after, parts.PartsWriter._end_part))
        with pytest.raises(Killed):
            bundle(tmp_path / "out", "--for", "toy", "--made")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert "manifest.json" not in left
    assert {"unfinished.json", f".part-{after + 1:04}.tmp"} <= left
    assert "has no manifest.json" in refusal(unbundle, tmp_path / "out", tmp_path / "there")
    bundle(tmp_path / "out", "--for", "toy", "--made")
    assert tree_of_files(tmp_path / "out") == whole


def test_a_bundle_that_is_written_again_stays_until_all_is_at_hand(toy, tmp_path, monkeypatch, whole):
    out = tmp_path / "whole"
    assert "holds a bundle already; give --overwrite" in refusal(bundle, out, "--for", "toy")
    assert tree_of_files(out) == whole
    shutil.rmtree(tmp_path / "here")
    toy.network = False
    assert "no registry" in refusal(bundle, out, "--for", "toy", "--overwrite")
    assert tree_of_files(out) == whole
    toy.network = True
    with monkeypatch.context() as patch:
        patch.setattr(packing._Hashed, "read", killed_at(2, packing._Hashed.read))
        with pytest.raises(Killed):
            bundle(out, "--for", "toy", "--overwrite", "true")
    assert not (out / "manifest.json").exists()
    bundle(out, "--for", "toy")
    assert len(tree_of_files(out)) < len(whole)  # the archive is smaller than the folder
    unbundle(out, tmp_path / "there")
    assert (tmp_path / "there/grows/deep/content").read_bytes() == MADE["grows"]


@pytest.mark.parametrize("files", [["notes.txt"], ["part-0001"], ["part-0001", "manifest.json"], ["manifest.json"]])
def test_a_folder_that_holds_something_else_is_left_as_it_is(toy, tmp_path, files):
    (tmp_path / "out").mkdir()
    for name in files:
        (tmp_path / "out" / name).write_text("{}")
    for more in ([], ["--overwrite", "true"]):
        assert "holds something else than a bundle" in refusal(bundle, tmp_path / "out", "--for", "toy", *more)
    assert sorted(tree_of_files(tmp_path / "out")) == sorted(files)
    (tmp_path / "file").write_text("x")
    assert "is a file, but a bundle needs a folder" in refusal(bundle, tmp_path / "file", "--for", "toy")


def test_a_file_that_changes_meanwhile_is_told(toy, tmp_path, monkeypatch):
    made = tmp_path / "here/grows/deep/content"
    own = packing.write_parts

    for other in (MADE["grows"][:-1], MADE["grows"] + b"x"):

        def write(*args, other=other):
            made.write_bytes(other)
            return own(*args)

        monkeypatch.setattr(packing, "write_parts", write)
        said = refusal(bundle, tmp_path / "out", "--for", "toy", "--made")
        assert f"{made} changed while it was read" in said
        assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("where", ["_write", "_move", "_note_made"])
@pytest.mark.parametrize("after", [0, 1])
def test_a_stopped_unbundling_goes_on(toy, tmp_path, monkeypatch, whole, where, after):
    there = tmp_path / "there"
    with monkeypatch.context() as patch:
        patch.setattr(placing, where, killed_at(after if where != "_note_made" else 0, getattr(placing, where)))
        with pytest.raises(Killed):
            unbundle(tmp_path / "whole", there)
    assert not (there / "ready.json").exists()
    for name in MADE:  # what is in place is whole
        assert not (there / name).exists() or tree_of_files(there / name) == tree_of_files(tmp_path / "here" / name)
    written, own = [], placing._write
    monkeypatch.setattr(
        placing, "_write", lambda read, member, *more: written.append(member) or own(read, member, *more)
    )
    unbundle(tmp_path / "whole", there)
    assert len(written) == (4 - after if where == "_write" else 0)
    toy.network = False
    monkeypatch.setenv("VST_HOME", str(there))
    assert assets.make_ready(toy.recipes(), quiet=True) == [there / name for name in MADE]
    assert sorted(p.name for p in there.iterdir()) == ["digests.json", "grows", "lock", "ready.json", "shrinks"]


def test_a_file_that_was_damaged_while_it_waited_is_unpacked_again(toy, tmp_path, monkeypatch, whole):
    there = tmp_path / "there"
    with monkeypatch.context() as patch:
        patch.setattr(placing, "_move", killed_at(0, placing._move))
        with pytest.raises(Killed):
            unbundle(tmp_path / "whole", there)
    (waiting,) = there.glob(".unbundle-*/grows/deep/content")
    waiting.write_bytes(waiting.read_bytes()[::-1])
    unbundle(tmp_path / "whole", there)
    assert (there / "grows/deep/content").read_bytes() == MADE["grows"]
