"""A tiny LLaMA with a tokenizer of LLaMA's own kind, a tree, and conversations, for the real host."""

import io
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (128, 128, 128)}
QUESTION = "What colour is the picture?"


def colour_picture(name, size=(64, 48)):
    return Image.new("RGB", size, COLOURS[name])


def make_tokenizer(folder):
    """A sentencepiece model with byte fallback, as LLaMA's: nothing is unknown, so no target is masked away."""
    import sentencepiece
    from transformers import LlamaTokenizer

    text = [
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: ASSISTANT:",
        *(f"{QUESTION} It is {colour}. A {colour} picture." for colour in COLOURS),
        "Is it dark? No.",
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=model, vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, pad_id=-1, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True)


@dataclass
class Kit:
    """Folders of a language model, a tree and conversations."""

    folder: Path
    tree: Path
    llm: Path

    @property
    def tower(self):
        return f"vst:{self.tree}"

    def words(self, out, version="v1", steps=18, **options):
        """A command line of ``llava.train.train``."""
        values = {
            "model_name_or_path": self.llm, "version": version, "vision_tower": self.tower, "output_dir": out,
            "data_path": self.folder / ("captions.json" if version == "plain" else "talks.json"),
            "image_folder": self.folder / "images", "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2, "mm_use_im_start_end": False, "mm_use_im_patch_token": False,
            "per_device_train_batch_size": 4, "max_steps": steps, "learning_rate": 1e-2, "logging_steps": 1,
            "save_strategy": "no", "model_max_length": 256, "use_cpu": True, "report_to": "none",
            "lazy_preprocess": True, "seed": 0,
        }  # fmt: skip
        return [word for key, value in (values | options).items() for word in (f"--{key}", str(value))]

    def train(self, out, *args, **options):
        """Run the host's own ``train()`` in this process; its losses, step by step."""
        from accelerate.state import AcceleratorState
        from llava.train import train as host

        AcceleratorState._reset_state(reset_partial_state=True)  # it outlives a run, with the run's precision
        argv, sys.argv = sys.argv, ["train", *self.words(out, *args, **options)]
        try:
            host.train()
        finally:
            sys.argv = argv
        return losses(out)


def losses(out):
    history = json.loads((Path(out) / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="session")
def kit(tree_of, tmp_path_factory):
    pytest.importorskip("llava")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("kit")
    tree = tree_of("dinov2", "clip").save_pretrained(folder / "tree")
    (folder / "llm").mkdir()
    tokenizer = make_tokenizer(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llm")
    (folder / "images").mkdir()
    talks, captions = [], []
    for i, name in enumerate(list(COLOURS) * 4):
        colour_picture(name).save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": f"It is {name}."}]
        more = [{"from": "human", "value": "Is it dark?"}, {"from": "gpt", "value": "No."}]
        talks.append({"id": str(i), "image": f"{i}.png", "conversations": turns + more * (i % 2)})
        caption = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A {name} picture."}]
        captions.append({"id": str(i), "image": f"{i}.png", "conversations": caption})
    talks.append({"id": "text", "conversations": more})
    (folder / "talks.json").write_text(json.dumps(talks))
    (folder / "captions.json").write_text(json.dumps(captions))
    return Kit(folder, tree, folder / "llm")


@pytest.fixture(scope="session")
def hooked():
    """The host with the tree hooked in, for the whole session."""
    pytest.importorskip("llava")
    import llava_integration

    llava_integration.install()
    yield
    llava_integration.uninstall()


@pytest.fixture(scope="session")
def stage1(kit, hooked, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "llava-stage1"
    kit.losses1 = kit.train(out, "plain", tune_mm_mlp_adapter=True, learning_rate=3e-2, steps=12)
    return out


@pytest.fixture(scope="session")
def stage2(kit, stage1, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "llava-stage2"
    kit.losses2 = kit.train(out, pretrain_mm_mlp_adapter=stage1 / "mm_projector.bin", bf16=True)
    return out


@pytest.fixture
def log(caplog):
    """The log of the tower, whoever shows it."""
    logger = logging.getLogger("llava_integration")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="llava_integration")
    yield caplog
    logger.removeHandler(caplog.handler)
