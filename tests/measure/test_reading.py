"""Reading of pictures, against a slow reader whose pace is known."""

import time

import pytest

from vst.data.pictures import ImageSet
from vst.fit.teacher import transforms
from vst.measure.reading import measure_reading


def test_a_reader_of_a_known_pace(tree_of, picture_folder, monkeypatch):
    """Two processes that each sleep 20 ms a picture read a hundred pictures a second between them."""
    own = ImageSet.__getitem__

    def slow(self, index):
        time.sleep(0.02)
        return own(self, index)

    monkeypatch.setattr(ImageSet, "__getitem__", slow)
    (picture_folder / "broken.png").write_text("broken")
    found = measure_reading(picture_folder, transforms(tree_of()), workers=2, batch_size=5, passes=2)
    assert found["pictures"] == 80
    assert found["skipped"] == 1
    assert 25 < found["pictures_per_s"] < 101  # never faster than it sleeps; slower where the machine has no time
    assert found["pictures_per_s_per_worker"] == found["pictures_per_s"] / 2


def test_nothing_to_read(tree_of, tmp_path):
    (tmp_path / "broken.png").write_text("broken")
    with pytest.raises(ValueError, match="None of 1 pictures can be read"):
        measure_reading(tmp_path, transforms(tree_of()))
    with pytest.raises(ValueError, match="workers is 0"):
        measure_reading(tmp_path, transforms(tree_of()), workers=0)
