"""easy-VQA as conversations and as questions, from a toy folder in its layout."""

import pytest
from PIL import Image
from questions_kit import EASY_VQA, turns_of

from llava_integration.answer import easy_vqa

pytest_plugins = ("questions_kit",)


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
