"""What is given to an evaluation and does not suit is told in one sentence, before anything is computed."""

import json
from pathlib import Path

import pytest

from llava_integration.answer.ask import Question
from llava_integration.answer.easy_vqa import conversations
from llava_integration.answer.scoring import correct, majority
from llava_integration.evaluate.lmms.evaluation import evaluate
from llava_integration.evaluate.lmms.generation import Decoding
from llava_integration.evaluate.lmms.questions import find, write
from llava_integration.evaluate.sweep import RowConfig, sweep
from vst.results.folders import read_json

GREEDY = {"max_new_tokens": 8, "eos": [2], "pad": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'; expected a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens is inf"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": True}, "num_beams is True"),
        ({"do_sample": "false"}, "do_sample is 'false'; expected true or false"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"until": 3}, "until is 3"),
        ({"until": {"a": 1}}, "until is {'a': 1}"),
    ],
)
def test_wishes_of_a_task(options, message):
    with pytest.raises(ValueError, match=message):
        Decoding.parse(options, **GREEDY)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (8, False, 1)),
        ({"max_new_tokens": "16", "num_beams": 2.0, "until": "x"}, (16, False, 2)),
        ({"temperature": 0.5, "num_beams": None}, (8, True, 1)),
        ({"temperature": 0, "do_sample": True}, (8, False, 1)),
        ({"do_sample": 1}, (8, True, 1)),
        ({"do_sample": None, "temperature": None}, (8, False, 1)),
    ],
)
def test_wishes_that_are_followed(options, expected):
    config = Decoding.parse(options, **GREEDY).config
    assert (config.max_new_tokens, config.do_sample, config.num_beams) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "vst_scenes"}, "tasks is 'vst_scenes', but must be a list"),
        ({"tasks": [3]}, "must be a list of names"),
        ({"limit": 2.5}, "limit is 2.5; expected a whole number"),
        ({"limit": True}, "limit is True"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"include": "nowhere"}, "no folder of task files nowhere"),
    ],
)
def test_options_of_an_evaluation(options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate("no model is read", **{"tasks": ["vst_scenes"], **options})


@pytest.mark.parametrize("facts", [{}, [], {"task": "vst_scenes", "count": 3}, {"task": "vst_labels", "count": "3"}])
def test_questions_of_something_else(facts, tmp_path, monkeypatch):
    (tmp_path / "vst_labels").mkdir()
    (tmp_path / "vst_labels" / "vst.json").write_text(json.dumps(facts))
    monkeypatch.setenv("VST_TASKS", str(tmp_path))
    for call in (lambda: find("vst_labels"), lambda: write(tmp_path, 3, ["vst_labels"])):
        with pytest.raises(ValueError, match="does not tell of questions of vst_labels; give another folder"):
            call()


@pytest.mark.parametrize("answer", ["", " ", "?", ".\nA cat"])
def test_a_question_that_expects_no_answer(answer):
    asked = [Question(Path("a.png"), "What?", "a cat", "what"), Question(Path("a.png"), "Which?", answer, "what")]
    for call in (lambda: correct(["", ""], asked), lambda: majority(asked)):
        with pytest.raises(ValueError, match=r"answer expected to 'Which\?' is .*saying nothing would be right"):
            call()


@pytest.mark.parametrize("row", [["What?", "red"], ["What?", "red", "1"], {"question": "What?"}, [" ", "red", 1], 7])
def test_a_damaged_list_of_questions(row, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "questions.json").write_text(json.dumps([["what color?", "red", 0], row]))
    with pytest.raises(ValueError, match="as question 2; expected a question, its answer and its picture's number"):
        conversations(tmp_path)


def test_advice_suits_whose_file_it_is(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"restore it, or move it away\.$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"; mend it\.$"):
        read_json(tmp_path / "a.json", "mend it")


ROWS = {"a": RowConfig("one", "a-{seed}"), "b": RowConfig("full", "b-{seed}")}
ONE = RowConfig("control", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 1]}, r"seeds is \[1, 1\], which names one twice"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["x", "x"]}, "which names one twice"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"gpus": -1}, "gpus is -1"),
        ({"rows": {**ROWS, "c": RowConfig("control", "{name}")}}, "'c' has '{name}', where only {seed} is filled in"),
        ({"rows": {**ROWS, "c": RowConfig("control", "c", train=[["--x", '{"a": 1}']])}}, "write other braces twice"),
        ({"rows": {**ROWS, "c": ONE}, "seeds": [1, 2]}, "one score many times; put {seed} into"),
        ({"rows": {**ROWS, "c d": ONE, "c-d": ONE}}, "'c d' and 'c-d' would share"),
    ],
)
def test_a_sweep_is_checked_before_it_trains(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(str(tmp_path / "run"), **{"rows": ROWS, "tasks": ["vst_scenes"], **options})
    assert not (tmp_path / "run").exists()
