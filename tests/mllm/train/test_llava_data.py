"""LLaVA's JSON with real files on disk, and batches in transformers' own LLaVA."""

import gc
import json
import pickle
import shutil
import tracemalloc

import pytest
import torch
from chat_kit import chatml_tokenizer, vicuna_tokenizer
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_integration.models.chat import IGNORED
from llava_integration.train.data import Collate, Conversations, DataConfig
from vst.data.images import ImageTransform

SIDE, TOKENS = 28, 4
TRANSFORM = ImageTransform(SIDE, (0.5,) * 3, (0.5,) * 3)
COLOURS = {"red.png": (255, 0, 0), "sub/green.png": (0, 255, 0), "blue.jpg": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
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


# --- samples


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


# --- batches

COLLATE = Collate(pad_token_id=0, image_token_id=9, image_tokens=TOKENS, image_size=SIDE)


def sample_of(length, pictures=0, seed=0, **skipped):
    g = torch.Generator().manual_seed(100 * seed + length)
    ids = torch.randint(10, 90, (length,), generator=g)
    ids[: pictures * TOKENS] = 9
    labels = ids.clone()
    labels[: length // 2 + pictures * TOKENS] = IGNORED
    pixels = torch.randn(pictures, 3, SIDE, SIDE, generator=g)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "skipped": skipped}


def test_a_batch_is_padded_on_the_right():
    samples = [sample_of(11, 1, a="x"), sample_of(7, 0), sample_of(14, 2, a="x", b="y")]
    batch = COLLATE(samples)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, 14)
    for i, sample in enumerate(samples):
        n = len(sample["input_ids"])
        assert torch.equal(batch["input_ids"][i, :n], sample["input_ids"])
        assert torch.equal(batch["labels"][i, :n], sample["labels"])
        assert batch["input_ids"][i, n:].eq(0).all()
        assert batch["labels"][i, n:].eq(IGNORED).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (14 - n)
    assert torch.equal(batch["pixel_values"], torch.cat([samples[0]["pixel_values"], samples[2]["pixel_values"]]))
    assert batch["skipped"] == {"a": "x", "b": "y"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == batch["attention_mask"].dtype == torch.int64


def test_a_batch_without_pictures_gets_a_row_that_has_one():
    for lengths in ([7, 5], [3, 2]):  # rows longer and shorter than a picture
        batch = COLLATE([sample_of(n) for n in lengths])
        width = max(*lengths, TOKENS)
        assert batch["input_ids"].shape == (3, width)
        assert batch["input_ids"][2].tolist() == [9] * TOKENS + [0] * (width - TOKENS)
        assert batch["attention_mask"][2].tolist() == [1] * TOKENS + [0] * (width - TOKENS)
        assert batch["labels"][2].eq(IGNORED).all()
        assert torch.equal(batch["pixel_values"], torch.zeros(1, 3, SIDE, SIDE))


@pytest.mark.parametrize(("length", "width"), [(8, 8), (9, 16), (16, 16)])
def test_length_to_a_multiple(length, width):
    collate = Collate(0, 9, TOKENS, SIDE, pad_to_multiple_of=8)
    batch = collate([sample_of(length, 1)])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (1, width)
    assert batch["input_ids"][0, length:].eq(0).all()
    assert batch["labels"][0, length:].eq(IGNORED).all()
    assert batch["attention_mask"].sum() == length


def llava(pad=0, image=9, vocabulary=100):
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**common, image_size=SIDE, patch_size=14),
        text_config=LlamaConfig(**common, vocab_size=vocabulary, pad_token_id=pad, max_position_embeddings=256),
        image_token_index=image,
    )
    return LlavaForConditionalGeneration(config).train()


def loss_of(model, batch):
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    model.zero_grad()
    loss = model(**{name: batch[name] for name in names if name in batch}).loss
    loss.backward()
    return loss.item()


def gradients(model, part):
    return {name: p.grad for name, p in model.named_parameters() if part in name}


@pytest.mark.parametrize("lengths", [[20, 12], [3, 2]])
def test_the_row_with_a_picture_changes_neither_loss_nor_gradients(lengths):
    model = llava()
    with_row = COLLATE([sample_of(n) for n in lengths])
    without = {
        name: value[:-1] for name, value in with_row.items() if name in ("input_ids", "attention_mask", "labels")
    }

    expected = loss_of(model, without)
    wanted = {name: grad.clone() for name, grad in gradients(model, "language_model").items()}
    assert all(grad is None for grad in gradients(model, "multi_modal_projector").values())

    assert loss_of(model, with_row) == pytest.approx(expected, abs=1e-6)
    assert expected > 1
    for part in ("multi_modal_projector", "vision_tower"):
        reached = [grad for grad in gradients(model, part).values() if grad is not None]
        assert reached
        assert all(grad.count_nonzero() == 0 for grad in reached)
    assert all(grad is not None for grad in gradients(model, "multi_modal_projector").values())
    for name, grad in gradients(model, "language_model").items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)


def test_padding_and_company_do_not_change_the_loss():
    """The mean over the answers of a batch is that over its samples alone, each weighted by its answer."""
    model = llava()
    samples = [sample_of(20, 1), sample_of(15, 0), sample_of(24, 2)]
    learned = [int(s["labels"][1:].ne(IGNORED).sum()) for s in samples]
    alone = [loss_of(model, COLLATE([s])) for s in samples]
    expected = sum(n * loss for n, loss in zip(learned, alone, strict=True)) / sum(learned)
    assert loss_of(model, COLLATE(samples)) == pytest.approx(expected, abs=1e-5)
    assert any(grad.count_nonzero() for grad in gradients(model, "multi_modal_projector").values())


def test_from_files_to_a_loss(folder):
    tokenizer = chatml_tokenizer()
    data = data_of(
        [
            record("<image>\nWhat is it?", "Red.", image="red.png"),
            record("How many?", "Two."),
            record("How many?", "Two.", "Sure?", "Yes."),
            record("<image>\n<image>\nSame?", "No.", image=["red.png", "blue.jpg"]),
            record("<image>\nWhat is it?", "Nothing.", image="missing.png"),
        ],
        folder,
        tokenizer,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    collate = Collate(tokenizer.pad_token_id, image, TOKENS, SIDE, pad_to_multiple_of=8)
    model = llava(tokenizer.pad_token_id, image, len(tokenizer))
    batches = list(DataLoader(data, batch_size=2, collate_fn=collate))
    assert [len(batch["pixel_values"]) for batch in batches] == [1, 2, 1]
    assert [list(batch["skipped"].values()) for batch in batches] == [[], [], ["missing.png: is missing"]]
    losses = [loss_of(model, batch) for batch in batches]
    assert all(1 < loss < 20 for loss in losses)
    text_only = DataLoader(data, batch_size=2, sampler=[1, 2], collate_fn=collate)
    assert len(next(iter(text_only))["input_ids"]) == 3
