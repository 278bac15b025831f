"""Scenes of emoji: pictures show what their questions say, and no wording tells an answer."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from questions_kit import NUMBERS, turns_of

from llava_integration.answer import scenes
from vst.demo import emoji

# Dark and far from each other, where backgrounds are light.
COLOURS = {name: (8 * i, (61 * i) % 170, 170 - 8 * i) for i, name in enumerate(scenes.THINGS)}
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


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
