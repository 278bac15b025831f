"""The tree behind transformers' LLaVA: against the tree itself, the language model alone, and what was saved."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as t
from conftest import FAMILIES
from PIL import Image

import llava_integration
from llava_integration import VSTImageProcessor, VSTLlavaForConditionalGeneration, VSTVisionConfig, VSTVisionModel
from llava_integration.models.assemble import assemble
from llava_integration.models.processing import image_tokens
from vst import VSTEncoder
from vst.data.images import CUTS
from vst.tree.baseline import FullEncoders, FullTower
from vst.tree.projector import ProjectorSpec

UNMODIFIED = [("channel", ()), ("additive", ()), ("interleave", ()), ("sequence", ())]


def prompt(processor, question="what is it?", images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def inputs(processor, pictures, questions=None):
    questions = questions or ["what is it?"] * len(pictures)
    texts = [prompt(processor, q) for q in questions]
    return processor(images=list(pictures), text=texts, return_tensors="pt", padding=True, padding_side="left")


@pytest.mark.parametrize("trunk", FAMILIES)
def test_auto_classes_read_saved_trees(tree_of, trunk, tmp_path):
    tree = tree_of(trunk, "dinov3", "clip")
    tree.save_pretrained(tmp_path / "tree")
    config = t.AutoConfig.from_pretrained(tmp_path / "tree")
    assert isinstance(config, VSTVisionConfig)
    assert config.tree_config() == tree.config
    assert (config.hidden_size, config.image_size, config.num_image_tokens) == (32 + 48 + 48, tree.image_size, 16)
    model = t.AutoModel.from_pretrained(tmp_path / "tree")
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size)
    for split in tree.splits:
        out = model(pixels, split=split, output_hidden_states=[-2], return_dict=True)
        assert torch.equal(out.hidden_states[-2], tree(pixels, split=split))
        assert torch.equal(out.last_hidden_state, out.hidden_states[-2])
    model.save_pretrained(tmp_path / "again")
    again = VSTEncoder.from_pretrained(tmp_path / "again")
    assert again.config == tree.config
    assert torch.equal(again(pixels), tree(pixels))


def test_default_split_can_be_set_and_is_saved(tree_of, tmp_path):
    model = VSTVisionModel.from_tree(tree_of())
    pixels = torch.randn(1, 3, 56, 56)
    model.split = 1
    assert torch.equal(model(pixels).last_hidden_state, model.tree(pixels, split=1))
    model.save_pretrained(tmp_path / "tree")
    assert t.AutoModel.from_pretrained(tmp_path / "tree").split == 1
    with pytest.raises(ValueError, match="holds no stitch at split 2"):
        model.split = 2


def test_a_default_split_by_branch_is_saved(tree_of, tmp_path):
    tree, pixels, mixed = tree_of("dinov2", "clip", "siglip"), torch.randn(1, 3, 56, 56), {"clip": 1, "siglip": 3}
    model = VSTVisionModel.from_tree(tree)
    model.split = mixed
    model.save_pretrained(tmp_path / "tree")
    again = t.AutoModel.from_pretrained(tmp_path / "tree")
    assert again.split == mixed
    torch.testing.assert_close(again(pixels).last_hidden_state, tree(pixels, split=mixed))
    turned = {"clip": 3, "siglip": 1}
    torch.testing.assert_close(again(pixels, split=turned).last_hidden_state, tree(pixels, split=turned))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_come_in_the_dtype_of_the_weights(tree_of, dtype):
    model = VSTVisionModel.from_tree(tree_of()).to(dtype)
    assert model(torch.randn(1, 3, 56, 56)).last_hidden_state.dtype == dtype


def llava(tree_of, lm, trunk="dinov2", projector=None, **options):
    if options.get("fusion", "channel") == "channel":
        tree = tree_of(trunk, "clip", **options)
    else:
        tree = tree_of(trunk, "clip", widths=(32, 32), **options)
    model, tokenizer = lm()
    return tree, *assemble(tree, model, tokenizer, projector=projector)


@pytest.mark.parametrize(("fusion", "_"), UNMODIFIED)
def test_unmodified_llava(tree_of, lm, pictures, tmp_path, fusion, _):
    tree, model, processor = llava(tree_of, lm, fusion=fusion)
    assert type(model) is t.LlavaForConditionalGeneration
    batch = inputs(processor, pictures[:3], ["what?", "what is at the top left of it?", "red?"])
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [tree.tokens] * 3
    with torch.no_grad():
        logits = model(**batch).logits
    seen = model.model.get_image_features(batch["pixel_values"]).pooler_output
    expected = model.model.multi_modal_projector(tree(batch["pixel_values"]))
    assert torch.equal(torch.stack(list(seen)), expected)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    again = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(again) is t.LlavaForConditionalGeneration
    assert {n: p for n, p in again.state_dict().items() if not torch.equal(p, model.state_dict()[n])} == {}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits)
    other = t.AutoProcessor.from_pretrained(tmp_path / "model")
    for key, value in inputs(other, pictures[:3], ["what?", "what is at the top left of it?", "red?"]).items():
        assert torch.equal(value, batch[key])
    one = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(again.generate(**batch, max_new_tokens=6, do_sample=False), one)


@pytest.mark.parametrize(
    "spec",
    [
        ProjectorSpec("linear"),
        *(
            ProjectorSpec(kind, fusion)
            for kind in ("linear", "mlp")
            for fusion in ("additive", "interleave", "sequence")
        ),
    ],
    ids=lambda s: f"{s.kind}-{s.fusion}",
)
def test_projectors_of_our_own(tree_of, lm, pictures, tmp_path, spec):
    """Branches of unequal width (32 and 48) through one projector each, against the sum done by hand."""
    tree, model, processor = llava(tree_of, lm, projector=spec)
    assert type(model) is VSTLlavaForConditionalGeneration
    changed = {type(m).__name__ for n, m in model.named_children()} | {type(m).__name__ for m in model.model.children()}
    assert changed == {"LlavaModel", "Linear", "VSTVisionModel", "Projector", "LlamaModel"}
    batch = inputs(processor, pictures[:2])
    tokens = {"interleave": 32, "sequence": 32}.get(spec.fusion, 16)
    assert image_tokens(tree.config, spec) == tokens
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [tokens] * 2
    seen = torch.stack(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
    maps = model.model.multi_modal_projector.maps
    parts = [
        torch.nn.functional.layer_norm(x, x.shape[-1:]) for x in tree.branch_tokens(batch["pixel_values"]).values()
    ]
    if spec.fusion is None:
        expected = maps[0](torch.cat(parts, -1))
    else:
        one, two = (m(p) for m, p in zip(maps, parts, strict=True))
        expected = {
            "additive": (one + two) / 2,
            "sequence": torch.cat([one, two], 1),
            "interleave": torch.stack([one[:, i // 2] if i % 2 == 0 else two[:, i // 2] for i in range(32)], 1),
        }[spec.fusion]
    assert torch.allclose(seen, expected, atol=1e-6)
    model.save_pretrained(tmp_path / "model")
    again = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert type(again) is VSTLlavaForConditionalGeneration
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_unequal_widths_are_refused_where_one_projector_cannot_join_them(tree_of):
    for fusion in ("interleave", "sequence", "additive"):
        with pytest.raises(ValueError, match="one projector a branch"):
            tree_of("dinov2", "clip", fusion=fusion)


def test_two_fusions_are_refused(tree_of, lm):
    with pytest.raises(ValueError, match="use fusion 'channel' for the tree"):
        llava(tree_of, lm, fusion="interleave", projector=ProjectorSpec("mlp", "sequence"))


@pytest.mark.parametrize("values", [{"kind": "conv"}, {"fusion": "concat"}, {"fusion": "channel"}])
def test_unknown_projectors_are_refused(values):
    with pytest.raises(ValueError, match="expected"):
        ProjectorSpec(**values)


def test_a_mismatch_of_tokens_and_features_is_an_error(tree_of, lm, pictures):
    _, model, processor = llava(tree_of, lm)
    batch = inputs(processor, pictures[:1])
    at = (batch["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0]
    batch["input_ids"][0, at] = 7
    with pytest.raises(Exception, match="Image features and image tokens do not match"):
        model(**batch)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gpt_neox", "opt"])
def test_any_causal_language_model(tree_of, lm, kind, pictures):
    """Text goes through it as through the language model alone, embeddings tied or not."""
    alone, tokenizer = lm(kind)
    ids = tokenizer("what is at the left? cat", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = alone(input_ids=ids).logits
    model, processor = assemble(tree_of(), alone, tokenizer)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.allclose(logits[..., : expected.shape[-1]], expected, atol=1e-5)
    model.generate(**inputs(processor, pictures[:2]), max_new_tokens=3)


def test_a_head_that_is_more_than_a_matrix_is_refused(tree_of, lm):
    with pytest.raises(ValueError, match="head does more than multiply"):
        assemble(tree_of(), *lm("cohere"))


def test_tied_embeddings_stay_tied(tree_of, lm, tmp_path):
    model, _ = assemble(tree_of(), *lm("llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = t.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_batched_generation_equals_one_by_one(tree_of, lm, pictures):
    _, model, processor = llava(tree_of, lm)
    questions = ["what?", "what is at the top left of the picture?", "is it red or blue?"]
    batch = inputs(processor, pictures[:3], questions)
    together = model.generate(**batch, max_new_tokens=8, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for i, question in enumerate(questions):
        one = inputs(processor, pictures[i : i + 1], [question])
        alone = model.generate(**one, max_new_tokens=8, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert together[i, : len(alone)].tolist() == alone.tolist()
        no_cache = model.generate(**one, max_new_tokens=8, do_sample=False, use_cache=False)
        assert no_cache[0, one["input_ids"].shape[1] :].tolist() == alone.tolist()


def test_several_pictures_in_one_prompt(tree_of, lm, pictures):
    _, model, processor = llava(tree_of, lm)
    text = prompt(processor, "which is red?", images=2)
    batch = processor(images=[pictures[:2]], text=[text], return_tensors="pt")
    assert batch["pixel_values"].shape[0] == 2
    assert torch.isfinite(model(**batch).logits).all()


def test_the_picture_is_seen(tree_of, lm, pictures):
    _, model, processor = llava(tree_of, lm)
    with torch.no_grad():
        one, two = (model(**inputs(processor, [p])).logits[0, -1] for p in pictures[:2])
    assert not torch.allclose(one, two)


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


def test_the_processor_hands_options_on(tree_of, lm, pictures):
    _, _, processor = llava(tree_of, lm)
    with pytest.raises(ValueError, match="do_normalize is False"):
        processor(images=pictures[0], text=prompt(processor), return_tensors="pt", do_normalize=False)


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


def test_what_a_tree_cannot_give_is_refused(tree_of):
    model = VSTVisionModel.from_tree(tree_of())
    pixels = torch.randn(1, 3, 56, 56)
    tokens = model(pixels).last_hidden_state
    for name, value in (("output_attentions", True), ("interpolate_pos_encoding", True), ("image_sizes", [[56, 56]])):
        with pytest.raises(ValueError, match=f"{name} is .* leave it out"):
            model(pixels, **{name: value})
        assert torch.equal(model(pixels, **{name: None}).last_hidden_state, tokens)
    out = model(pixels, return_dict=False, output_hidden_states=True, num_items_in_batch=torch.tensor(3))
    assert isinstance(out, tuple)
    assert torch.equal(out[0], tokens)


def test_given_tensors_are_saved(tree_of, tmp_path):
    tree = tree_of()
    model = VSTVisionModel.from_tree(tree)
    halved = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "tree", state_dict=halved, max_shard_size="5GB", variant=None)
    again = t.AutoModel.from_pretrained(tmp_path / "tree").state_dict()
    assert all(torch.equal(again[name], halved[name]) for name in halved)
    with pytest.raises(ValueError, match="1 missing"):
        model.save_pretrained(tmp_path / "tree", state_dict=dict(list(halved.items())[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_shard_size": "1KB"}, "max_shard_size is 1KB, but a tree is saved in one file"),
        ({"variant": "fp16"}, "given variant"),
        ({"safe_serialization": False}, "given safe_serialization"),
        ({"distributed_checkpoint": True}, "given distributed_checkpoint"),
        ({"overwrit": True}, "given overwrit"),
        ({"repo_id": "someone/tree"}, "repo_id are for an upload only"),
    ],
)
def test_saving_refuses_what_it_cannot_serve(tree_of, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        VSTVisionModel.from_tree(tree_of()).save_pretrained(tmp_path / "tree", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tree").exists()


def test_only_the_main_process_saves(tree_of, tmp_path):
    VSTVisionModel.from_tree(tree_of()).save_pretrained(tmp_path / "tree", is_main_process=False)
    assert not (tmp_path / "tree").exists()


def test_a_tree_is_uploaded_as_it_was_saved(tree_of, tmp_path, monkeypatch):
    import huggingface_hub

    seen = []
    repo = type("Repo", (), {"repo_id": "someone/tree"})
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **o: seen.append((name, o)) or repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **o: seen.append(o))
    model = VSTVisionModel.from_tree(tree_of())
    model.save_pretrained(tmp_path / "tree", push_to_hub=True, private=True, commit_message="a tree", token="x")
    assert seen[0] == ("tree", {"exist_ok": True, "private": True})
    assert seen[1]["repo_id"] == "someone/tree"
    assert seen[1]["commit_message"] == "a tree"
    assert set(seen[1]["allow_patterns"]) == {path.name for path in (tmp_path / "tree").iterdir()}


def test_nothing_of_an_earlier_model_in_shards_is_left(tree_of, lm, tmp_path):
    _, whole, _ = llava(tree_of, lm)
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tree = tree_of()
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileExistsError, match="already holds model-00001-of-"):
        tree.save_pretrained(tmp_path)
    tree.save_pretrained(tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.glob("*model*")} == {"model.safetensors"}


def test_models_in_full_behind_one_pixel_tensor(tree_of, lm, pictures, tmp_path):
    """Against the baseline that feeds each model its own preparation; equal where patches are of one size."""
    tree = tree_of("dinov2", "clip")
    tower = FullTower.from_config(tree.config)
    full = FullEncoders.load(tree.config)
    own = {n: torch.stack([tf(p) for p in pictures[:2]]) for n, tf in full.transforms().items()}
    pixels = torch.stack([tree.transform()(p) for p in pictures[:2]])
    assert torch.allclose(tower(pixels), full(own), atol=1e-4)
    resized = tree_of("dinov2", "siglip")  # patches of 14 and 16 pixels
    assert FullTower.from_config(resized.config)(pixels).shape == (2, 16, 80)
    model, processor = assemble(tower, *lm())
    batch = inputs(processor, pictures[:2])
    model.save_pretrained(tmp_path / "model")
    again = t.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert isinstance(again.model.vision_tower.tree, FullTower)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("fusion", ["channel", "interleave", "sequence", "additive"])
def test_one_model_doubled_is_a_tower_that_runs_once(tiny, fusion):
    """The control of equal tokens: against the model alone, its tokens taken twice."""
    source = tiny("clip", 48)
    tower = FullTower.from_config(VSTEncoder.plan(source, [source], [2], 56, fusion=fusion, normalise="none"))
    alone = VSTEncoder.from_vfms(source, [], [], 56, normalise="none")
    pixels, ran = torch.randn(2, 3, 56, 56), []
    for model in tower.models.values():
        model.patch_embed.proj.register_forward_hook(lambda *_: ran.append(1))
    tokens, once = tower(pixels), alone(pixels)
    assert ran == [1]
    expected = {
        "channel": torch.cat([once, once], -1),
        "interleave": once.repeat_interleave(2, 1),
        "sequence": torch.cat([once, once], 1),
        "additive": once,
    }
    assert torch.allclose(tokens, expected[fusion], atol=1e-6)


@pytest.mark.parametrize("tower", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("language", [torch.float32, torch.bfloat16])
def test_a_new_projector_takes_the_tower_as_it_comes(tree_of, lm, pictures, tower, language):
    model, tokenizer = lm()
    whole, processor = assemble(tree_of().to(tower), model.to(language), tokenizer)
    assert {p.dtype for p in whole.model.multi_modal_projector.parameters()} == {tower}
    logits = whole(**inputs(processor, pictures[:2])).logits
    assert logits.dtype == language
    assert torch.isfinite(logits).all()


def test_a_single_model_is_a_tower(tiny, lm, pictures):
    tree = VSTEncoder.from_vfms(tiny("clip", 48), [], [], 56)
    model, processor = assemble(tree, *lm())
    assert torch.isfinite(model(**inputs(processor, pictures[:2])).logits).all()


def test_a_model_made_from_its_config_alone_is_finite(tree_of, lm, pictures):
    _, model, processor = llava(tree_of, lm, trunk="dinov3")
    torch.manual_seed(0)
    fresh = t.LlavaForConditionalGeneration(model.config).eval()
    assert torch.isfinite(fresh(**inputs(processor, pictures[:2])).logits).all()


def test_a_language_model_without_chat_template(tree_of, lm):
    model, tokenizer = lm()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        assemble(tree_of(), model, tokenizer)
    _, processor = assemble(tree_of(), model, tokenizer, template="vicuna")
    assert "USER: <image>" in prompt(processor)


def test_the_import_is_all_that_a_user_adds(tree_of, lm, tmp_path, pictures):
    _, model, processor = llava(tree_of, lm, projector=ProjectorSpec("mlp", "interleave"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pictures[0].save(tmp_path / "picture.png")
    code = f"""
import llava_integration
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "model")!r})
processor = AutoProcessor.from_pretrained({str(tmp_path / "model")!r})
content = [{{"type": "image"}}, {{"type": "text", "text": "what is it?"}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
batch = processor(images=Image.open({str(tmp_path / "picture.png")!r}), text=text, return_tensors="pt")
print("IDS", model.generate(**batch, max_new_tokens=5, do_sample=False).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = json.loads(done.stdout.split("IDS")[1])
    batch = processor(images=Image.open(tmp_path / "picture.png"), text=prompt(processor), return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=5, do_sample=False).tolist() == ids


def test_names_are_exported():
    assert set(llava_integration.__all__) <= set(dir(llava_integration))
