"""Emoji drawn by three hands: what is taken from the archives, opened, and made a task of."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vst.demo import emoji


def png(colour: tuple[int, ...], size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, kind)
    return buffer.getvalue()


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def entry(code: str, subcategory: str, category: str = "Objects") -> dict[str, str]:
    return {"image": f"{code}.png", "name": code.upper(), "category": category, "subcategory": subcategory, "x": "y"}


class TestEmoji:
    def test_extract(self, tmp_path):
        entries = [entry("2764-fe0f", "heart"), entry("1f600", "face"), entry("1f3fb", "tone", "Component")]
        entries += [entry("1f601", "face"), entry("../evil", "face")]
        listing = json.dumps(entries).encode()
        codes = ["2764-fe0f", "1f600", "1f3fb", "../evil", "1f44d-1f3fb"]
        google = {"package/emoji.json": listing} | {f"package/img/google/64/{c}.png": png((0,) * 4) for c in codes}
        google["package/img/google/64/1f601.png"] = png((0,) * 4)
        google["package/img/google/sheets/1f600.png"] = b"a sheet"
        twitter = {f"package/img/twitter/64/{c}.png": png((9,) * 4) for c in codes}
        fluent = {f"package/assets/{c}.webp": png((200,) * 4, kind="WEBP") for c in codes}
        archives = [tgz(tmp_path / n, f) for n, f in (("g", google), ("t", twitter), ("f", fluent))]
        target = tmp_path / "emoji"
        target.mkdir()
        emoji.extract(*archives, target)
        assert [vars(e) for e in emoji.load(target)] == [
            {"code": "1f600", "name": "1F600", "category": "Objects", "subcategory": "face"},
            {"code": "2764-fe0f", "name": "2764-FE0F", "category": "Objects", "subcategory": "heart"},
        ]
        files = sorted(str(p.relative_to(target)) for p in target.rglob("*.*"))
        assert files == sorted(
            ["emoji.json", *(f"{s}/{c}.{e}" for s, e in emoji.STYLES.items() for c in ("1f600", "2764-fe0f"))]
        )
        assert (target / "noto/1f600.png").read_bytes() == google["package/img/google/64/1f600.png"]
        found = emoji.pictures(target, ("fluent", "noto"))
        assert [(p.emoji.code, p.style) for p in found] == [
            (code, style) for code in ("1f600", "2764-fe0f") for style in ("fluent", "noto")
        ]
        assert all(p.path.is_file() for p in found)

    def test_nothing_in_common(self, tmp_path):
        google = tgz(tmp_path / "g", {"package/emoji.json": json.dumps([entry("1f600", "face")]).encode()})
        (tmp_path / "emoji").mkdir()
        with pytest.raises(RuntimeError, match="No emoji exists in all three"):
            emoji.extract(google, google, google, tmp_path / "emoji")

    def test_open_picture(self, tmp_path):
        (tmp_path / "p.png").write_bytes(png((200, 100, 0, 51), (4, 6)))  # 51 / 255 = 0.2
        picture = emoji.Picture(emoji.Emoji("1", "n", "c", "s"), "noto", tmp_path / "p.png")
        image = emoji.open_picture(picture, background=(100, 50, 50))
        assert (image.mode, image.size) == ("RGB", (6, 6))
        assert image.getpixel((3, 3)) == (120, 60, 40)
        assert image.getpixel((0, 3)) == (100, 50, 50)  # padded, not stretched
        assert emoji.open_picture(picture, size=12).size == (12, 12)
        assert emoji.open_picture(picture).getpixel((0, 0)) == (255, 255, 255)

    def test_subcategory_task(self, tmp_path):
        counts = {"z": 3, "b": 2, "a": 2, "c": 2, "d": 1}
        entries = [emoji.Emoji(f"{s}{i}", "n", "Objects", s) for s, n in counts.items() for i in range(n)]
        entries += [emoji.Emoji(f"f{i}", "n", "Flags", "country-flag") for i in range(9)]
        (tmp_path / "emoji.json").write_text(json.dumps([vars(e) for e in entries]))
        task = emoji.subcategory_task(tmp_path, classes=3)
        assert {(e.subcategory, label) for e, label in task} == {("a", 0), ("b", 1), ("z", 2)}
        assert len(task) == 7
        with pytest.raises(ValueError, match="expected 2 to 5"):
            emoji.subcategory_task(tmp_path, classes=6)

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="prepare"):
            emoji.load(tmp_path)
        with pytest.raises(ValueError, match=r"\['apple'\].*noto"):
            emoji.pictures(tmp_path, ("noto", "apple"))
