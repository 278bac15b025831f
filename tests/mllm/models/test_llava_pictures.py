"""A saved tree's folder is enough for transformers to prepare pictures as the tree does."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as t
from PIL import Image

from llava_integration import VSTImageProcessor, VSTVisionModel
from vst import VSTEncoder
from vst.data.images import CUTS
from vst.tree.folder import PREPROCESSOR

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16")
SIZES = ((1, 1), (1, 97), (131, 3), (57, 40), (56, 56))


def picture(mode, size):
    width, height = size
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(noise, "RGBA").convert(mode) if mode != "P" else Image.fromarray(noise[..., :3]).convert("P")


@pytest.mark.parametrize("cut", CUTS)
def test_auto_image_processor_reads_a_tree(tree_of, tmp_path, cut):
    tree = tree_of("siglip", "clip", cut=cut)
    tree.save_pretrained(tmp_path / "tree")
    processor = t.AutoImageProcessor.from_pretrained(tmp_path / "tree")
    assert isinstance(processor, VSTImageProcessor)
    transform = VSTEncoder.from_pretrained(tmp_path / "tree").transform()
    assert processor.transform() == transform
    for mode in MODES:
        for size in SIZES:
            seen = processor(picture(mode, size), return_tensors="pt")["pixel_values"][0]
            assert torch.equal(seen, transform(picture(mode, size))), (mode, size)
    written = json.loads((tmp_path / "tree" / PREPROCESSOR).read_text())
    processor.save_pretrained(tmp_path / "own")
    assert json.loads((tmp_path / "own" / PREPROCESSOR).read_text()) == written


def test_every_way_of_saving_writes_it(tree_of, tmp_path):
    tree = tree_of()
    tree.save_pretrained(tmp_path / "whole")
    tree.save_stitches(tmp_path / "stitches")
    VSTVisionModel.from_tree(tree).save_pretrained(tmp_path / "model")
    texts = {(tmp_path / name / PREPROCESSOR).read_text() for name in ("whole", "stitches", "model")}
    assert len(texts) == 1
    other = tree_of("clip", "dinov2", cut="pad")
    other.save_pretrained(tmp_path / "whole", overwrite=True)
    assert t.AutoImageProcessor.from_pretrained(tmp_path / "whole").transform() == other.transform()
    (tmp_path / "whole" / PREPROCESSOR).unlink()  # as an earlier version left it
    assert VSTEncoder.from_pretrained(tmp_path / "whole").transform() == other.transform()
    assert t.AutoModel.from_pretrained(tmp_path / "whole").config.tree_config() == other.config


def test_the_pipeline_of_features(tree_of, tmp_path, pictures):
    tree = tree_of()
    tree.save_pretrained(tmp_path / "tree")
    pipe = t.pipeline("image-feature-extraction", model=str(tmp_path / "tree"))
    (found,) = torch.tensor(pipe(pictures[0]))
    with torch.no_grad():
        assert torch.allclose(found, tree(tree.transform()(pictures[0])[None])[0], atol=1e-6)


def test_it_is_written_without_transformers(tree_of, tmp_path):
    tree_of().save_pretrained(tmp_path / "tree")
    code = f"""
import sys
from vst import VSTEncoder
VSTEncoder.from_pretrained({str(tmp_path / "tree")!r}).save_pretrained({str(tmp_path / "again")!r})
print("transformers" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.strip() == "False"
    assert (tmp_path / "again" / PREPROCESSOR).read_text() == (tmp_path / "tree" / PREPROCESSOR).read_text()
