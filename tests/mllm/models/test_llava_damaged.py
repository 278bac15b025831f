"""The folder of a language model whose weights were cut or removed ends in one sentence."""

import os

import pytest

from llava_integration.models.assemble import assemble, load


@pytest.mark.parametrize("size", [None, 0, 100, -1])
def test_a_damaged_model_is_named(tree_of, lm, tmp_path, size):
    for part in assemble(tree_of(), *lm()):
        part.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    said = r"model\.safetensors.*restore it, or make"
    with pytest.raises((ValueError, FileNotFoundError), match=said) as found:
        load(tmp_path / "model")
    assert "\n" not in str(found.value)
