"""Folders of pictures that link to each other, or may not be read: every picture counts once."""

import os

import pytest
from pictures_kit import photo
from PIL import Image

from vst.data.folders import picture_names
from vst.protocol.sources import _pairs


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    for folder in (tmp_path, tmp_path / "closed"):
        photo().save(folder / "x.png")
    scan = os.scandir

    def refused(folder):  # as for anyone but root, who may read all
        if os.path.basename(folder) == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.warns(UserWarning, match=r"The folder .*closed cannot be read \(Permission denied\)"):
        assert picture_names(tmp_path) == ["x.png"]


def test_folders_that_link_to_each_other_count_once(tmp_path):
    names = [f"f{i}" for i in range(4)]
    for name in names:
        (tmp_path / name).mkdir()
        for other in names:
            if other != name:
                (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
    photo().save(tmp_path / "f2/x.png")
    photo().save(tmp_path / "f0/y.png")
    assert picture_names(tmp_path) == ["f0/y.png", "f2/x.png"]
    # from inside one of them the others are reached by their links, each once
    assert picture_names(tmp_path / "f1") == ["to-f0/y.png", "to-f2/x.png"]


def test_a_picture_that_is_one_real_file_counts_once(tmp_path):
    (tmp_path / "in").mkdir()
    photo().save(tmp_path / "in/z.png")
    photo(seed=1).save(tmp_path / "out.png")
    (tmp_path / "in/a.png").symlink_to("z.png")
    (tmp_path / "in/b.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in/c.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in/d.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "in/sub").symlink_to(tmp_path / "in")
    assert picture_names(tmp_path / "in") == ["b.png", "d.png", "z.png"]


def test_one_mask_may_serve_several_pictures(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        photo(seed=i).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/again.png").symlink_to("1.png")
    Image.new("L", (60, 40)).save(tmp_path / "masks/0.png")
    for name in ("1", "2", "again"):
        (tmp_path / f"masks/{name}.png").symlink_to("0.png")
    pairs = _pairs(str(tmp_path / "images"), str(tmp_path / "masks"))
    assert [(p.stem, m.stem) for p, m in pairs] == [("0", "0"), ("1", "1"), ("2", "2")]
    (tmp_path / "masks/more.png").symlink_to("0.png")
    with pytest.raises(ValueError, match=r"1 files of .* have no partner \(more\)"):
        _pairs(str(tmp_path / "images"), str(tmp_path / "masks"))


def test_a_real_folder_wins_over_a_link_to_it(tmp_path):
    (tmp_path / "real").mkdir()
    photo().save(tmp_path / "real/x.png")
    (tmp_path / "a-link").symlink_to(tmp_path / "real")
    (tmp_path / "elsewhere").mkdir()
    assert picture_names(tmp_path) == ["real/x.png"]
    (tmp_path / "up").symlink_to(tmp_path.parent)  # leads back out of the folder: nothing there is its own
    assert picture_names(tmp_path) == ["real/x.png"]
