"""Emoji in three styles (Noto, Twemoji, Fluent 3D): the same things drawn by three hands, with names and categories.

Licences: Noto Apache-2.0, Twemoji CC-BY 4.0, Fluent MIT.
"""

from __future__ import annotations

import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

VERSION = 1
"""Raise it whenever :func:`extract` would write something else, so that folders made earlier are made anew."""

STYLES = {"noto": "png", "twemoji": "png", "fluent": "webp"}
"""Style to file ending; Noto and Twemoji are 64 x 64 pixels, Fluent 256 x 256 (two are 256 x 264), all with alpha."""


@dataclass(frozen=True)
class Emoji:
    """One emoji of Unicode, whoever draws it.

    Attributes:
        code: its code points in lower-case hex, joined by ``-``, as its files are named.
        name: Unicode's name. category, subcategory: Unicode's groups, such as ``Food & Drink``, ``food-fruit``.
    """

    code: str
    name: str
    category: str
    subcategory: str


@dataclass(frozen=True)
class Picture:
    """One emoji as drawn in one of ``STYLES``."""

    emoji: Emoji
    style: str
    path: Path


def load(root: Path) -> list[Emoji]:
    """The emoji that exist in all three styles, ordered by code.

    Args:
        root: the folder ``prepare().emoji``.

    Raises:
        FileNotFoundError: the folder was not prepared.
    """
    path = Path(root) / "emoji.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a prepared folder: run vst.demo.assets.prepare().")
    return [Emoji(**entry) for entry in json.loads(path.read_text())]


def pictures(root: Path, styles: Sequence[str] = tuple(STYLES)) -> list[Picture]:
    """Every emoji in each of ``styles``; the pictures of one emoji follow each other.

    Raises:
        ValueError: an unknown style.
        FileNotFoundError: the folder was not prepared.
    """
    if unknown := [style for style in styles if style not in STYLES]:
        raise ValueError(f"Emoji styles {unknown} were asked for; known are {list(STYLES)}: choose among these.")
    return [
        Picture(emoji, style, Path(root) / style / f"{emoji.code}.{STYLES[style]}")
        for emoji in load(root)
        for style in styles
    ]


def open_picture(
    picture: Picture, background: tuple[int, int, int] = (255, 255, 255), size: int | None = None
) -> Image.Image:
    """Open a picture over a background.

    Args:
        picture: what to open.
        background: RGB, 0 to 255.
        size: side in pixels; None keeps the file's own (its longer side).

    Returns:
        A square RGB image.
    """
    with Image.open(picture.path) as image:
        drawn = image.convert("RGBA")
    side = max(drawn.size)  # two of Fluent's are not square: padded, not squashed
    canvas = Image.new("RGBA", (side, side), (*background, 255))
    # Composited before it is resized, so that no colour of transparent pixels bleeds into the edges.
    canvas.alpha_composite(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    flat = canvas.convert("RGB")
    return flat if size is None else flat.resize((size, size), Image.Resampling.BICUBIC)


def subcategory_task(root: Path, classes: int = 20) -> list[tuple[Emoji, int]]:
    """Which subcategory is an emoji of? A classification task of the largest subcategories.

    Flags are left out: they share one outline and are told apart by colour alone, so a colour histogram solves them.

    Args:
        root: the folder ``prepare().emoji``.
        classes: how many subcategories, the largest first; ties go by name.

    Returns:
        (emoji, label) ordered by code; labels number the chosen subcategories in alphabetical order.

    Raises:
        ValueError: ``classes`` is below 2 or more than there are.
        FileNotFoundError: the folder was not prepared.
    """
    emoji = [e for e in load(root) if e.category != "Flags"]
    counts = Counter(e.subcategory for e in emoji)
    if not 2 <= classes <= len(counts):
        raise ValueError(f"{classes} classes were asked for; expected 2 to {len(counts)}: choose within that range.")
    chosen = sorted(sorted(counts, key=lambda name: (-counts[name], name))[:classes])
    labels = {name: label for label, name in enumerate(chosen)}
    return [(e, labels[e.subcategory]) for e in emoji if e.subcategory in labels]


def test_codes(things: Sequence[Emoji], seed: int) -> set[str]:
    """Codes of two fifths of every subcategory's emoji (rounded down), drawn by the seed: those kept for a test."""
    rng = random.Random(seed)
    groups: dict[str, set[str]] = {}
    for e in things:
        groups.setdefault(e.subcategory, set()).add(e.code)
    out: set[str] = set()
    for name in sorted(groups):
        codes = sorted(groups[name])
        rng.shuffle(codes)
        out.update(codes[: len(codes) * 2 // 5])
    return out


test_codes.__test__ = False  # type: ignore[attr-defined]  # pytest: not a test, though its name begins like one


def extract(google: Path, twitter: Path, fluent: Path, root: Path) -> None:
    """Take the pictures that exist in all three styles out of the npm archives, with ``emoji.json`` for :func:`load`.

    Skin-tone variants are left out, and so is the category "Component" (bare skin-tone swatches).

    Args:
        google, twitter, fluent: the three ``.tgz`` archives.
        root: an existing folder that is written into.

    Raises:
        RuntimeError: no emoji exists in all three.
    """
    folders = {
        "noto": (google, "package/img/google/64/"),
        "twemoji": (twitter, "package/img/twitter/64/"),
        "fluent": (fluent, "package/assets/"),
    }
    entries = _base_emoji(google)
    for style, (archive, folder) in folders.items():
        found = _take(archive, folder, STYLES[style], set(entries), root / style)
        entries = {code: emoji for code, emoji in entries.items() if code in found}
    if not entries:
        raise RuntimeError("No emoji exists in all three archives; expected some 1,850: use the pinned packages.")
    for style, ending in STYLES.items():
        for path in (root / style).glob(f"*.{ending}"):
            if path.stem not in entries:
                path.unlink()
    document = [asdict(entries[code]) for code in sorted(entries)]
    (root / "emoji.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _base_emoji(archive: Path) -> dict[str, Emoji]:
    """Code to emoji, from the archive's ``emoji.json``. Its "image" is how all three packages name their files."""
    with tarfile.open(archive, "r:gz") as tar:
        file = tar.extractfile("package/emoji.json")
        assert file is not None
        entries = json.load(file)
    emoji = (
        Emoji(entry["image"].removesuffix(".png"), entry["name"], entry["category"], entry["subcategory"])
        for entry in entries
        if entry["category"] != "Component"
    )
    # Codes become file names: let nothing else through.
    return {e.code: e for e in emoji if re.fullmatch(r"[0-9a-f]+(-[0-9a-f]+)*", e.code)}


def _take(archive: Path, folder: str, ending: str, codes: set[str], target: Path) -> set[str]:
    """Write ``folder/CODE.ending`` of each wanted code to ``target``; returns the codes that were found."""
    target.mkdir()
    found = set()
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            code = member.name.removeprefix(folder).removesuffix(f".{ending}")
            if member.name != f"{folder}{code}.{ending}" or code not in codes:
                continue
            file = tar.extractfile(member)
            if file is not None:
                (target / f"{code}.{ending}").write_bytes(file.read())
                found.add(code)
    return found
