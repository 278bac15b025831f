"""Scenes of one to four emoji, and questions about them that only the picture answers.

Training and test show the same things drawn by different hands, so the outlines and shades of the test are new. Scenes
with a written label are a kind of their own: their word names a thing that the picture does not show.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from llava_integration.answer.ask import Question, record
from vst.demo import emoji
from vst.results.folders import atomic_path, write_json

THINGS = {
    "apple": "1f34e",
    "ball": "26bd",
    "banana": "1f34c",
    "boat": "26f5",
    "book": "1f4d5",
    "car": "1f697",
    "cat": "1f431",
    "chair": "1fa91",
    "clock": "23f0",
    "dog": "1f436",
    "flower": "1f33b",
    "frog": "1f438",
    "hat": "1f3a9",
    "heart": "2764-fe0f",
    "house": "1f3e0",
    "key": "1f511",
    "pig": "1f437",
    "plane": "2708-fe0f",
    "star": "2b50",
    "tree": "1f333",
}
"""Name to the code of the emoji; plurals are the names and an s."""

PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
"""Name to column and row."""

KINDS = ("what", "which", "where", "how many")
LABEL = "label"
"""The kind of question about what is written. It has scenes of its own and is no part of ``KINDS``."""
NUMBERS = ("zero", "one", "two", "three", "four")
SIDE = 224
"""Of a scene, in pixels."""

Turn = tuple[str, str]
"""A question and its answer."""

_READ = "What does the label say?"
_INK, _PAPER, _MARGIN = (30, 30, 30), (255, 255, 255), 10


@dataclass(frozen=True)
class Scene:
    """Which thing stands at which place; empty places are absent.

    Attributes:
        things: by place.
        label: word on a label that fills the half of the picture where no thing stands; None for no label.
    """

    things: dict[str, str]
    label: str | None = None

    @classmethod
    def draw(cls, rng: random.Random) -> Scene:
        """Two of three scenes with several things show one of them more than once.

        With that and the numbers' weights, no answer to "How many cats are there?" gets far above one half.
        """
        (number,) = rng.choices((1, 2, 3, 4), weights=(1, 2, 2, 2))
        copies = rng.randint(2, number) if number > 1 and rng.random() < 2 / 3 else 1
        first, *others = rng.sample(list(THINGS), number - copies + 1)
        places = rng.sample(list(PLACES), number)
        return cls(dict(zip(places, [first] * copies + others, strict=True)))

    @classmethod
    def draw_labelled(cls, rng: random.Random) -> Scene:
        """One or two things in the upper or lower half, and in the other a label with the name of a third."""
        word, *things = rng.sample(list(THINGS), rng.randint(2, 3))
        row = rng.randint(0, 1)
        places = [place for place, corner in PLACES.items() if corner[1] == row]
        return cls(dict(zip(rng.sample(places, len(things)), things, strict=True)), word)

    def paint(self, drawings: dict[str, emoji.Picture], rng: random.Random) -> Image.Image:
        """A square RGB picture with sides of ``SIDE``; no thing leaves its quarter, and no label its half.

        Args:
            drawings: the emoji of every thing's name.
            rng: draws a plain light background, each thing's size and position, and the label's.
        """
        red, green, blue = (rng.randint(205, 255) for _ in range(3))
        image = Image.new("RGB", (SIDE, SIDE), (red, green, blue))
        half = SIDE // 2
        for place, thing in self.things.items():
            size = rng.randint(78, 100)
            column, row = PLACES[place]
            corner = (column * half + rng.randint(0, half - size), row * half + rng.randint(0, half - size))
            image.paste(emoji.open_picture(drawings[thing], (red, green, blue), size), corner)
        if self.label is not None:
            below = any(PLACES[place][1] == 0 for place in self.things)
            _write(image, self.label, half if below else 0, rng)
        return image

    def ask(self, kind: str, rng: random.Random) -> Turn | None:
        """One question of a kind with its answer; None where the scene allows for none.

        Raises:
            ValueError: ``kind`` is neither in ``KINDS`` nor ``LABEL``.
        """
        if kind == LABEL:
            return None if self.label is None else (_READ, self.label)
        place, thing = rng.choice(list(self.things.items()))
        if kind == "what":
            return _what(place, thing)
        if kind == "which":
            return _which(thing, rng.choice(self._absent()), rng)
        if kind == "where":
            once = [pair for pair in self.things.items() if self._number(pair[1]) == 1]
            return _where(*rng.choice(once)) if once else None
        if kind == "how many":
            return self._how_many(thing if rng.random() < 0.5 else None)
        raise ValueError(f"A question of kind {kind!r} was asked for; there are {(*KINDS, LABEL)}: choose one.")

    def converse(self, rng: random.Random) -> list[Turn]:
        """Questions in an order in which no earlier turn states the answer of a later one.

        Numbers are asked for first or not at all, as every other turn would tell something about them. Then every
        thing is asked for once by its place or by its name, or by its name whether it is there and after that where.
        Places that were named narrow the others down; nothing else is given away.
        """
        counted = rng.choice((None, None, "things", rng.choice(list(self.things.values()))))
        absent = self._absent()
        rng.shuffle(absent)
        threads: list[list[Turn]] = []
        for thing in sorted(set(self.things.values())):
            place = rng.choice([place for place, other in self.things.items() if other == thing])
            what, which = _what(place, thing), _which(thing, absent.pop(), rng)
            where = [_where(place, thing)] if self._number(thing) == 1 else []
            if thing == counted:
                threads.append(where)
            else:
                threads.append(rng.choice(([what], [which, *where], where or [what])))
        turns = [self._how_many(None if counted == "things" else counted)] if counted else []
        while threads := [thread for thread in threads if thread]:
            turns.append(rng.choice(threads).pop(0))
        return turns

    def caption(self) -> str:
        """Every thing with its place, and what the label says."""
        told = [f"{_a(self.things[place])} at the {place}" for place in PLACES if place in self.things]
        return ", ".join(told if self.label is None else [*told, f"a label that says {self.label}"])

    def _absent(self) -> list[str]:
        return [thing for thing in THINGS if thing not in self.things.values()]

    def _number(self, thing: str) -> int:
        return Counter(self.things.values())[thing]

    def _how_many(self, thing: str | None) -> Turn:
        """Of one thing, or of all for None."""
        if thing is None:
            return "How many things are there?", NUMBERS[len(self.things)]
        return f"How many {thing}s are there?", NUMBERS[self._number(thing)]


class _Series(NamedTuple):
    """Scenes drawn in one way, each from a seed of its own."""

    name: str
    prefix: str
    draw: Callable[[random.Random], Scene]


_SCENES, _LABELLED = _Series("scene", "", Scene.draw), _Series("label", "label-", Scene.draw_labelled)


def write(
    folder: Path,
    root: Path,
    count: int,
    styles: Sequence[str] = ("noto", "twemoji"),
    seed: int = 0,
    labelled: int = 0,
) -> Path:
    """Write scenes as PNG, their questions as ``conversations.json`` and their captions as ``captions.json``.

    Both are in LLaVA's format, one record a picture.

    Args:
        folder: where to; scenes that it holds from before are replaced.
        root: the folder ``vst.demo.assets.prepare().emoji``.
        count: how many scenes; fewer are a part of more.
        styles: of the emoji, taken in turns.
        seed: of everything; :func:`questions` draws other scenes with the same seed.
        labelled: how many scenes with a label to add; the others do not depend on it.

    Returns:
        The path of ``conversations.json``, whose pictures are relative to ``folder``. It is written last: where it is,
        all pictures are.

    Raises:
        ValueError: an unknown style, or an emoji is missing.
        FileNotFoundError: the folder of emoji was not prepared.
    """
    folder = Path(folder)
    listing = folder / "conversations.json"
    drawings = [_drawings(root, style) for style in styles]
    listing.unlink(missing_ok=True)
    records, captions = [], []
    for series, number in (_SCENES, count), (_LABELLED, labelled):
        for index in range(number):
            rng = random.Random(f"{series.name} {seed} {index}")
            scene = series.draw(rng)
            image, name = f"pictures/{series.prefix}{index:05d}.png", f"{series.name}-{seed}-{index}"
            _save(scene.paint(drawings[index % len(drawings)], rng), folder / image)
            turns = scene.converse(rng) if scene.label is None else [(_READ, scene.label)]
            records.append(record(name, image, turns))
            captions.append(record(name, image, [("What is in the picture?", scene.caption())]))
    write_json(folder / "captions.json", captions)
    write_json(listing, records)
    return listing


def questions(
    folder: Path, root: Path, count: int = 500, style: str = "fluent", seed: int = 0, kinds: Sequence[str] = KINDS
) -> list[Question]:
    """Write scenes of a test as PNG and ask at most one question of each kind about each of them.

    Args:
        folder: where to; not a folder of :func:`write`.
        root: the folder ``vst.demo.assets.prepare().emoji``.
        count: how many questions, equally many of each kind (the first kinds have the remainder).
        style: of the emoji.
        seed: of everything.
        kinds: those wanted, of ``KINDS`` and ``LABEL``.

    Raises:
        ValueError: an unknown style or kind, or an emoji is missing.
        FileNotFoundError: the folder of emoji was not prepared.
    """
    drawings = _drawings(root, style)
    wanted = Counter({kind: (count + len(kinds) - 1 - place) // len(kinds) for place, kind in enumerate(kinds)})
    found: list[Question] = []
    for series, own in (_SCENES, [k for k in kinds if k != LABEL]), (_LABELLED, [k for k in kinds if k == LABEL]):
        index = 0
        while any(wanted[kind] for kind in own):
            rng = random.Random(f"test {series.name} {seed} {index}")
            scene = series.draw(rng)
            path = Path(folder) / f"{series.prefix}{index:05d}.png"
            _save(scene.paint(drawings, rng), path)
            for kind in own:
                if wanted[kind] and (turn := scene.ask(kind, rng)):
                    found.append(Question(path, *turn, kind))
                    wanted[kind] -= 1
            index += 1
    return found


def _what(place: str, thing: str) -> Turn:
    return f"What is at the {place}?", thing


def _where(place: str, thing: str) -> Turn:
    return f"Where is the {thing}?", place


def _which(present: str, absent: str, rng: random.Random) -> Turn:
    first, second = (_a(name) for name in rng.sample((present, absent), 2))
    return f"Which is in the picture, {first} or {second}?", present


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _drawings(root: Path, style: str) -> dict[str, emoji.Picture]:
    """Name of a thing to its emoji."""
    known = {picture.emoji.code: picture for picture in emoji.pictures(root, (style,))}
    if missing := [thing for thing, code in THINGS.items() if code not in known]:
        raise ValueError(f"{root} lacks the emoji of {missing}; expected all: run vst.demo.assets.prepare() again.")
    return {thing: known[code] for thing, code in THINGS.items()}


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary)


def _write(image: Image.Image, word: str, top: int, rng: random.Random) -> None:
    """Draw a label with a word into the half of a scene that begins ``top`` pixels below its upper edge."""
    size = rng.randint(40, 56)
    room = SIDE - 4 * _MARGIN
    font = ImageFont.load_default(size)
    if (width := font.getlength(word)) > room:
        font = ImageFont.load_default(int(size * room / width))
    left, upper, right, lower = (round(edge) for edge in font.getbbox(word))
    width, height = right - left + 2 * _MARGIN, lower - upper + 2 * _MARGIN
    x = rng.randint(_MARGIN, SIDE - _MARGIN - width)
    y = top + rng.randint(_MARGIN, SIDE // 2 - _MARGIN - height)
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((x, y, x + width, y + height), radius=6, fill=_PAPER, outline=_INK, width=2)
    pen.text((x + _MARGIN - left, y + _MARGIN - upper), word, font=font, fill=_INK)
