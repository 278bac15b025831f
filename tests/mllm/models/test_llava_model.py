"""The tree behind transformers' LLaVA: against the tree itself, the language model alone, and what was saved."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as t
from PIL import Image

import llava_integration
from llava_integration import VSTLlavaForConditionalGeneration
from llava_integration.models.assemble import assemble
from llava_integration.models.processing import image_tokens
from vst import VSTEncoder
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


def test_the_processor_hands_options_on(tree_of, lm, pictures):
    _, _, processor = llava(tree_of, lm)
    with pytest.raises(ValueError, match="do_normalize is False"):
        processor(images=pictures[0], text=prompt(processor), return_tensors="pt", do_normalize=False)


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
