"""Labels that people give: taken as they are, or told in one sentence."""

import warnings

import numpy as np
import pytest
import torch

from vst.data.labels import by_folder, check_classes, one_a_picture
from vst.data.probes import linear_probe


@pytest.mark.parametrize(
    "labels", [[0, 1, 1], (0, 1, 1), np.array([0, 1, 1]), torch.tensor([0, 1, 1]), np.array([0.0, 1.0, 1.0])]
)
def test_labels_are_taken_in_order(labels):
    assert one_a_picture(labels, 3) == [0, 1, 1]
    assert one_a_picture(np.array(["b", "a", "b"]), 3) == ["b", "a", "b"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "3 pictures and 2 labels"),
        ({"a": 0, "b": 1, "c": 0}, "labels is a dict"),
        ({0, 1, 2}, "labels is a set"),
        ("abc", "labels is a str"),
        (iter([0, 1, 1]), "labels is a list_iterator"),
        ([0, None, 1], "picture 1 is None"),
        ([0, float("nan"), 1], "picture 1 is nan"),
        ([0.5, 1, 2], "picture 0 is 0.5"),
        (["a", "", "b"], "picture 1 is empty"),
        (["a", 1, "b"], "mixes names and numbers"),
        (np.eye(3), "picture 0 is array"),
        ([[0], [1], [1]], r"picture 0 is \[0\]"),
    ],
)
def test_what_is_no_label_is_told(labels, message):
    with pytest.raises(ValueError, match=message):
        one_a_picture(labels, 3)


def test_folders_are_classes():
    assert by_folder(["cat/1.png", "dog/sub/2.png", "train/3.png"]) == ["cat", "dog", "train"]
    for names in (["cat/1.png", "2.png"], ["/data/cat/1.png"], ["row 3"]):
        with pytest.raises(ValueError, match="lies in no class folder"):
            by_folder(names)
    with pytest.raises(ValueError, match="are test, train, which are parts of a data set"):
        by_folder(["train/cat/1.png", "test/dog/1.png"])


def test_classes_can_be_learned():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_classes([0, 1, 2], [1, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="are all 'a'; a probe needs"):
        check_classes(["a", "a"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match=r"2 of 3 held-out pictures .*\('Cat'\).*expected the same classes"):
        check_classes(["cat", "dog"], ["Cat", "dog", "Cat"], ["cat", "dog"])
    with pytest.warns(UserWarning, match="1 of 2 held-out pictures .*give more pictures"):
        check_classes([0, 1], [1, 2], [0, 1, 2])


def test_a_probe_takes_classes_and_finite_features_alone():
    features = np.random.default_rng(0).normal(size=(8, 3))
    with pytest.raises(ValueError, match="picture 3 is None"):
        linear_probe(features, [0, 1, 0, None, 0, 1, 0, 1], features, [0, 1] * 4)
    with pytest.raises(ValueError, match=r"picture 0 is 0\.5"):
        linear_probe(features, [0, 1] * 4, features, [0.5, 1] * 4)
    with pytest.raises(ValueError, match="test features are not finite"):
        linear_probe(features, [0, 1] * 4, np.where(features > 1, np.nan, features), [0, 1] * 4)
    assert linear_probe(features, [0, 1] * 4, features, np.array([0, 1] * 4)).given.shape == (8,)
