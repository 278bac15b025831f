"""The folder of a language model whose weights were cut or removed ends in one sentence."""

import os

import pytest
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("change", ["a stitch lacks", "a trunk's block lacks", "the projector is nan"])
def test_a_model_that_is_not_all_there_is_named(tree_of, lm, tmp_path, change):
    """transformers makes up what is missing, also of models that are frozen."""
    for part in assemble(tree_of(), *lm()):
        part.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    part = {
        "a stitch lacks": ".stitches.",
        "a trunk's block lacks": ".trunk.blocks.",
        "the projector is nan": "projector",
    }
    name = next(n for n in tensors if part[change] in n)
    if "lacks" in change:
        del tensors[name]
    else:
        tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    said = "lacks 1 tensors" if "lacks" in change else "numbers that are not finite in 1 tensors"
    with pytest.raises(ValueError, match=said) as found:
        load(tmp_path / "model")
    assert name.removeprefix("model.").split(".")[-1] in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "bos_token"])
def test_a_tokenizer_that_pads_or_ends_with_pictures_is_refused(tree_of, lm, name):
    model, tokenizer = lm()
    tokenizer.add_special_tokens({name: "<image>"})
    with pytest.raises(ValueError, match=f"{name} is <image>, which stands for pictures alone"):
        assemble(tree_of(), model, tokenizer)


def test_answers_without_an_end_are_told(tree_of, lm):
    model, tokenizer = lm()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.warns(UserWarning, match="says which token ends an answer"):
        assemble(tree_of(), model, tokenizer)
