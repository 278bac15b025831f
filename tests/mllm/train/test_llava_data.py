"""LLaVA's JSON with real files on disk: what is read from it, and what is left out with its reason."""

import pytest
import torch
from chat_kit import chatml_tokenizer
from conversations_kit import (
    COLOURS,
    SIDE,
    TOKENS,
    TRANSFORM,
    answers,
    colour_folder,  # noqa: F401 (the fixture folder)
    data_of,
    is_flat,
    prompt,
    reasons,
    record,
    users,
    written,
)
from PIL import Image

from llava_integration.train.data import Conversations, DataConfig

# --- records


def test_a_picture_a_text_and_several_turns(folder):
    data = data_of(
        [
            record("<image>\nWhat is it?", "Red.", image="red.png"),
            record("How many?", "Two.", "Sure?", "Yes."),
            record("<image>\nColour?", "Green.", "Big?", "No.", image=["sub/green.png"]),
        ],
        folder,
    )
    assert len(data) == 3
    assert data.skipped == {}
    one, text, turns = data
    assert users(one) == ["<image>\nWhat is it?"]
    assert users(text) == ["How many?", "Sure?"]
    assert answers(one) == "Red.<|im_end|>"
    assert answers(text) == "Two.<|im_end|>Yes.<|im_end|>"
    assert answers(turns) == "Green.<|im_end|>No.<|im_end|>"
    assert [tuple(s["pixel_values"].shape) for s in data] == [
        (1, 3, SIDE, SIDE),
        (0, 3, SIDE, SIDE),
        (1, 3, SIDE, SIDE),
    ]
    assert is_flat(one["pixel_values"][0], COLOURS["red.png"])
    assert is_flat(turns["pixel_values"][0], COLOURS["sub/green.png"])
    assert torch.equal(one["pixel_values"][0], TRANSFORM(Image.open(folder / "red.png")))
    for sample in data:
        assert (sample["input_ids"].dtype, sample["labels"].dtype) == (torch.int64, torch.int64)
        assert sample["pixel_values"].dtype == torch.float32
        assert sample["input_ids"].shape == sample["labels"].shape
        assert sample["skipped"] == {}
    assert torch.equal(data[-1]["input_ids"], turns["input_ids"])
    with pytest.raises(IndexError, match="Conversation 3 was asked for, but there are 3"):
        data[3]


def test_several_pictures_come_in_the_order_of_their_tags(folder):
    names = ["blue.jpg", "red.png", "sub/green.png"]
    texts = ["First <image> then\n<image>", "Yes.", "And <image>?", "Also."]
    (sample,) = data_of([record(*texts, image=names)], folder)
    assert users(sample) == texts[::2]
    for picture, name in zip(sample["pixel_values"], names, strict=True):
        assert is_flat(picture, COLOURS[name])


@pytest.mark.parametrize(
    ("turns", "placed"),
    [
        (["<image>\nQ"], ["<image>\nQ"]),
        (["Q\n<image>"], ["<image>\nQ"]),
        (["Is <image> it? "], ["<image>\nIs  it?"]),
        (["<image>"], ["<image>"]),
        (["Q"], ["<image>\nQ"]),
        (["Q", "R <image>"], ["Q", "<image>\nR"]),
        (["Q", "R"], ["<image>\nQ", "R"]),
    ],
)
def test_the_tag_of_one_picture_goes_to_the_front_of_its_turn(folder, turns, placed):
    texts = [text for turn in turns for text in (turn, "A")]
    (sample,) = data_of([record(*texts, image="red.png")], folder)
    assert users(sample) == placed


def test_names_of_roles_and_system_messages(folder):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "user", "value": "Q"},
        {"from": "assistant", "value": "A"},
    ]
    records = [{"conversations": turns}, record("Q", "A")]
    own, default = data_of(records, folder)
    assert prompt(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>")
    assert prompt(default).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    own, given = data_of(records, folder, system="Be kind.")
    assert prompt(own).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ<|im_end|>")
    assert prompt(given).startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ<|im_end|>")


def test_a_first_turn_of_gpt_is_dropped_and_a_last_one_of_human_kept(folder):
    late, open_end = data_of([record("Hello.", "Q", "A", first="gpt"), record("Q", "A", "R")], folder)
    assert "Hello" not in prompt(late)
    assert (users(late), answers(late)) == (["Q"], "A<|im_end|>")
    assert (users(open_end), answers(open_end)) == (["Q", "R"], "A<|im_end|>")


UNUSABLE = {
    "is no record": ["text", None, {"image": "red.png"}, {"conversations": "Q"}, {"conversations": ["Q", "A"]}],
    "has no answer": [record(), record("Q"), record("A", first="gpt"), record("A", "Q", first="gpt")],
    "has a turn from 'robot', which is none of human": [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "robot", "value": "A"}]}
    ],
    "has a turn from": [
        {"conversations": [{"value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [{"from": ["human"], "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ],
    "without text": [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt"}]},
        {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "A"}]},
    ],
    "do not alternate": [
        {"conversations": [{"from": who, "value": "Q"} for who in whos]}
        for whos in (
            ["human", "human", "gpt"],
            ["human", "gpt", "gpt"],
            ["gpt", "gpt", "human", "gpt"],
            ["human", "system", "gpt"],
            ["system", "system", "human", "gpt"],
        )
    ],
    "0 tags <image> for 2 pictures": [record("Q", "A", image=["red.png", "blue.jpg"])],
    "1 tags <image> for 2 pictures": [record("<image>Q", "A <image>", image=["red.png", "blue.jpg"])],
    "2 tags <image> for 1 pictures": [record("<image><image>Q", "A", image="red.png")],
    "1 tags <image> for 0 pictures": [record("<image>Q", "A"), record("<image>Q", "A", image=[])],
    "something else as image": [
        record("<image>Q", "A", image=7),
        record("<image>Q", "A", image=[7]),
        record("<image>Q", "A", image=[""]),
        record("<image>Q", "A", image={"path": "red.png"}),
    ],
    "outside the folder": [
        record("<image>Q", "A", image="../outside.png"),
        record("<image>Q", "A", image="sub/../../outside.png"),
        record("<image>Q", "A", image=".."),
        record("<image>Q", "A", image="/etc/outside.png"),
        record("<image>Q<image>", "A", image=["red.png", "./../outside.png"]),
    ],
    "half a character": [record("Q \ud83d", "A")],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_what_cannot_be_used_is_left_out_with_its_reason(folder, reason):
    bad = UNUSABLE[reason]
    data = data_of([record("Q", "first"), *bad, record("Q", "last")], folder)
    assert [answers(sample) for sample in data] == ["first<|im_end|>", "last<|im_end|>"]
    assert [number for number, _ in reasons(data)] == [str(2 + i) for i in range(len(bad))]
    assert all(reason in why for _, why in reasons(data)), data.skipped
    file = str(folder.parent / "data.json")
    with pytest.raises(ValueError, match=f"No conversation of {file} can be used .*expected records such as") as error:
        data_of(bad, folder)
    assert reason in str(error.value)


def test_an_absolute_path_into_the_folder_and_dots_inside_it_are_taken(folder):
    inside = record("<image>Q", "A", image="sub/../red.png")
    absolute = record("<image>Q", "B", image=str(folder / "sub" / "green.png"))
    data = data_of([inside, absolute], folder)
    assert [answers(sample) for sample in data] == ["A<|im_end|>", "B<|im_end|>"]
    assert is_flat(data[0]["pixel_values"][0], COLOURS["red.png"])
    assert is_flat(data[1]["pixel_values"][0], COLOURS["sub/green.png"])


def test_without_a_folder_there_are_no_pictures(folder):
    data = data_of([record("<image>Q", "A", image="red.png"), record("Q", "B")], folder, images=None)
    assert [answers(sample) for sample in data] == ["B<|im_end|>"]
    assert reasons(data) == [("1", "has a picture, but no folder of pictures (images) is given")]


# --- files


def test_jsonl_and_several_files_and_a_limit(folder, tmp_path):
    first = written([record("Q", str(i)) for i in range(3)], tmp_path, "a.jsonl")
    second = written([record("Q"), *(record("Q", str(i)) for i in range(3, 6))], tmp_path, "b.json")
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes() + b"\n\n")

    def load(**options):
        return Conversations(DataConfig([first, second], **options), chatml_tokenizer(), TRANSFORM, TOKENS)

    assert [answers(sample) for sample in load()] == [f"{i}<|im_end|>" for i in range(6)]
    assert load().skipped == {f"{second}:1": "has no answer"}
    assert [answers(sample) for sample in load(limit=4)] == [f"{i}<|im_end|>" for i in range(4)]
    assert load(limit=2).skipped == {}
    assert len(load(limit=99)) == 6


def test_text_survives_whatever_its_characters(folder):
    texts = ["Zwei \u2028 Zeilen\x85?", '猫 🐈‍⬛ "quoted" \\n </s>\n']
    for name in ("data.json", "data.jsonl"):
        (sample,) = data_of([record(*texts)], folder, name=name)
        assert users(sample) == texts[:1]
        assert answers(sample) == texts[1] + "<|im_end|>"


def test_damaged_and_missing_files(folder, tmp_path):
    tokenizer = chatml_tokenizer()

    def load(file, **options):
        return Conversations(DataConfig([str(tmp_path / file)], **options), tokenizer, TRANSFORM, TOKENS)

    with pytest.raises(FileNotFoundError, match=r"no file of conversations .*nothing\.json"):
        load("nothing.json")
    (tmp_path / "half.json").write_text('[{"conversations": [')
    with pytest.raises(ValueError, match=r"half\.json is no valid JSON"):
        load("half.json")
    written([record("Q", "A")], tmp_path, "half.jsonl")
    (tmp_path / "half.jsonl").write_text((tmp_path / "half.jsonl").read_text() + '{"conv')
    with pytest.raises(ValueError, match=r"half\.jsonl:2 is no valid JSON"):
        load("half.jsonl")
    for text in ('{"a": 1}', '"text"', "3"):
        (tmp_path / "one.json").write_text(text)
        with pytest.raises(ValueError, match=r"one\.json holds no list of records"):
            load("one.json")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match=r"can be used \(no record\)"):
        load("none.json")
    written([record("Q", "A")], tmp_path, "good.json")
    with pytest.raises(FileNotFoundError, match="no folder of pictures"):
        load("good.json", images=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": []}, "files is"),
        ({"files": "a.json"}, "files is 'a.json', but must be a list"),
        ({"style": "chatty"}, "expected one of chat, plain"),
        ({"max_length": 0}, "max_length is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"style": "plain", "system": "Be kind."}, "system is given"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"files": ["a.json"], **options})
