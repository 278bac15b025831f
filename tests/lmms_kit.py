"""A tiny model on disk, documents about pictures, and the local tasks' questions from toy pictures."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from speaking_kit import speaking

from llava_integration.answer import scenes
from llava_integration.evaluate.lmms import write
from llava_integration.evaluate.lmms.model import VSTLlava
from vst.demo import emoji


@pytest.fixture
def folder(tree_of, lm, tmp_path):
    """A saved model whose answers differ by question and picture."""
    for part in speaking(tree_of, lm):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@dataclass
class Asked:
    """Documents of a task, as requests of lmms-eval to a model that was given them."""

    docs: list

    def model(self, folder, **options):
        lm = VSTLlava(str(folder), **{"show": False, **options})
        lm.task_dict["asked"] = {"test": self.docs}
        return lm

    def generate(self, **kwargs):
        return [self._request("generate_until", i, doc["question"], dict(kwargs)) for i, doc in enumerate(self.docs)]

    def likelihood(self, answers):
        return [
            self._request("loglikelihood", i, doc["question"], answer)
            for i, doc in enumerate(self.docs)
            for answer in answers
        ]

    def _request(self, kind, i, context, second):
        return Instance(
            request_type=kind,
            arguments=(context, second, lambda doc: doc["images"], i, "asked", "test"),
            idx=0,
            metadata={"task": "asked", "doc_id": i, "repeats": 1},
        )


@pytest.fixture
def asked(pictures):
    """A hundred questions of all lengths about no, one, two or three pictures."""
    words = [*"abcdefghij", "what is at the top left", "of this picture,", "a red cat", "or another thing"]
    docs = [
        {
            "question": f"{i}: " + " ".join(words[: 1 + i * 7 % len(words)]) + "?",
            "images": [pictures[(i + k) % 40] for k in range((1, 1, 2, 0, 1, 3)[i % 6])],
        }
        for i in range(100)
    ]
    return Asked(docs)


EASY_VQA = [
    ["is there a triangle?", "no", 0],
    ["is there a circle?", "yes", 0],
    ["is there a red shape?", "no", 0],
    ["what shape is in the image?", "circle", 0],
    ["what is the color of the shape?", "blue", 0],
    ["is there no circle?", "no", 0],
    ["is there not a teal shape?", "yes", 1],
    ["what shape is in the image?", "triangle", 1],
]


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """Toy pictures in place of easy-VQA's and the emoji."""
    root = tmp_path_factory.mktemp("toys")
    (root / "vqa" / "test" / "images").mkdir(parents=True)
    (root / "vqa" / "test" / "questions.json").write_text(json.dumps(EASY_VQA))
    for number in (0, 1):
        Image.new("RGB", (64, 64), (90 * number, 0, 200)).save(root / "vqa" / "test" / "images" / f"{number}.png")
    listing = [{"code": c, "name": n, "category": "", "subcategory": ""} for n, c in scenes.THINGS.items()]
    for style, ending in emoji.STYLES.items():
        (root / "emoji" / style).mkdir(parents=True)
        for i, code in enumerate(scenes.THINGS.values()):
            Image.new("RGB", (64, 64), (8 * i, 100, 0)).save(root / "emoji" / style / f"{code}.{ending}", lossless=True)
    (root / "emoji" / "emoji.json").write_text(json.dumps(listing))
    return {"vst_easy_vqa": root / "vqa", "vst_scenes": root / "emoji", "vst_labels": root / "emoji"}


@pytest.fixture(scope="session")
def questions(roots, tmp_path_factory) -> Path:
    """Folder of the local tasks' questions, eight a task."""
    return write(tmp_path_factory.mktemp("questions"), 8, **roots)


class Answering(lmms):
    """Answers by a rule from the document that is asked about."""

    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def generate_until(self, requests):
        return [self.rule(self.task_dict[r.args[4]][r.args[5]][r.args[3]]) for r in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError
