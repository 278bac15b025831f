"""What the processors cannot serve is said in a sentence, not left unread."""

import numpy as np
import pytest
import torch
import transformers as t

from llava_integration import VSTImageProcessor, VSTVisionConfig, make_processor
from llava_integration.models.assemble import assemble

FRAMES = np.zeros((2, 40, 60, 3), dtype=np.uint8)


@pytest.fixture
def processor(tree_of, lm):
    return make_processor(tree_of().config, lm()[1])


@pytest.mark.parametrize(
    "options",
    [
        {"videos": FRAMES}, {"videos": [[FRAMES[0]]]}, {"audio": np.zeros(1600)}, {"videos_kwargs": {"fps": 2}},
        {"audio_kwargs": {"sampling_rate": 16000}}, {"videos": torch.zeros(2, 3, 40, 60)},
    ],
    ids=lambda o: str(next(iter(o))),
)  # fmt: skip
def test_videos_and_sound_are_refused(processor, pictures, options, tmp_path):
    processor.save_pretrained(tmp_path)
    (name,) = options
    for asked in (processor, t.AutoProcessor.from_pretrained(tmp_path)):
        for images, text in ((pictures[0], "<image> what?"), (None, "what?")):
            with pytest.raises(ValueError, match=rf"^{name} was given, .* as images") as error:
                asked(images=images, text=text, return_tensors="pt", **options)
            assert "\n" not in str(error.value)
        usual = {"images": pictures[0], "text": "<image> what?", "return_tensors": "pt"}
        same = asked(**usual, videos=None, audio=[])
        assert torch.equal(same["pixel_values"], processor(**usual)["pixel_values"])


REFUSED = [
    {"size": 112}, {"size": {"height": 112, "width": 112}}, {"size": {"shortest_edge": 112}}, {"do_resize": False},
    {"do_rescale": False}, {"do_center_crop": False}, {"crop_size": {"height": 28, "width": 28}}, {"cut": "pad"},
    {"resample": 0},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=str)
@pytest.mark.parametrize("way", ["call", "images_kwargs", "chat"])
def test_another_preparation_is_refused_whichever_way_it_is_asked_for(processor, pictures, options, way):
    (name,) = options
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "what?"}]
    chat = [{"role": "user", "content": content}]
    ask = {
        "call": lambda: processor(images=pictures[0], text="<image> what?", **options),
        "images_kwargs": lambda: processor(images=pictures[0], text="<image> what?", images_kwargs=options),
        "chat": lambda: processor.apply_chat_template(chat, tokenize=True, return_dict=True, processor_kwargs=options),
    }[way]
    with pytest.raises(ValueError, match=rf"^{name} is .*: leave it out"):
        ask()


@pytest.mark.parametrize(
    ("name", "value"), [("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("resample", 0)]
)
def test_attributes_are_no_way_around(processor, pictures, name, value):
    setattr(processor.image_processor, name, value)
    with pytest.raises(ValueError, match=rf"^{name} is "):
        processor(images=pictures[0], text="<image> what?")


def test_the_crop_is_the_size(pictures):
    processor = VSTImageProcessor(size=56)
    with pytest.raises(ValueError, match=r"^crop_size is "):
        processor.crop_size = {"height": 28, "width": 28}
    processor.size = {"height": 28, "width": 28}
    assert processor.crop_size == {"height": 28, "width": 28}
    assert processor(pictures[0], return_tensors="pt")["pixel_values"].shape[-1] == 28


def test_options_at_reading_are_done(processor, pictures, tmp_path):
    processor.save_pretrained(tmp_path)
    read = t.AutoImageProcessor.from_pretrained(tmp_path, size=112, cut="pad")
    assert (read.transform().size, read.transform().cut) == (112, "pad")
    assert read(pictures[0], return_tensors="pt")["pixel_values"].shape[-1] == 112
    for name, value in (("do_resize", False), ("crop_size", 28)):
        with pytest.raises(ValueError, match=rf"^{name} is "):
            t.AutoProcessor.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize("cut", ["crop", "pad", "squash"])
@pytest.mark.parametrize("kind", ["LlavaNextProcessor", "LlavaOnevisionProcessor"])
def test_processors_of_tiles_get_a_sentence(lm, pictures, kind, cut):
    parts = {"image_processor": VSTImageProcessor(size=56, cut=cut), "tokenizer": make_tokenizer(lm)}
    if kind == "LlavaOnevisionProcessor":
        parts["video_processor"] = t.LlavaOnevisionVideoProcessor()
    tiles = getattr(t, kind)(**parts, patch_size=14, vision_feature_select_strategy="full")
    with pytest.raises((ValueError, KeyError), match="need their own image processor") as error:
        tiles(images=pictures[0], text="<image> what?", return_tensors="pt")
    assert "\n" not in str(error.value)


def make_tokenizer(lm):
    tokenizer = lm()[1]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    return tokenizer


def test_what_an_image_processor_gives_is_a_mapping_still():
    features = VSTImageProcessor(size=56)(np.zeros((40, 60, 3), dtype=np.uint8), return_tensors="pt")
    assert "image_sizes" not in features
    assert features.get("image_sizes") is None
    assert features.to("cpu")["pixel_values"] is features.pixel_values
    with pytest.raises(KeyError, match="and no image_sizes: "):
        features["image_sizes"]


def tiled(tree, lm, kind):
    config, whole = {
        "next": (t.LlavaNextConfig, t.LlavaNextForConditionalGeneration),
        "onevision": (t.LlavaOnevisionConfig, t.LlavaOnevisionForConditionalGeneration),
    }[kind]
    made = config(
        vision_config=VSTVisionConfig.from_tree(tree.config), text_config=lm("qwen2")[0].config, image_token_id=3,
        vision_feature_select_strategy="full", vision_feature_layer=-1, image_grid_pinpoints=[[112, 56], [56, 112]],
    )  # fmt: skip
    return whole(made).eval()


@pytest.mark.parametrize("kind", ["next", "onevision"])
@pytest.mark.parametrize("fusion", ["channel", "additive", "interleave", "sequence"])
def test_models_of_tiles_need_a_grid(tree_of, lm, fusion, kind):
    tree = tree_of("dinov2", "clip", widths=(32, 32), fusion=fusion)
    model = tiled(tree, lm, kind)
    pixels, sizes = torch.randn(1, 3, 3, 56, 56), torch.tensor([[100, 50]])
    if fusion in ("channel", "additive"):
        (seen,) = model.model.get_image_features(pixels, sizes).pooler_output
        assert len(seen) > tree.tokens
        return
    with pytest.raises(ValueError, match=f"fusion '{fusion}' gives 2 tokens a patch, which are no grid"):
        model.model.get_image_features(pixels, sizes)


@pytest.mark.parametrize("fusion", ["channel", "interleave"])
def test_the_patch_is_a_number_as_any(tree_of, lm, fusion):
    tree = tree_of("dinov2", "clip", widths=(32, 32), fusion=fusion)
    config = VSTVisionConfig.from_tree(tree.config)
    assert config.patch_size == 14
    assert f"{config.patch_size}" == "14"
    assert VSTVisionConfig.from_dict(config.to_dict()).tree_config() == tree.config
    assemble(tree, *lm())
