"""Media that would be left out without a word: every such record is told, and sound ones stay as they are."""

import gzip
import json

import pytest
from chat_kit import chatml_tokenizer
from conversations_kit import (
    TOKENS,
    TRANSFORM,
    answers,
    colour_folder,  # noqa: F401 (the fixture folder)
    data_of,
    is_flat,
    reasons,
    record,
    users,
)

from llava_integration.train.config import TuneConfig
from llava_integration.train.data import Conversations, DataConfig
from llava_integration.train.training import train

pytest_plugins = ("training_kit",)
ASKED = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}
KEYS = {
    "images": [{"images": ["red.png"]}, {"images": "red.png"}, {"images": [{"path": "red.png", "bytes": None}]}],
    "Image": [{"Image": "red.png"}],
    "image_path": [{"image_path": "red.png"}, {"image": None, "image_path": "red.png"}],
    "image_id": [{"image_id": 7}, {"image": "", "image_id": "000007"}, {"image": [], "image_id": 7}],
    "picture": [{"picture": "red"}],
    "photoFile": [{"photoFile": "red"}],
    "img": [{"img": "red.png"}],
    "frames": [{"frames": ["a", "b"]}],
    "video": [{"video": "a.mp4"}, {"image": "red.png", "video": "a.mp4"}],
    "audio": [{"audio": "a.wav"}, {"image": "red.png", "audio": {"path": "a.wav"}}],
    "file": [{"file": "sub/green.PNG"}, {"file": ["red.png"]}],
    "url": [{"url": "https://example.org/a.jpg?size=3"}],
    "meta.image": [{"meta": {"image": "red.png"}}],
    "attachments": [{"attachments": [["data:image/png;base64,iVBORw0KGgo="]]}],
    "attachments.type_of_media": [{"attachments": [{"type_of_media": "still", "at": "a"}]}],
}


@pytest.mark.parametrize("key", KEYS)
def test_media_under_another_key_are_told(folder, key):
    records = [record("Q", "first"), *({"conversations": [*ASKED], **more} for more in KEYS[key])]
    data = data_of(records, folder)
    assert len(data) == 1
    told = f"has `{key}`; pictures are named under `image`, and no other media are read"
    assert reasons(data) == [(str(2 + i), told) for i in range(len(KEYS[key]))]


def test_media_of_a_turn_are_told(folder):
    turns = [{**ASKED[0], "image": "red.png"}, ASKED[1]]
    data = data_of([record("Q", "A"), {"conversations": turns}], folder)
    assert reasons(data) == [
        ("2", "has `conversations.image`; pictures are named under `image`, and no other media are read")
    ]
    assert len(data_of([{"image": "red.png", "conversations": turns}], folder)) == 1


def test_pictures_beside_those_that_are_read_are_told(folder):
    for more in ({"images": ["red.png", "blue.jpg"]}, {"frames": ["blue.jpg"]}, {"images": [{"bytes": None}]}):
        data = data_of([record("Q", "A"), record("<image>\nQ", "B", image="red.png", **more)], folder)
        assert len(data) == 1
        assert f"has `{next(iter(more))}`; pictures are named" in reasons(data)[0][1]


FACTS = [
    {"id": "red.jpg", "source": "coco", "model": ""},
    {"image": "red.png", "images": ["red.png"]},
    {"image": "red.png", "image_id": 7, "image_size": [40, 30], "coco_url": "http://example.org/x.jpg"},
    {"image": "red.png", "image_url": "http://example.org/x.jpg", "video_id": "y", "num_frames": 1},
    {"images": [], "video": None, "audio": "", "num_images": 0, "has_image": False},
    {"meta": {"image": None, "score": 3, "tags": ["text"]}, "note": "a.jpg is\na file"},
]


@pytest.mark.parametrize("more", FACTS)
def test_facts_about_a_picture_or_none_leave_a_record_as_it_is(folder, more):
    plain = {key: value for key, value in more.items() if key == "image"}
    with_facts, without = data_of([record("Q", "A", **more), record("Q", "A", **plain)], folder)
    assert with_facts["input_ids"].tolist() == without["input_ids"].tolist()
    assert with_facts["labels"].tolist() == without["labels"].tolist()
    assert len(with_facts["pixel_values"]) == len(without["pixel_values"]) == len(plain)


@pytest.mark.parametrize(
    "tag",
    ["<video>", "<audio>", "<Video>", "<img>", "<image_1>", "<image 1>", "<image1>", "<|image|>", "<|image_1|>",
     "<|image_pad|>", "<ImageHere>", "<image_placeholder>", "<vila/video>", "<|vision_start|>", "<Image>", "<images>",
     "<speech>", "<start_of_image>", "<im_patch>"],
)  # fmt: skip
@pytest.mark.parametrize("place", ["{}\nWhat?", "What is in {}?", "What?\n{}"])
def test_tags_of_media_are_told(folder, tag, place):
    text = place.format(tag)
    data = data_of([record("Q", "A"), record(text, "B"), record(text, "B", image="red.png")], folder)
    assert len(data) == 1
    told = f"has the tag {tag}; a picture's place is told by <image>, and no other media are read"
    assert reasons(data) == [("2", told), ("3", told)]


@pytest.mark.parametrize(
    "text",
    ['<video src="a.mp4" controls></video>', "<video>\n<source>\n</video>", "What does `<video>` do?",
     "Explain the <audio> tag.", '<img src="a.png">', "<picture><source></picture>", "a <b> and <i>", "<frameset>"],
)  # fmt: skip
def test_code_that_looks_like_a_tag_stays_text(folder, text):
    (sample,) = data_of([record(text, "A <video> tag.")], folder)
    assert users(sample) == [text]


def test_media_of_any_turn_are_told_whatever_the_others_say(folder):
    """Tables fill the keys that a turn lacks with null."""
    filled = record("Q", "A")
    filled["conversations"][0]["image"], filled["conversations"][1]["image"] = "red.png", None
    system = record("Q", "A")
    system["conversations"].insert(0, {"from": "system", "value": "Look at <video>"})
    others = [record("Q", "A", point_cloud="a.ply"), record("Q", "A", document="a.pdf"), record("Q", "A")]
    data = data_of([filled, system, *others], folder)
    assert len(data) == 1
    told = [reason for _, reason in reasons(data)]
    assert [reason.split(";")[0] for reason in told] == [
        "has `conversations.image`",
        "has the tag <video>",
        "has `point_cloud`",
        "has `document`",
    ]


# --- names of pictures


def test_a_whole_path_into_the_folder_is_taken_also_through_a_link(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    linked, direct = tmp_path / "link" / "sub" / "green.png", folder / "sub" / "green.png"
    for images, name in ((folder, direct), (tmp_path / "link", linked), (tmp_path / "link", direct)):
        (sample,) = data_of([record("Q", "A", image=str(name))], folder, images=str(images))
        assert is_flat(sample["pixel_values"][0], (0, 255, 0))
    beside = str(tmp_path / "pictures-2" / "a.png")  # begins as the folder does
    with pytest.raises(ValueError, match="outside the folder of pictures"):
        data_of([record("Q", "A", image=beside)], folder)


@pytest.mark.parametrize(
    "name", ["https://example.org/a.jpg", "s3://b/a.jpg", "file:///a.jpg", "data:image/png;base64,"]
)
def test_an_address_is_told_as_one(folder, name):
    with pytest.raises(ValueError, match="names a picture by its address; only files in the folder"):
        data_of([record("Q", "A", image=name)], folder)


@pytest.mark.parametrize("image", [0, False, {}, 1.5, True])
def test_what_is_no_name_is_told(folder, image):
    with pytest.raises(ValueError, match="something else as image than a name"):
        data_of([record("Q", "A", image=image)], folder)


# --- answers


@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_is_not_learned(folder, answer):
    data = data_of([record("Q", "A"), record("Q", answer), record("Q", "A", "R", answer)], folder)
    assert [answers(sample) for sample in data] == ["A<|im_end|>"]
    assert reasons(data) == [(n, "has an empty answer, from which a model learns to be silent") for n in "23"]
    captions = [record("<image>\nQ", text, image="red.png") for text in ("red", answer)]
    assert len(data_of(captions, folder, style="plain")) == 1


# --- files


def test_files_are_told_by_what_they_hold(folder, tmp_path):
    records = [record("Q", "é"), record("Q", "B")]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in records)

    def told(name, data):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as error:
            data_of_file(tmp_path / name)
        assert "delete" not in str(error.value)
        return str(error.value)

    assert "it holds one record a line, so let its name end in .jsonl" in told("lines.json", lines.encode())
    assert "let its name end in .json." in told("list.jsonl", json.dumps(records).encode())
    assert "let its name end in .json." in told(
        "spread.jsonl", b"\xef\xbb\xbf" + json.dumps(records, indent=1).encode()
    )
    assert "byte 0xe9 at 7 is not UTF-8" in told("latin.jsonl", b'{"a": "\xe9"}\n')
    assert "is not UTF-8: save it in that encoding" in told("latin.json", f"[{lines}]".encode("latin-1"))
    assert "compressed by gzip: unpack it" in told("packed.jsonl.gz", gzip.compress(b'{"a": 1}\n'))
    assert "nested too deeply" in told("deep.json", b"[" * 200_000)
    assert "nested too deeply" in told("deep.jsonl", b'{"a":' * 200_000)
    assert "; mend it." in told("half.json", b'[{"conversations": ')


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "A.JSONL"])
def test_files_with_and_without_a_mark_of_order(folder, tmp_path, encoding, name):
    records = [record("Q", "é"), record("Q", "B")]
    lines = name.lower().endswith("l")
    text = "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records) if lines else json.dumps(records)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert [answers(sample) for sample in data_of_file(tmp_path / name)] == ["é<|im_end|>", "B<|im_end|>"]


def data_of_file(path):
    return Conversations(DataConfig([str(path)]), chatml_tokenizer(), TRANSFORM, TOKENS)


# --- before a run


def test_a_survey_counts_and_warns(folder):
    seen, text = record("<image>\nQ", "A", image="red.png"), record("Q", "A")
    blind, lost = record("Q", "A", images=["red.png"]), record("<image>\nQ", "A", image="lost.png")
    told, warnings = data_of([seen] * 30 + [text] * 10, folder).survey()
    assert (told, warnings) == ("30 conversations with pictures, 10 without", [])
    told, warnings = data_of([seen] * 39 + [blind], folder).survey()
    assert (told, warnings) == ("39 conversations with pictures, 0 without; 1 of 40 records cannot be used", [])
    told, warnings = data_of([seen] * 30 + [blind] * 10, folder).survey()
    assert told.endswith("10 of 40 records cannot be used")
    assert len(warnings) == 1
    assert "10 of 40 records cannot be used and are left out (10 times: has `images`;" in warnings[0]
    _, warnings = data_of([text], folder, images=None).survey()
    assert len(warnings) == 1
    assert warnings[0].startswith("None of 1 conversations has a picture")
    _, warnings = data_of([seen] * 1500 + [lost] * 500, folder).survey()
    assert len(warnings) == 1
    assert "pictures that were looked for are missing, such as lost.png in" in warnings[0]
    with pytest.raises(FileNotFoundError, match=r"None of 20 pictures .* such as lost\.png in .*\(images\)"):
        data_of([lost] * 20 + [text] * 20, folder).survey()


@pytest.mark.parametrize("more", [{"images": ["1.png"]}, {"video": "1.mp4"}])
def test_a_run_says_what_it_will_not_learn_before_it_trains(kit, tmp_path, capsys, more):
    whole = json.loads((kit.folder / "data.json").read_text())
    blind = [{**more, "conversations": [*ASKED]}] * 4
    (kit.folder / "data.json").write_text(json.dumps(whole + blind))
    options = kit.options(steps=1)
    with pytest.warns(UserWarning, match=f"4 of 14 records cannot be used .*has `{next(iter(more))}`"):
        train(kit.model, kit.data, str(tmp_path / "run"), TuneConfig(), **options)
    told = capsys.readouterr().out
    assert "8 conversations with pictures, 2 without; 4 of 14 records cannot be used" in told
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["results"]["skipped"]) == 4
    (kit.folder / "data.json").write_text(json.dumps(blind))
    with pytest.raises(ValueError, match=f"has `{next(iter(more))}`; pictures are named under `image`"):
        train(kit.model, kit.data, str(tmp_path / "blind"), TuneConfig(), **options)
    assert not (tmp_path / "blind" / "model.safetensors").exists()
