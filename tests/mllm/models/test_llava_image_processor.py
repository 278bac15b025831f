"""The image processor against the tree's own transform: options that agree with it, and those that are refused."""

import pytest
import torch
import transformers as t
from PIL import Image

from llava_integration import VSTImageProcessor
from vst.data.images import CUTS


@pytest.mark.parametrize("cut", CUTS)
def test_the_image_processor_is_the_trees_transform(tree_of, cut, tmp_path):
    tree = tree_of(cut=cut)
    picture = Image.effect_mandelbrot((90, 61), (-2, -1, 1, 1), 20).convert("RGBA")
    processor = VSTImageProcessor.from_tree(tree.config)
    expected = tree.transform()(picture)
    assert torch.equal(processor(picture, return_tensors="pt")["pixel_values"][0], expected)
    processor.save_pretrained(tmp_path)
    again = t.AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(again.preprocess([picture], return_tensors="pt")["pixel_values"][0], expected)
    array = torch.from_numpy(__import__("numpy").array(picture.convert("RGB")))
    same = again([array.permute(2, 0, 1)], return_tensors="np")["pixel_values"][0]
    assert (torch.from_numpy(same) - tree.transform()(picture.convert("RGB"))).abs().max() < 1e-6


# Options of transformers' image processors for a tree of 56 pixels that crops: what it does, and what it does not.
AS_IT_DOES = [
    {"size": 56}, {"size": {"height": 56, "width": 56}}, {"size": {"shortest_edge": 56}}, {"size": (56, 56)},
    {"crop_size": {"height": 56, "width": 56}}, {"do_resize": True}, {"do_center_crop": True}, {"do_rescale": True},
    {"do_normalize": True}, {"do_convert_rgb": True}, {"do_pad": False}, {"resample": Image.Resampling.BICUBIC},
    {"rescale_factor": 1 / 255}, {"data_format": "channels_first"}, {"size": None}, {"disable_grouping": True},
]  # fmt: skip
OTHERWISE = [
    {"size": 224}, {"size": {"height": 56, "width": 28}}, {"size": {"longest_edge": 56}}, {"size": "56"},
    {"crop_size": {"height": 28, "width": 28}}, {"do_resize": False}, {"do_center_crop": False}, {"do_rescale": False},
    {"do_normalize": False}, {"do_convert_rgb": False}, {"do_pad": True}, {"resample": Image.Resampling.NEAREST},
    {"rescale_factor": 1.0}, {"data_format": "channels_last"}, {"image_mean": 3 * [0.0]}, {"image_std": 3 * [1.0]},
    {"cut": "pad"}, {"do_something": True}, {"pad_size": {"height": 60, "width": 60}},
]  # fmt: skip


@pytest.mark.parametrize("options", AS_IT_DOES, ids=str)
def test_options_that_say_what_the_image_processor_does_change_nothing(tree_of, pictures, options):
    tree = tree_of()
    processor = VSTImageProcessor.from_tree(tree.config)
    expected = tree.transform()(pictures[0])
    assert torch.equal(processor(pictures[0], return_tensors="pt", **options)["pixel_values"][0], expected)
    given = {"image_mean": tree.config.trunk.mean, "image_std": tree.config.trunk.std, "size": 56} | options
    if given["size"] is not None:
        made = VSTImageProcessor(**given)
        assert torch.equal(made(pictures[0], return_tensors="pt")["pixel_values"][0], expected)


@pytest.mark.parametrize("options", OTHERWISE, ids=str)
def test_other_preparations_are_refused_in_one_sentence(tree_of, pictures, options):
    from llava_integration.hosts.images import HostImageProcessor

    (name,) = options
    config = tree_of().config
    for processor in (VSTImageProcessor.from_tree(config), HostImageProcessor(config)):
        with pytest.raises(ValueError, match=rf"^{name} is ") as error:
            processor.preprocess(pictures[0], return_tensors="pt", **options)
        assert "\n" not in str(error.value)
    if name in ("cut", "image_mean", "image_std") or options == {"size": 224}:
        assert VSTImageProcessor(**options).to_dict()  # a processor of one's own may do these
        return
    with pytest.raises(ValueError, match=rf"^{name} is "):
        VSTImageProcessor(**({"size": 56} | options))


def test_arrays_are_read_as_they_are_said_to_lie(tree_of):
    tree = tree_of()
    processor = VSTImageProcessor.from_tree(tree.config)
    array = torch.randint(0, 256, (3, 40, 3), dtype=torch.uint8).numpy()  # either end could be the colours
    seen = [
        processor(array, input_data_format=order, return_tensors="pt")["pixel_values"][0]
        for order in ("channels_first", "channels_last")
    ]
    pictures = (Image.fromarray(array.transpose(1, 2, 0).copy()), Image.fromarray(array))
    for found, picture in zip(seen, pictures, strict=True):
        assert torch.equal(found, tree.transform()(picture))
    with pytest.raises(ValueError, match="device is meta"):
        processor(array, input_data_format="channels_last", device="meta")
    assert processor(array, input_data_format="channels_last", return_tensors="pt", device="meta")[
        "pixel_values"
    ].is_meta
