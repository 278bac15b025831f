"""Samples of LLaVA's conversations, made when they are asked for: pictures that cannot be read, lengths, captions."""

import gc
import json
import pickle
import shutil
import tracemalloc

import pytest
from chat_kit import chatml_tokenizer, vicuna_tokenizer
from conversations_kit import (
    COLOURS,
    TOKENS,
    TRANSFORM,
    answers,
    colour_folder,  # noqa: F401 (the fixture folder)
    data_of,
    is_flat,
    prompt,
    reasons,
    record,
    written,
)

from llava_integration.models.chat import IGNORED
from llava_integration.train.data import Conversations, DataConfig


def test_pictures_are_opened_only_when_asked_for(folder):
    data = data_of([record("<image>\nQ", "A", image="red.png"), record("Q", "B")], folder)
    data.check()
    shutil.rmtree(folder)
    data.check()
    sample = data[0]
    assert answers(sample) == "B<|im_end|>"
    assert list(sample["skipped"].values()) == ["red.png: is missing"]


def test_bad_pictures_are_replaced_by_the_next_sample(folder):
    bad = ["broken.png", "empty.png", "text.png", "missing.png", "sub"]
    records = [record("<image>\nQ", str(i), image=name) for i, name in enumerate(bad)]
    records.insert(2, record("<image>\nQ", "good", image="red.png"))
    data = data_of(records, folder)
    file = str(folder.parent / "data.json")
    for index, steps in enumerate((2, 1, 0, 5, 4, 3)):
        for _ in range(2):
            sample = data[index]
            assert answers(sample) == "good<|im_end|>"
            assert is_flat(sample["pixel_values"][0], COLOURS["red.png"])
            assert list(sample["skipped"]) == [f"{file}:{(index + i) % 6 + 1}" for i in range(steps)]
    told = data[3]["skipped"]
    assert told[f"{file}:1"].startswith("broken.png: cannot be ")
    assert told[f"{file}:2"] == "empty.png: is empty (0 bytes)"
    assert told[f"{file}:4"].startswith("text.png: is no picture of a known format")
    assert told[f"{file}:5"] == "missing.png: is missing"
    assert told[f"{file}:6"] == "sub: is a folder"


def test_one_bad_picture_of_several_takes_the_sample_with_it(folder):
    two = record("<image><image>Q", "A", image=["red.png", "missing.png"])
    data = data_of([two, record("Q", "B")], folder)
    assert answers(data[0]) == "B<|im_end|>"
    assert list(data[0]["skipped"].values()) == ["missing.png: is missing"]


def test_too_long_to_learn_from(folder):
    long = record("<image>\n" + "long " * 100, "A", image="red.png")
    short = record("<image>\nQ", "short", image="red.png")
    data = data_of([long, short], folder, max_length=90)
    assert answers(data[0]) == "short<|im_end|>"
    assert "no token of an answer is left within max_length 90" in next(iter(data[0]["skipped"].values()))
    cut = data_of([record("Q", "A " * 100)], folder, max_length=90)[0]
    assert len(cut["input_ids"]) == 90
    assert answers(cut).startswith("A A A")
    assert not answers(cut).endswith("<|im_end|>")


def test_no_sample_at_all(folder):
    data = data_of([record("<image>\nQ", "A", image=f"{i}.png") for i in range(3)], folder)
    with pytest.raises(ValueError, match=r"None of 3 conversations can be used .*0\.png: is missing.* pictures"):
        data[1]


def test_check_finds_that_nothing_is_learned(folder):
    short, long = record("Q", "A"), record("long " * 100, "A")
    with pytest.raises(
        ValueError, match=r"first 2 conversations .*max_length is 90 and image_tokens.* 4; give a larger"
    ):
        data_of([long, long, short], folder, max_length=90).check(2)
    data_of([long, long, short], folder, max_length=90).check(3)
    data_of([long, long, short], folder, max_length=90).check()
    data_of([long, short, record("long " * 100, "A", "R", "B")], folder, max_length=90).check(2)
    picture = record("<image>\nQ", "A", image="missing.png")
    with pytest.raises(ValueError, match="cuts into the 576 picture tokens"):
        data_of([picture] * 40, folder, max_length=500, image_tokens=576).check()
    data_of([picture] * 40, folder, max_length=700, image_tokens=576).check()


def test_check_finds_a_template_that_refuses_a_later_kind_of_conversation(folder):
    refusing = (
        "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    records = [record("Q", "A")] * 50
    data_of(records, folder, chatml_tokenizer(refusing)).check(8)
    with pytest.raises(ValueError, match="one turn only"):
        data_of([*records, record("Q", "A", "R", "B")], folder, chatml_tokenizer(refusing)).check(8)


def test_plain(folder):
    records = [
        record("Say what is in <image>.", "a red square", image="red.png"),
        record("Q", "A"),
        record("<image>\nQ", "A", "R", "B", image="red.png"),
    ]
    tokenizer = vicuna_tokenizer(chat_template=None)
    data = data_of(records, folder, tokenizer, style="plain")
    (sample,) = data
    assert prompt(sample, tokenizer) == "<s><image>a red square\n"
    assert tokenizer.decode(sample["labels"][sample["labels"] != IGNORED]) == "a red square\n"
    assert [number for number, _ in reasons(data)] == ["2", "3"]
    assert all("style plain" in why for _, why in reasons(data))


def test_many_records_take_less_memory_than_as_objects(tmp_path, folder):
    file = written([record(f"Question {i}?", f"Answer {i}.") for i in range(2000)], tmp_path)
    tokenizer = chatml_tokenizer()

    def bytes_held_by(make):
        gc.collect()
        tracemalloc.start()
        held = make()
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return used, held

    as_objects, _ = bytes_held_by(lambda: json.loads((tmp_path / "data.json").read_bytes()))
    used, data = bytes_held_by(lambda: Conversations(DataConfig([file]), tokenizer, TRANSFORM, TOKENS))
    assert used < as_objects / 2
    for copy in (data, pickle.loads(pickle.dumps(data))):
        assert len(copy) == 2000
        assert answers(copy[1321]) == "Answer 1321.<|im_end|>"
