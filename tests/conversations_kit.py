"""Records in LLaVA's format about pictures of one colour each, and what a sample of them holds."""

import json

import pytest
import torch
from chat_kit import chatml_tokenizer
from PIL import Image

from llava_integration.models.chat import IGNORED
from llava_integration.train.data import Conversations, DataConfig
from vst.data.images import ImageTransform

SIDE, TOKENS = 28, 4
TRANSFORM = ImageTransform(SIDE, (0.5,) * 3, (0.5,) * 3)
COLOURS = {"red.png": (255, 0, 0), "sub/green.png": (0, 255, 0), "blue.jpg": (0, 0, 255)}


@pytest.fixture(name="folder")
def colour_folder(tmp_path):
    """Pictures of one colour each, a broken one and an empty one."""
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(root / name)
    whole = (root / "red.png").read_bytes()
    (root / "broken.png").write_bytes(whole[: len(whole) // 2])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_text("no picture")
    Image.new("RGB", (30, 30)).save(tmp_path / "outside.png")
    return root


def record(*texts, image=None, first="human", **more):
    """A record of LLaVA's, turns of human and gpt by turns."""
    order = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    turns = [{"from": order[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "x", "conversations": turns, **({} if image is None else {"image": image}), **more}


def written(records, tmp_path, name="data.json"):
    path = tmp_path / name
    lines = name.endswith(".jsonl")
    text = "\n".join(json.dumps(r) for r in records) + "\n" if lines else json.dumps(records)
    path.write_text(text)
    return str(path)


def data_of(records, folder, tokenizer=None, *, name="data.json", image_tokens=TOKENS, **options):
    file = written(records, folder.parent, name)
    config = DataConfig([file], **{"images": str(folder), **options})
    return Conversations(config, tokenizer or chatml_tokenizer(), TRANSFORM, image_tokens)


def prompt(sample, tokenizer=None):
    """The tokens as text, each picture's as one tag."""
    text = (tokenizer or chatml_tokenizer()).decode(sample["input_ids"])
    return text.replace("<image>" * TOKENS, "<image>")


def answers(sample):
    return chatml_tokenizer().decode(sample["labels"][sample["labels"] != IGNORED])


def users(sample):
    return [turn.split("<|im_end|>")[0] for turn in prompt(sample).split("<|im_start|>user\n")[1:]]


def reasons(data):
    return [(name.rpartition(":")[2], reason) for name, reason in data.skipped.items()]


def is_flat(picture, colour):
    expected = torch.tensor(colour).div(255).sub(0.5).div(0.5).view(3, 1, 1)
    return torch.allclose(picture, expected.expand(3, SIDE, SIDE), atol=0.03)
