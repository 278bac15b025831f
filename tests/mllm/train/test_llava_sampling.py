"""Batches of like length: an order of all conversations, the same after a resume, with less padding than chance."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from llava_integration.models.processing import image_tokens
from llava_integration.train.config import TrainerConfig, TuneConfig
from llava_integration.train.data import Conversations
from llava_integration.train.sampling import GroupedByLength

pytest_plugins = ("training_kit",)


def padding(order, lengths, size):
    batches = [[lengths[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    return sum(max(batch) * len(batch) for batch in batches) / sum(lengths)


@pytest.mark.parametrize("count", [1, 7, 8, 203, 1000])
def test_the_order_holds_everything_once_and_pads_little(count):
    rng = random.Random(0)
    lengths = [rng.randint(50, 400) for _ in range(count)]
    sampler = GroupedByLength(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(count))
    assert len(sampler) == count
    if count > 100:
        chance = padding(rng.sample(range(count), count), lengths, 8)
        assert padding(order, lengths, 8) < 1 + 0.2 * (chance - 1)


def test_the_order_is_that_of_seed_and_epoch_alone():
    lengths = list(np.random.default_rng(0).integers(50, 400, 100))
    one, two = GroupedByLength(lengths, 4, seed=1), GroupedByLength(lengths, 4, seed=1)
    first = list(one)
    random.random(), np.random.rand()
    assert list(two) == first
    two.set_epoch(1)
    assert list(two) != first
    assert list(GroupedByLength(lengths, 4, seed=2)) != first


def test_long_and_short_batches_mix():
    """No curriculum: the mean length of a batch does not follow its place in the epoch."""
    lengths = list(range(50, 850))
    order = list(GroupedByLength(lengths, 4, seed=0))
    means = [np.mean([lengths[i] for i in order[at : at + 4]]) for at in range(0, 800, 4)]
    assert abs(np.corrcoef(np.arange(200), means)[0, 1]) < 0.25


def test_told_lengths_follow_the_real_ones(kit):
    model, processor = kit.model.build(torch.float32, 0)
    tokens = image_tokens(model.config.vision_config.tree_config())
    data = Conversations(kit.data, processor.tokenizer, processor.image_processor.transform(), tokens)
    real = [len(data[i]["input_ids"]) for i in range(len(data))]
    assert len(data.lengths) == len(data)
    assert np.corrcoef(real, data.lengths)[0, 1] > 0.9


def test_stage_2_groups_and_stage_1_does_not(kit, tmp_path):
    known = {"none": None, "full": "group_by_length", "lora": "group_by_length"}
    for llm, expected in known.items():
        values = TrainerConfig({}).resolve(TuneConfig(llm=llm), 4, str(tmp_path))
        assert values.get("train_sampling_strategy") == expected
