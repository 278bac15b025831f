"""Checkpoints as other people leave them: an edit of one equals the original model, or is refused in one sentence."""

import json
import random
import re
import shutil
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import small_tokenizer
from parity import offline, pixels, randomise  # noqa: F401
from safetensors.torch import load_file, save_file

from vst.models.checkpoints import describe, load_vfm

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of a tiny CLIP tower, to be edited."""
    return Path(shutil.copytree(tiny("clip", heads=4).removeprefix("hf:"), tmp_path / "clip"))


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def one_sentence(error):
    text = str(error)
    return "\n" not in text and len(text) < 1500 and text.rstrip().endswith((".", ")"))


# --- how pictures are prepared


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_normalisation_of_a_model_saved_through_its_processor(tmp_path, kind):
    """transformers keeps the image processor within processor_config.json then, and nowhere else."""
    config = getattr(transformers, f"{kind}Config")(vision_config={**SMALL, "intermediate_size": 48}, text_config=TEXT)
    randomise(getattr(transformers, f"{kind}Model")(config)).save_pretrained(tmp_path)
    images = getattr(transformers, f"{kind}ImageProcessor")(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    getattr(transformers, f"{kind}Processor")(images, small_tokenizer()).save_pretrained(tmp_path)
    assert (tmp_path / "processor_config.json").is_file()
    assert not (tmp_path / "preprocessor_config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = describe(f"hf:{tmp_path}")
    truth = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert (list(spec.mean), list(spec.std)) == (list(truth.image_mean), list(truth.image_std)) != (CLIP_MEAN, ())
    edit(tmp_path / "processor_config.json", image_processor={"image_mean": [0.3] * 3, "image_std": [0.2] * 3})
    assert describe(f"hf:{tmp_path}").mean == (0.3, 0.3, 0.3)  # a changed file is read anew


def test_what_a_hub_is_asked_for(tiny, monkeypatch):
    import huggingface_hub

    asked = []
    home = tiny("clip").removeprefix("hf:")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, allow_patterns: asked.extend(allow_patterns) or home
    )
    describe("hf:someone/clip")
    assert {"config.json", "preprocessor_config.json", "processor_config.json"} <= set(asked)


def test_an_assumed_normalisation_is_told(folder):
    (folder / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match=r"no preprocessor_config.json, so the mean \(0.4815, .* are assumed"):
        spec = describe(f"hf:{folder}")
    assert spec.mean == CLIP_MEAN
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.warns(UserWarning, match="names no image_std"):
        assert describe(f"hf:{folder}").mean == (0.1, 0.2, 0.3)
    edit(folder / "preprocessor_config.json", image_std=[1, 1, 1], resample=2)
    with pytest.warns(UserWarning, match="resizes pictures by 'bilinear'"):
        describe(f"hf:{folder}")


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ({"image_mean": 0.5, "image_std": 0.25}, (0.5,) * 3, (0.25,) * 3),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
        ({"rescale_factor": 1 / 255}, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, (0.5,) * 3, (0.2,) * 3),
        ({"rescale_factor": 2 / 255, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_every_way_to_say_a_normalisation(folder, values, mean, std):
    """What the network sees of a picture is what transformers' processor makes of it."""
    edit(folder / "preprocessor_config.json", **values)
    spec = describe(f"hf:{folder}")
    torch.testing.assert_close(torch.tensor([spec.mean, spec.std]), torch.tensor([mean, std]))
    processor = transformers.CLIPImageProcessorPil(
        **json.loads((folder / "preprocessor_config.json").read_text()), do_resize=False, do_center_crop=False
    )
    grey = torch.full((3, 4, 4), 51, dtype=torch.uint8).numpy()
    theirs = torch.as_tensor(processor(grey, return_tensors="pt")["pixel_values"][0, :, 0, 0])
    ours = (51 / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"image_std": [0, 1, 1]},
        {"image_std": 0},
        {"image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": "0.5"},
        {"image_mean": [None, 0.5, 0.5]},
        {"image_mean": [float("nan")] * 3},
        {"image_mean": {"r": 0.5}},
        {"rescale_factor": 0},
        {"rescale_factor": "1/255"},
        {"do_rescale": "no"},
        {"do_normalize": 3},
        {"do_normalize": 0},
        {"do_flip_channel_order": True},
        {"do_grayscale": True},
        {"rescale_offset": True},
    ],
)
def test_a_normalisation_that_cannot_be(folder, values):
    edit(folder / "preprocessor_config.json", **values)
    with pytest.raises(ValueError, match=re.escape(f"hf:{folder}")) as caught:
        describe(f"hf:{folder}")
    assert one_sentence(caught.value)


# --- configs and tensors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_attention_heads": 5}, "not a multiple of its 5 heads"),
        ({"patch_size": 14.0}, "patch_size 14.0"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps '1e-5'; expected a number"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps -1e-05"),
        ({"layer_norm_eps": None}, "layer_norm_eps None"),
        ({"num_hidden_layers": 10**9}, "depth is 1000000000"),
        ({"num_hidden_layers": 500}, "missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"image_size": [56, 56, 56]}, "image_size"),
        ({"image_size": 7}, "image_size is 0"),
        ({"model_type": ["clip"]}, "model_type"),
        ({"model_type": "clip"}, "vision_config None"),
        ({"model_type": "clip", "vision_config": {"model_type": "dinov2"}}, "vision_config of 'dinov2'"),
    ],
)
def test_a_config_that_cannot_be(folder, values, message):
    edit(folder / "config.json", **values)
    with pytest.raises(ValueError, match=message) as caught:
        load_vfm(f"hf:{folder}")
    assert one_sentence(caught.value)


def test_a_byte_order_mark_is_no_fault(folder):
    want = describe(f"hf:{folder}")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    assert describe(f"hf:{folder}") == want


@pytest.mark.parametrize("first", ["vision_config", "vision_config_dict"])
def test_two_configs_of_one_tower(tmp_path, first):
    """CLIP's second sub-dict takes the place of the first, its defaults included, as transformers reads it."""
    one, other = {**SMALL, "intermediate_size": 48}, {"hidden_size": 64, "num_attention_heads": 2}
    config = {"model_type": "clip", "vision_config": one}
    config |= {"vision_config_dict": other} if first == "vision_config_dict" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    truth = transformers.CLIPConfig.from_pretrained(tmp_path).vision_config
    spec = describe(f"hf:{tmp_path}")
    assert (spec.width, spec.depth, spec.heads, spec.patch, spec.hidden) == (
        truth.hidden_size,
        truth.num_hidden_layers,
        truth.num_attention_heads,
        truth.patch_size,
        truth.intermediate_size,
    )


def rewritten(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t.contiguous() for n, t in change(tensors).items()}, folder / "model.safetensors")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weights_that_are_not_finite(folder, bad, dtype):
    def spoil(tensors):
        tensors["encoder.layers.1.mlp.fc1.weight"][3, 4] = bad
        return {n: t.to(dtype) for n, t in tensors.items()}

    rewritten(folder, spoil)
    with pytest.raises(ValueError, match=r"numbers are not finite in 1 tensors \(blocks.1.mlp.fc1.weight\)"):
        load_vfm(f"hf:{folder}")
    load_vfm(f"hf:{folder}", stop=1, norm=False)  # what is not asked for is not looked at


def test_large_finite_weights_are_no_fault(folder):
    rewritten(folder, lambda t: {**t, "post_layernorm.bias": torch.full((32,), 3e38)})
    assert load_vfm(f"hf:{folder}").norm.bias.max() == 3e38


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool])
def test_quantised_weights(folder, dtype):
    rewritten(folder, lambda t: {**t, "post_layernorm.weight": t["post_layernorm.weight"].to(dtype)})
    with pytest.raises(ValueError, match=r"post_layernorm.weight is torch.* quantised weights are not supported"):
        load_vfm(f"hf:{folder}")


def test_safetensors_of_another_name(folder):
    (folder / "model.safetensors").rename(folder / "tower.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds tower.safetensors; expected model.safetensors.*rename"):
        load_vfm(f"hf:{folder}")


# --- names


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("https://huggingface.co/facebook/dinov2-large", "hf:facebook/dinov2-large"),
        ("hf:https://huggingface.co/facebook/dinov2-large/tree/main", "hf:facebook/dinov2-large"),
        ("hf:huggingface.co/facebook/dinov2-large", "hf:facebook/dinov2-large"),
        ("facebook/dinov2-large", "hf:facebook/dinov2-large"),
        ("timm/vit_small_patch14_dinov2.lvd142m", "timm:vit_small_patch14_dinov2.lvd142m"),
        ("vit_small_patch14_dinov2.lvd142m", "timm:vit_small_patch14_dinov2.lvd142m"),
        ("TIMM:vit_small_patch14_dinov2", "timm:vit_small_patch14_dinov2"),
        ("CLIP-L-336", "clip-l-336"),
        (" DINOv2-L ", "dinov2-l"),
        ("hf:", None),
    ],
)
def test_what_was_probably_meant(source, meant):
    with pytest.raises(ValueError, match="is no known model source") as caught:
        describe(source)
    assert one_sentence(caught.value)
    assert meant is None or f"did you mean {meant!r}?" in str(caught.value)


def test_a_bare_folder_is_a_folder_of_the_hub(folder, monkeypatch):
    with pytest.raises(ValueError, match=f"did you mean 'hf:{re.escape(str(folder))}'"):
        describe(str(folder))
    assert describe(Path(folder)) == describe(f"hf:{folder}")
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ValueError, match="did you mean 'hf:clip'"):
        describe("clip")


@pytest.mark.parametrize("source", [None, 5, ["clip-l-336"], {"timm": "x"}, b"clip-l-336"])
def test_a_source_that_is_no_text(source):
    with pytest.raises(ValueError, match="expected text such as timm:NAME"):
        describe(source)


# --- a hundred seeded edits of a folder

NUMBERS = [0, 1, -1, 3, 8, 16, 64, 10**9, 10**400, 1.5, 14.0, 1e-12, float("nan"), float("inf")]
ODD = [*NUMBERS, None, True, "8", "gelu", "", "quick_gelu", "no", [], [8, 8], [8, 9], {}, {"a": 1}]
MODELS = {
    "clip": (transformers.CLIPVisionModel, "encoder.layers", {"interpolate_pos_encoding": True}),
    "siglip": (transformers.SiglipVisionModel, "encoder.layers", {"interpolate_pos_encoding": True}),
    "dinov2_registers": (transformers.Dinov2WithRegistersModel, "encoder.layer", {}),
    "dinov3": (transformers.DINOv3ViTModel, "model.layer", {}),
}


def truth_of(family, folder, x):
    """What transformers' own model of the folder puts out behind its last block."""
    cls, blocks, call = MODELS[family]
    model, seen = cls.from_pretrained(folder).eval(), []
    model.get_submodule(blocks)[-1].register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        model(x, **call)
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def attempt(source):
    """The model, or the refusal."""
    try:
        return load_vfm(source)
    except (ValueError, FileNotFoundError) as error:
        return error


def edited(values, rng):
    """The text of a config with one value left out or replaced, now and then cut short."""
    values, key = dict(values), rng.choice(sorted(values))
    del values[key]
    if rng.random() < 0.8:
        values[key] = rng.choice(ODD)
        if key in ("rope_theta", "layer_norm_eps") and values[key] in (1, 3, 8, 16, 64):
            values[key] = float(values[key])  # transformers takes no whole number here, and a VFM does
    text = json.dumps(values)
    return text[: rng.randrange(len(text))] if rng.random() < 0.1 else text


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("family", MODELS)
def test_edits_of_a_config_equal_transformers_or_are_refused(tiny, tmp_path, family):
    home, rng, kept, took = Path(tiny(family).removeprefix("hf:")), random.Random(family), 0, 0.0
    names = ["config.json", "preprocessor_config.json"]
    texts = {name: json.loads((home / name).read_text()) for name in names}
    folder = Path(shutil.copytree(home, tmp_path / "edited"))
    for _ in range(25):
        name = rng.choices(names, [4, 1])[0]
        (folder / name).write_text(text := edited(texts[name], rng))
        begun = time.monotonic()
        got = attempt(f"hf:{folder}")
        took += time.monotonic() - begun
        if isinstance(got, Exception):
            assert one_sentence(got), (text, got)
            assert str(folder) in str(got), (text, got)
        else:
            x, kept = pixels(got.image_size, 1), kept + 1
            try:
                truth = truth_of(family, folder, x)
            except Exception:  # transformers is strict about settings that touch no number as well
                truth = truth_of(family, home, x)
            with torch.no_grad():
                ours = got.run(got.embed(x), 0, got.spec.depth)
            torch.testing.assert_close(ours, truth, atol=1e-4, rtol=1e-4, msg=lambda m, text=text: f"{text}: {m}")
        shutil.copy(home / name, folder / name)
    assert 2 <= kept < 25
    assert took < 10
