"""Cached targets that were cut, emptied, removed, filled with something else or edited are never taken for targets."""

import json
import os
import shutil

import pytest
import torch

from vst import fit_stitches
from vst.fit.cache import TargetCache

SHAPES = {2: (3, 4), 5: (1, 2)}


def values(seed, rows=4):
    made = torch.Generator().manual_seed(seed)
    return {d: torch.randn(rows, *shape, generator=made).half().float() for d, shape in SHAPES.items()}


def filled(root):
    cache = TargetCache(root, "key", 4, SHAPES)
    cache.write([0, 1, 2, 3], values(1))
    return cache


def half(file):
    os.truncate(file, file.stat().st_size // 2)


def emptied(file):
    os.truncate(file, 0)


def longer(file):
    os.truncate(file, file.stat().st_size + 2)


def noise(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def flipped(file):
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)


def removed(file):
    file.unlink()


DAMAGES = (half, emptied, longer, noise, zeros, flipped, removed)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rows.f16", "sums.u64", "cache.json"])
@pytest.mark.parametrize("opened", ["before", "after"])
@pytest.mark.filterwarnings("ignore:The cache", "ignore:.*does not hold what was written")
def test_no_row_is_ever_other_than_it_was_written(tmp_path, damage, name, opened):
    cache = filled(tmp_path)
    damage(cache.folder / name)
    if opened == "after":
        cache = TargetCache(tmp_path, "key", 4, SHAPES)
    for row in range(4):
        found = cache.find([row])
        for depth in SHAPES if found is not None else ():
            assert torch.equal(found[depth][0], values(1)[depth][row])
    cache.write([0, 1, 2, 3], values(1))
    for opened_now in (cache, TargetCache(tmp_path, "key", 4, SHAPES)):
        for depth, got in opened_now.read([3, 1, 0, 2]).items():
            assert torch.equal(got, values(1)[depth][[3, 1, 0, 2]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key"]


def test_what_is_wrong_is_named_and_the_other_rows_are_kept(tmp_path):
    folder = filled(tmp_path).folder
    flipped(folder / "rows.f16")
    cache = TargetCache(tmp_path, "key", 4, SHAPES)
    with pytest.warns(UserWarning, match=r"key/rows\.f16 does not hold what was written into it \(row 0\)"):
        assert cache.find([0, 1]) is None
    assert cache.missing(range(4)) == [0]
    assert torch.equal(cache.read([1, 2])[2], values(1)[2][1:3])
    with pytest.raises(LookupError, match="not written yet"):
        cache.read([0])
    half(folder / "rows.f16")
    with pytest.warns(UserWarning, match=r"key is computed anew: rows\.f16 has 56 bytes for 112"):
        cache = TargetCache(tmp_path, "key", 4, SHAPES)
    assert cache.missing(range(4)) == [0, 1, 2, 3]


def test_rows_of_an_earlier_form_without_checksums_are_made_anew(tmp_path):
    (tmp_path / "key").mkdir()
    (tmp_path / "key" / "cache.json").write_text(json.dumps({"images": 4, "shapes": {"2": [3, 4], "5": [1, 2]}}))
    zeros(shutil.copy(__file__, tmp_path / "key" / "rows.f16"))
    (tmp_path / "key" / "done.u8").write_bytes(b"\x01" * 4)
    with pytest.warns(UserWarning, match="an earlier version wrote it"):
        cache = TargetCache(tmp_path, "key", 4, SHAPES)
    assert not cache.has([0])


def test_a_description_of_other_rows_is_not_believed(tmp_path):
    filled(tmp_path)
    with pytest.warns(UserWarning, match=r"cache\.json describes other rows"):
        assert TargetCache(tmp_path, "key", 5, SHAPES).missing(range(5)) == [0, 1, 2, 3, 4]


def test_a_cache_that_is_made_by_two_at_once_is_whole(tmp_path, monkeypatch):
    """The one that comes second finds the first one's folder, and both write into it."""
    real, made = os.rename, []

    def late(source, target):
        if not made:
            made.append(1)
            made.append(filled(tmp_path))
        return real(source, target)

    monkeypatch.setattr(os, "rename", late)
    second = TargetCache(tmp_path, "key", 4, SHAPES)
    assert torch.equal(second.read([2])[2], values(1)[2][2:3])


def test_no_room_is_said_in_a_sentence(tmp_path, monkeypatch):
    cache = filled(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot be kept in .*key \(No space left on device\): make room"):
        cache.write([1], values(2, 1))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.filterwarnings("ignore:The cache", "ignore:.*does not hold what was written")
def test_a_fit_on_a_damaged_cache_is_the_fit_on_a_sound_one(tree_of, pictures, tmp_path, damage):
    options = {"cache": str(tmp_path / "c"), "epochs": 2, "batch_size": 16, "show_progress": False}
    sound, again = tree_of("dinov2", "clip"), tree_of("dinov2", "clip")
    fit_stitches(sound, pictures, **options)
    (folder,) = (tmp_path / "c").iterdir()
    for name in ("rows.f16", "sums.u64"):
        damage(folder / name)
        fit_stitches(again, pictures, **options)
        for k, v in sound.state_dict().items():
            assert torch.equal(again.state_dict()[k], v), k
        again = tree_of("dinov2", "clip")


def exchanged(folder):
    """Two rows with their marks."""
    for name in ("rows.f16", "sums.u64"):
        data = (folder / name).read_bytes()
        size = len(data) // 4
        (folder / name).write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])


def copied(folder):
    for name in ("rows.f16", "sums.u64"):
        data = (folder / name).read_bytes()
        size = len(data) // 4
        (folder / name).write_bytes(data[size : 2 * size] + data[size:])


def of_another_model(folder):
    """Another cache of the same shapes under this one's name."""
    other = TargetCache(folder.parent, "other", 4, SHAPES)
    other.write([0, 1, 2, 3], values(2))
    shutil.rmtree(folder)
    other.folder.rename(folder)


@pytest.mark.parametrize("damage", [exchanged, copied, of_another_model])
def test_rows_that_are_whole_but_stand_elsewhere_are_not_taken(tmp_path, damage):
    damage(filled(tmp_path).folder)
    cache = TargetCache(tmp_path, "key", 4, SHAPES)
    with pytest.warns(UserWarning, match="does not hold what was written into it"):
        assert cache.find([0, 1]) is None
    cache.write([0, 1, 2, 3], values(1))
    for depth, tensor in cache.read([0, 1, 2, 3]).items():
        assert torch.equal(tensor, values(1)[depth])


def test_a_file_in_the_place_of_a_cache(tmp_path, tree_of, pictures):
    (tmp_path / "key").write_text("a file")
    with pytest.warns(UserWarning, match="computed anew"):
        filled(tmp_path)
    for root in (tmp_path / "key" / "cache.json", tmp_path / "key" / "cache.json" / "x"):
        with pytest.raises(ValueError, match=r"cache\.json is a file; give another folder"):
            fit_stitches(tree_of(), pictures, epochs=1, calibration=8, batch_size=8, cache=str(root))
