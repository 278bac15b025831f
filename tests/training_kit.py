"""A tiny language model, tree and conversations on disk, to train on."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from llava_integration.models.processing import image_tokens
from llava_integration.train.config import TrainerConfig, TuneConfig
from llava_integration.train.data import Collate, Conversations, DataConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.trainer import MLLMTrainer


@dataclass
class Kit:
    folder: Path
    model: ModelConfig
    data: DataConfig

    def options(self, steps, save=1000, rate=1e-2, split=None, **trainer):
        values = {"max_steps": steps, "save_steps": save, "learning_rate": rate, "warmup_steps": 0, **trainer}
        values.setdefault("per_device_train_batch_size", 4)
        return {"batch_size": 4, "split": split, "trainer": values}

    def built(self):
        return self.model.build(torch.float32, 42)[0]

    def trainer(self, model, processor):
        values = TrainerConfig(self.options(1)["trainer"]).resolve(TuneConfig(), 4, str(self.folder / "x"))
        tokens = image_tokens(model.config.vision_config.tree_config())
        transform = processor.image_processor.transform()
        pad, token = processor.tokenizer.pad_token_id, model.config.image_token_id
        return MLLMTrainer(
            tune=TuneConfig(),
            model=model,
            args=TrainingArguments(**values),
            train_dataset=Conversations(self.data, processor.tokenizer, transform, tokens),
            data_collator=Collate(pad, token, tokens, transform.size),
        )

    def yaml(self, out, **changes):
        model = {k: v for k, v in asdict(self.model).items() if k in ("llm", "tower")}
        values = {"model": model, "data": asdict(self.data), "out": str(out), "trainer": {"max_steps": 1}} | changes
        path = self.folder / "train.yaml"
        path.write_text(json.dumps(values))
        return path


@pytest.fixture
def kit(tree_of, lm, pictures, tmp_path):
    """Ten conversations: about one picture, about two, and about none."""
    folder = tmp_path / "kit"
    (folder / "images").mkdir(parents=True)
    model, tokenizer = lm()
    model.save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    tree_of("dinov2", "clip", split=3).save_pretrained(folder / "tree")
    records = []
    for i in range(10):
        pictures[i].save(folder / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is at the left?"}, {"from": "gpt", "value": f"a cat {i}"}]
        record = {"id": str(i), "image": f"{i}.png", "conversations": turns}
        if i == 3:
            record["image"] = ["3.png", "4.png"]
            turns[0]["value"] = "<image><image>\nwhich is red?"
        if i in (5, 6):
            del record["image"]
            turns[0]["value"] = "what is red?"
        if i % 2:
            turns += [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "no"}]
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    data = DataConfig([str(folder / "data.json")], str(folder / "images"), max_length=256)
    return Kit(folder, ModelConfig(llm=str(folder / "llm"), tower=str(folder / "tree")), data)
