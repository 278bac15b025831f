"""Tiny random models of every family, written by transformers as their real ones are."""

import json
import os
from contextlib import suppress

os.environ.setdefault("HF_HUB_OFFLINE", "1")

with suppress(
    ImportError
):  # before anything imports distutils, or torch's compiler, which needs both, refuses to start
    import setuptools  # noqa: F401

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vst import VSTEncoder
from vst.models import checkpoints

# Tests import these by name before pytest takes them for plugins: their asserts are told as a test's own are.
pytest.register_assert_rewrite("checkpoints_kit", "messages_kit")

FAMILIES = ("clip", "siglip", "dinov2", "dinov2_registers", "dinov3")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
NORMALISATION = {
    "clip": {
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "siglip": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "dinov2": IMAGENET,
    "dinov3": IMAGENET,
}


def _model(family, width, depth, heads, grid):
    import transformers as t

    common = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    with_mlp = {**common, "intermediate_size": 2 * width}
    if family == "clip":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**with_mlp, image_size=14 * grid, patch_size=14))
    if family == "siglip":
        return t.SiglipVisionModel(
            t.SiglipVisionConfig(**with_mlp, image_size=16 * grid, patch_size=16, vision_use_head=False)
        )
    if family == "dinov2":
        return t.Dinov2Model(t.Dinov2Config(**common, mlp_ratio=2, image_size=14 * grid, patch_size=14))
    if family == "dinov2_registers":
        config = t.Dinov2WithRegistersConfig(
            **common, mlp_ratio=2, image_size=14 * grid, patch_size=14, num_register_tokens=2
        )
        return t.Dinov2WithRegistersModel(config)
    assert family == "dinov3"
    config = t.DINOv3ViTConfig(**with_mlp, image_size=16 * grid, patch_size=16, num_register_tokens=4)
    return t.DINOv3ViTModel(config)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """Where a test runs: on a CPU, and on a GPU where there is one; fp32 is fp32 there as well."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of convolutions: on by default
    return request.param


@pytest.fixture(autouse=True)
def pillow_as_it_comes(monkeypatch):
    """lmms-eval lets truncated pictures through in the whole process once it is imported."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture(autouse=True)
def nothing_described():
    """Tests give a library's name other models, where a process takes it for one and describes it once."""
    checkpoints._DESCRIBED.clear()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``tiny(family, width=32, depth=4)`` gives the source string of a tiny model."""
    made = {}

    def make(family, width=32, depth=4, heads=2, grid=4, seed=0):
        key = (family, width, depth, heads, grid, seed)
        if key not in made:
            torch.manual_seed(seed)
            model = _model(family, width, depth, heads, grid)
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if p.ndim > 1:
                        p.normal_(0, 0.2)
                    elif "norm" in name and name.endswith("weight"):
                        p.normal_(1, 0.2)
                    else:
                        p.normal_(0, 0.2)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text(json.dumps(NORMALISATION[family.partition("_")[0]]))
            made[key] = f"hf:{folder}"
        return made[key]

    return make


@pytest.fixture(scope="session")
def tree_of(tiny):
    """``tree_of("dinov2", "clip", splits=[1, 3])``: a tree of tiny models at a 4 x 4 grid."""

    def make(trunk="dinov2", *branches, splits=(1, 3), widths=(32, 48), depths=(4, 4), **options):
        branches = branches or ("clip",)
        source = tiny(trunk, widths[0], depths[0])
        others = [tiny(b, widths[1], depths[1], seed=1 + i) for i, b in enumerate(branches)]
        image_size = 4 * (16 if trunk in ("siglip", "dinov3") else 14)
        return VSTEncoder.from_vfms(source, others, splits, image_size, **options)

    return make


@pytest.fixture(scope="session")
def pictures():
    """Forty small pictures with structure: coloured gradients and blocks."""
    rng = np.random.default_rng(0)
    out = []
    for _ in range(40):
        x = np.linspace(0, 1, 48)
        image = np.einsum(
            "i,j,c->ijc", np.cos(x * rng.uniform(1, 9)), np.sin(x * rng.uniform(1, 9)), rng.uniform(size=3)
        )
        at = rng.integers(0, 32, 2)
        image[at[0] : at[0] + 16, at[1] : at[1] + 16] = rng.uniform(size=3)
        out.append(Image.fromarray((255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)))
    return out


@pytest.fixture
def picture_folder(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(pictures):
        image.save(folder / f"{i:03d}.png")
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_tokenizer():
    """A byte-level tokenizer with ChatML, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is at the top left? a red cat. user assistant"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture
def lm():
    """``lm("qwen2")`` gives a tiny random causal language model and its tokenizer."""

    def make(kind="llama", width=32, **options):
        import transformers as t

        tokenizer = small_tokenizer()
        common = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}
        usual = {
            "hidden_size": width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 2 * width,
        }
        no_kv = {k: v for k, v in usual.items() if k != "num_key_value_heads"}
        config = {
            "llama": lambda: t.LlamaConfig(**common, **usual, **options),
            "qwen2": lambda: t.Qwen2Config(**common, **usual, **options),
            "cohere": lambda: t.CohereConfig(**common, **usual, **options),
            "gpt2": lambda: t.GPT2Config(**common, n_embd=width, n_layer=2, n_head=2, **options),
            "gpt_neox": lambda: t.GPTNeoXConfig(**common, **no_kv, **options),
            "opt": lambda: t.OPTConfig(
                **common, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
                word_embed_proj_dim=width, **options,
            ),
        }[kind]()  # fmt: skip
        torch.manual_seed(0)
        return t.AutoModelForCausalLM.from_config(config).eval(), tokenizer

    return make
