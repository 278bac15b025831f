"""The original LLaVA 1.2.2, unmodified, with a tree as its vision tower."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("llava", reason="the host is not installed here: make test-hosts")

from host_kit import COLOURS, QUESTION, colour_picture
from llava import conversation
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig
from safetensors.torch import load_file

from llava_integration.hosts.tower import VSTVisionTower
from vst import VSTEncoder

pytest_plugins = ("host_kit",)
pytestmark = pytest.mark.usefixtures("hooked")


def load(path, base=None, name="llava-tiny"):
    return load_pretrained_model(str(path), base and str(base), name, device="cpu")


def same_tower(tower, tree):
    """Whether a tower holds a tree's weights, cast to its own type."""
    ours, theirs = tower.to_tree().state_dict(), tree.state_dict()
    assert set(ours) == set(theirs)
    return all(torch.equal(t, theirs[n].to(t.dtype)) for n, t in ours.items())


def ask(tokenizer, model, processor, colour, **options):
    talk = conversation.conv_templates["v1"].copy()
    talk.append_message(talk.roles[0], f"<image>\n{QUESTION}")
    talk.append_message(talk.roles[1], None)
    ids = tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    picture = colour_picture(colour)
    images = process_images([picture], processor, model.config)
    images = [i.to(model.dtype) for i in images] if isinstance(images, list) else images.to(model.dtype)
    with torch.inference_mode():
        out = model.generate(
            ids, images=images, image_sizes=[picture.size], do_sample=False, max_new_tokens=8, **options
        )
    return tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()


def host_config(kit, **options):
    own = json.loads((kit.llm / "config.json").read_text())
    own = {k: v for k, v in own.items() if k not in ("model_type", "architectures")}
    tower = {"mm_vision_tower": kit.tower, "mm_hidden_size": 80, "mm_projector_type": "mlp2x_gelu", "use_mm_proj": True}
    return LlavaConfig(**(own | tower | {"mm_vision_select_layer": -2, "mm_use_im_patch_token": False} | options))


def built(kit, **options):
    """A model as its class makes it, with the tower's weights."""
    config = host_config(kit, **options)
    torch.manual_seed(0)
    model = LlavaLlamaForCausalLM(config)
    tower = model.get_vision_tower()
    assert isinstance(tower, VSTVisionTower)
    assert not tower.is_loaded
    tower.load_model()
    assert tower.is_loaded
    return model


def test_construct_forward_backward(kit):
    model, tree = built(kit), VSTEncoder.from_pretrained(kit.tree)
    pixels = torch.stack([tree.transform()(colour_picture(c)) for c in ("red", "blue")])
    seen = model.encode_images(pixels)
    assert torch.equal(model.get_vision_tower()(pixels), tree(pixels))
    assert torch.equal(seen, model.get_model().mm_projector(tree(pixels)))
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 9, 10], [1, IMAGE_TOKEN_INDEX, 11, 12]])
    out = model(input_ids=ids, labels=ids, images=pixels, attention_mask=torch.ones_like(ids))
    assert out.logits.shape[1] == 3 + tree.tokens
    out.loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("mm_projector" in n for n in grads)
    assert not any("vision_tower" in n for n in grads)
    assert all("vision_tower" in n for n, p in model.named_parameters() if not p.requires_grad)


class TestTraining:
    def test_stage_1(self, kit, stage1, capfd):
        """Only the projector is saved; its loss goes down although the host casts the tower to fp16 in an fp32 run."""
        assert min(kit.losses1[-3:]) < 0.93 * kit.losses1[0]
        saved = torch.load(stage1 / "mm_projector.bin")
        assert saved
        assert all("mm_projector" in name for name in saved)
        config = json.loads((stage1 / "config.json").read_text())
        assert config["mm_vision_tower"] == kit.tower
        assert config["mm_hidden_size"] == 80

    def test_stage_2(self, kit, stage2):
        assert min(kit.losses2[-3:]) < 0.5 * kit.losses2[0]
        assert min(kit.losses2) > 0  # targets that are all masked would give 0, or no number
        tensors = load_file(stage2 / "model.safetensors")
        tree = VSTEncoder.from_pretrained(kit.tree)
        assert sum("vision_tower.vision_tower." in n for n in tensors) == len(tree.state_dict())

    def test_no_target_is_masked_away(self, kit):
        """The host masks a whole conversation, with a warning, where its own count of tokens is off."""
        from llava.train import train as host
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(kit.llm, use_fast=False, model_max_length=256)
        tokenizer.pad_token = tokenizer.unk_token
        conversation.default_conversation = conversation.conv_templates["vicuna_v1"]
        records = json.loads((kit.folder / "talks.json").read_text())
        for record in records:
            out = host.preprocess([record["conversations"]], tokenizer, has_image="image" in record)
            answers = out["labels"][0][out["labels"][0] != -100]
            text = tokenizer.decode(answers)
            assert all(t["value"] in text for t in record["conversations"] if t["from"] == "gpt")

    def test_the_module_runs_hooked(self, kit, tmp_path):
        """``python -m llava_integration llava.train.train``, a process of its own."""
        out = tmp_path / "llava-run"
        words = kit.words(out, steps=2, save_strategy="steps", save_steps=2, bf16=True)
        command = [sys.executable, "-m", "llava_integration", "llava.train.train", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "tokenization mismatch" not in done.stdout
        assert "[vst] " in done.stderr
        assert "stitches" in done.stderr
        assert (out / "checkpoint-2" / "model.safetensors").is_file()


class TestReload:
    def test_a_whole_checkpoint(self, kit, stage2, log):
        tokenizer, model, processor, _ = load(stage2)
        tower = model.get_vision_tower()
        assert same_tower(tower, VSTEncoder.from_pretrained(kit.tree).bfloat16())  # as the run had it
        assert "restored by the checkpoint" in log.text
        assert model.dtype == tower.dtype == torch.float16
        found = {colour: ask(tokenizer, model, processor, colour) for colour in COLOURS}
        assert found["red"].startswith("It is")

    def test_pictures_make_a_difference(self, kit, stage2):
        _, model, processor, _ = load(stage2)
        images = process_images([colour_picture(c) for c in ("red", "blue")], processor, model.config)
        ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 9, 10]] * 2)
        logits = model(input_ids=ids, images=images.half()).logits
        assert not torch.allclose(logits[0, -1], logits[1, -1])

    def test_projector_over_a_base_model(self, kit, stage1, log):
        """The host draws new weights for every Linear of the tower on this route, before the tower is loaded."""
        tokenizer, model, processor, _ = load(stage1, kit.llm)
        assert same_tower(model.get_vision_tower(), VSTEncoder.from_pretrained(kit.tree))
        assert f"read from {kit.tree}" in log.text
        saved = torch.load(stage1 / "mm_projector.bin")
        for name, tensor in saved.items():
            assert torch.equal(model.state_dict()[name], tensor.half())
        assert isinstance(ask(tokenizer, model, processor, "red"), str)

    def test_lora(self, kit, stage1, tmp_path):
        out = tmp_path / "llava-tiny-lora"
        history = kit.train(
            out, pretrain_mm_mlp_adapter=stage1 / "mm_projector.bin", lora_enable=True, lora_r=8, lora_alpha=16,
            steps=8, mm_projector_lr=1e-3,
        )  # fmt: skip
        assert history[-1] < history[0] - 0.5
        assert not any("vision_tower" in n for n in torch.load(out / "non_lora_trainables.bin"))
        tokenizer, model, processor, _ = load(out, kit.llm, "llava-tiny-lora")
        assert same_tower(model.get_vision_tower(), VSTEncoder.from_pretrained(kit.tree))
        assert isinstance(ask(tokenizer, model, processor, "red"), str)


class TestTrainedStitches:
    """A tower whose stitches were trained within the host keeps them, on every route."""

    @pytest.fixture
    def trained(self, kit, tmp_path):
        model = built(kit)
        tower = model.get_vision_tower()
        tower.vision_tower.freeze()
        pixels = torch.randn(2, 3, 56, 56)
        optimizer = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=0.1)
        tower(pixels).sin().sum().backward()
        optimizer.step()
        assert not same_tower(tower, VSTEncoder.from_pretrained(kit.tree))
        model.save_pretrained(tmp_path / "llava-trained")
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(kit.llm, use_fast=False).save_pretrained(tmp_path / "llava-trained")
        return model, tmp_path / "llava-trained"

    def test_load_pretrained_model(self, trained, log):
        model, folder = trained
        tower = load(folder)[1].get_vision_tower()
        assert tower.is_loaded
        assert same_tower(tower, model.get_vision_tower().to_tree())
        tower.load_model()
        assert same_tower(tower, model.get_vision_tower().to_tree())

    def test_from_pretrained_as_in_training(self, trained, log):
        """Whole parameters, filled by ``load_state_dict``; the host then calls ``load_model``."""
        model, folder = trained
        again = LlavaLlamaForCausalLM.from_pretrained(folder)
        again.get_vision_tower().load_model()
        assert same_tower(again.get_vision_tower(), model.get_vision_tower().to_tree())
        lines = [r.getMessage() for r in log.records if "stitches" in r.getMessage()]
        state = model.state_dict()
        assert state
        sums = {line.split("stitches ")[1].split(" ")[0] for line in lines}
        lines = [r.getMessage() for r in log.records if "stitches" in r.getMessage()]
        assert {line.split("stitches ")[1].split(" ")[0] for line in lines} == sums
        assert len(sums) == 1

    def test_trained_on_in_a_next_stage(self, kit, trained, tmp_path):
        model, folder = trained
        kit.train(tmp_path / "next", steps=1, model_name_or_path=folder)
        tensors = load_file(tmp_path / "next" / "model.safetensors")
        prefix = "model.vision_tower.vision_tower."
        for name, tensor in model.get_vision_tower().vision_tower.state_dict().items():
            assert torch.equal(tensors[prefix + name], tensor.half())

    def test_a_few_tensors_beside_lora(self, kit, trained, stage1, log):
        """What ``non_lora_trainables.bin`` brings is kept, the rest of the tower comes from its own folder."""
        model, _ = trained
        tower = model.get_vision_tower()
        few = {f"model.vision_tower.{n}": p for n, p in tower.named_parameters() if p.requires_grad}
        again = built(kit)
        fresh = LlavaLlamaForCausalLM(again.config)
        fresh.load_state_dict(few, strict=False)
        assert not fresh.get_vision_tower().is_loaded
        fresh.get_vision_tower().load_model()
        assert same_tower(fresh.get_vision_tower(), tower.to_tree())

    def test_another_tree_is_an_error(self, kit, trained, tree_of, tmp_path):
        _, folder = trained
        other = tree_of("dinov2", "clip", splits=(1, 2, 3)).save_pretrained(tmp_path / "other")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": f"vst:{other}"}))
        with pytest.raises(ValueError, match="another tree"):
            load(folder)
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": f"vst:{kit.tree}@1"}))
        with pytest.raises(ValueError, match="another tree"):
            load(folder)
        with pytest.raises(ValueError, match="no place for"):
            LlavaLlamaForCausalLM.from_pretrained(folder)


class TestPictures:
    def test_pad_is_the_trees_own(self, kit):
        """The host pads with the mean colour and then calls the processor: the tree's transform with cut pad."""
        from dataclasses import replace

        model = built(kit, image_aspect_ratio="pad")
        picture = colour_picture("red", (90, 40))
        tower = model.get_vision_tower()
        expected = replace(tower.image_processor.transform, cut="pad")(picture)
        assert torch.equal(process_images([picture], tower.image_processor, model.config)[0], expected)

    def test_square(self, kit):
        model = built(kit)
        tower, picture = model.get_vision_tower(), colour_picture("red", (90, 40))
        found = process_images([picture], tower.image_processor, model.config)
        assert torch.equal(found[0], tower.image_processor.transform(picture))

    @pytest.mark.parametrize("merge", ["spatial", "spatial_unpad"])
    def test_anyres(self, kit, merge):
        model = built(
            kit, image_aspect_ratio="anyres", mm_patch_merge_type=merge,
            image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        )  # fmt: skip
        if merge == "spatial_unpad":
            torch.nn.init.normal_(model.model.image_newline)
        picture = colour_picture("red", (100, 50))
        tower = model.get_vision_tower()
        images = process_images([picture], tower.image_processor, model.config)
        assert images.shape == (1, 3, 3, 56, 56)
        ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 9]])
        length = model(input_ids=ids, images=images, image_sizes=[picture.size]).logits.shape[1]
        assert length == 2 + 16 + (32 if merge == "spatial" else 4 * (8 + 1))

    def test_anyres_forbids_several_tokens_a_patch(self, tree_of, kit, tmp_path):
        tree = tree_of("dinov2", "clip", widths=(32, 32), fusion="interleave").save_pretrained(tmp_path / "tree")
        config = host_config(kit, mm_vision_tower=f"vst:{tree}", mm_hidden_size=32, mm_patch_merge_type="spatial_unpad")
        with pytest.raises(ValueError, match="no grid"):
            LlavaLlamaForCausalLM(config)


def test_the_hosts_own_towers_stay(kit, tiny):
    """A CLIP folder still gives the host's CLIP tower, and uninstall gives its builder back."""
    from types import SimpleNamespace

    from llava.model import llava_arch

    import llava_integration

    assert llava_integration.install() == ["llava"]
    args = SimpleNamespace(mm_vision_tower=tiny("clip").removeprefix("hf:"), mm_vision_select_layer=-2)
    assert type(llava_arch.build_vision_tower(args, delay_load=True)).__name__ == "CLIPVisionTower"
    ours = SimpleNamespace(vision_tower=str(kit.tree), mm_vision_select_layer=-2)
    assert isinstance(llava_arch.build_vision_tower(ours), VSTVisionTower)
    llava_integration.uninstall()
    try:
        assert llava_arch.build_vision_tower.__module__ == "llava.model.multimodal_encoder.builder"
        assert not hasattr(llava_arch.build_vision_tower, "__wrapped__")
        with pytest.raises(ValueError, match="Unknown vision tower"):
            llava_arch.build_vision_tower(SimpleNamespace(mm_vision_tower=kit.tower))
    finally:
        llava_integration.install()


def test_import_and_inference_need_little(kit, stage2):
    """Not peft, deepspeed, open_clip, lmms-eval or jsonargparse."""
    code = f"""
import sys
for name in ("peft", "deepspeed", "open_clip", "lmms_eval", "jsonargparse", "sklearn", "matplotlib", "datasets"):
    sys.modules[name] = None
import importlib.metadata as m
import llava_integration, torch
llava_integration.install()
from llava.model.builder import load_pretrained_model
_, model, processor, _ = load_pretrained_model({str(stage2)!r}, None, "llava-tiny", device="cpu")
print("TOKENS", tuple(model.encode_images(torch.zeros(1, 3, 56, 56).half()).shape))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "TOKENS (1, 16, 64)" in done.stdout
