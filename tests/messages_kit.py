"""What the tests of messages share: the check of a refusal and a small saved tree."""

import pytest

NAN, INF = float("nan"), float("inf")


def refused(call, *words, kind=ValueError):
    """Asserts that the call raises a ``kind`` whose text is one sentence that holds all the words."""
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text.strip()
    assert len(text) < 900
    for word in words:
        assert word in text, text


@pytest.fixture(scope="module")
def saved(tree_of, tmp_path_factory):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    return tree, tree.save_pretrained(tmp_path_factory.mktemp("saved") / "tree")
