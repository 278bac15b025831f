"""A processor that prepares pictures otherwise than the tree is told, wherever it is met; one that agrees is not."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image

from llava_integration import VSTImageProcessor, VSTVisionModel
from llava_integration.models.assemble import assemble, load
from vst import VSTEncoder
from vst.tree.folder import PREPROCESSOR

CHANGES = [
    {"image_mean": [0.5, 0.5, 0.5]},
    {"image_std": [0.5, 0.5, 0.5]},
    {"size": {"height": 28, "width": 28}},
    {"cut": "squash"},
]
FOREIGN = [{"do_center_crop": False}, {"resample": 2}, {"do_normalize": False}, {"crop_size": 28}, {"image_mean": "x"}]


def told(read):
    """What is said about another preparation."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read()
    return [str(w.message) for w in caught if "in another way" in str(w.message) or "pixel_values" in str(w.message)]


def changed(path, inside, changes):
    values = json.loads(path.read_text())
    (values[inside] if inside else values).update(changes)
    path.write_text(json.dumps(values))


@pytest.fixture
def tree(tree_of, tmp_path):
    tree_of("clip", "dinov2").save_pretrained(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.mark.parametrize("changes", CHANGES)
def test_a_trees_processor_that_was_edited(tree, changes):
    readers = (VSTEncoder.from_pretrained, t.AutoModel.from_pretrained, t.AutoImageProcessor.from_pretrained)
    assert not any(told(lambda read=read: read(tree)) for read in readers)
    changed(tree / PREPROCESSOR, None, changes)
    for read in readers:
        for sentence in told(lambda read=read: read(tree)) or [""]:
            assert next(iter(changes)) in sentence, read
            assert str(tree / PREPROCESSOR) in sentence
            assert "\n" not in sentence


def test_another_models_processor_beside_a_tree(tree):
    """Equal in what it does: nothing is said."""
    clip = VSTEncoder.from_pretrained(tree).config.trunk
    options = {"image_mean": list(clip.mean), "image_std": list(clip.std)}
    t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56, **options).save_pretrained(tree)
    for read in (VSTEncoder.from_pretrained, t.AutoModel.from_pretrained):
        assert not told(lambda read=read: read(tree))
    for changes in FOREIGN:
        before = (tree / PREPROCESSOR).read_text()
        changed(tree / PREPROCESSOR, None, changes)
        for read in (VSTEncoder.from_pretrained, t.AutoModel.from_pretrained):
            (sentence,) = set(told(lambda read=read: read(tree)))
            assert next(iter(changes)) in sentence
        (tree / PREPROCESSOR).write_text(before)
    (tree / PREPROCESSOR).write_text('{"image_processor_type": "VSTImageProcessor", "size": 56}')
    assert "no image_mean, no image_std" in told(lambda: VSTEncoder.from_pretrained(tree))[0]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_language_models_processor_that_was_edited(tree_of, lm, tmp_path, changes):
    model, processor = assemble(tree_of("clip", "dinov2"), *lm())
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    assert not told(lambda: load(tmp_path))
    changed(tmp_path / "processor_config.json", "image_processor", changes)
    for read in (load, t.AutoProcessor.from_pretrained):
        sentences = set(told(lambda read=read: read(tmp_path)))
        assert len(sentences) == 1
        assert next(iter(changes)) in sentences.pop()


def test_options_of_a_call_are_the_callers(tree):
    assert not told(lambda: t.AutoImageProcessor.from_pretrained(tree, image_mean=[0.5] * 3))


class TestPixelValues:
    @pytest.fixture
    def model(self, tree_of):
        return VSTVisionModel.from_tree(tree_of("clip", "dinov2"))

    def pixels(self, mean, std):
        black_and_white = np.zeros((60, 60, 3), np.uint8)
        black_and_white[:30] = 255
        processor = VSTImageProcessor(size=56, image_mean=mean, image_std=std)
        return processor(Image.fromarray(black_and_white), return_tensors="pt")["pixel_values"]

    def test_its_own_are_never_told(self, model):
        spec = model.tree.config.trunk
        own = self.pixels(spec.mean, spec.std)
        for pixels in (own, own.bfloat16(), own.half(), torch.zeros_like(own), own[:0]):
            with torch.no_grad():
                assert not told(lambda pixels=pixels: model(pixels))

    def test_what_cannot_be_its_own_is_told_once(self, model):
        other = self.pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        with torch.no_grad():
            (sentence,) = told(lambda: model(other))
            assert "from (-2.12, -2.04, -1.8) to (2.25, 2.43, 2.64)" in sentence
            assert "(-1.79, -1.75, -1.48)" in sentence
            assert not told(lambda: model(other))

    def test_numbers_to_255_are_told(self, model):
        with torch.no_grad():
            assert told(lambda: model(torch.full((1, 3, 56, 56), 255.0)))

    def test_a_compiled_model_is_not_looked_at(self, model):
        spec = model.tree.config.trunk
        assert not told(lambda: torch.export.export(model, (self.pixels(spec.mean, (0.1,) * 3),), strict=False))
