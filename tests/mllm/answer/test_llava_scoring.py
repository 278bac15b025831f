import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_integration.answer.ask import Question
from llava_integration.answer.scoring import correct, majority, normalise, paired_bootstrap, score
from llava_integration.demo.page import depth_rows, kind_rows, score_rows, write_page
from llava_integration.train.plots import depth_curve, loss_curve, running_mean


def question(answer, kind="colour", image="a.png"):
    return Question(Path(image), "What is it?", answer, kind)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Red.\n", "red"),
        ("\n\nThe  red circle!\nIt is round.", "red circle"),
        ("a", "a"),
        ("A.", "a"),
        ("An apple and the pear", "apple and pear"),
        ("theatre", "theatre"),
        ("3.5 . ", "3.5"),
        ("no, it is blue", "no, it is blue"),
        ("red\r\nblue", "red"),
        ("", ""),
        (" \n ", ""),
        ("?!", ""),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_correct_compares_normalised_answers():
    questions = [question("Red"), question("yes"), question("the box"), question("no")]
    right = correct(["red.", "Yes\nit is", "A box", "not"], questions)
    assert right.dtype == bool
    assert right.tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="3 answers to 4 questions"):
        correct(["a"] * 3, questions)


def test_no_constant_answer_by_kind_beats_the_majority():
    rng = random.Random(0)
    questions = [
        question(rng.choice("aabcd" if kind == "x" else "de"), kind) for kind in ("x", "y", "z") for _ in range(20)
    ]
    often, best = majority(questions)
    for constants in itertools.product("abcde", repeat=3):
        by_kind = dict(zip("xyz", constants, strict=True))
        assert correct([by_kind[q.kind] for q in questions], questions).sum() <= often.sum()
    assert correct([best[q.kind] for q in questions], questions).tolist() == often.tolist()


def test_majority_counts_normalised_answers_and_takes_the_first_of_equals():
    questions = [question("blue"), question("Red."), question("red"), question("no", "is"), question("yes", "is")]
    often, best = majority(questions)
    assert best == {"colour": "red", "is": "no"}
    assert often.tolist() == [False, True, True, True, False]


def clustered(rng, groups=40, size=6, gain=0.1, spread=0.3):
    """Two correctness vectors whose difference is ``gain`` in expectation and shared within groups."""
    shift = np.repeat(rng.choice([gain - spread, gain + spread], groups), size)
    worse = rng.random(groups * size) < 0.4
    better = rng.random(groups * size) < 0.4 + shift
    return better, worse, np.repeat(np.arange(groups), size)


def test_bootstrap_is_that_of_a_plain_loop():
    better, worse, groups = clustered(np.random.default_rng(1), groups=25)
    keep = np.random.default_rng(2).random(len(groups)) < 0.6  # groups of different sizes
    better, worse, groups = better[keep], worse[keep], groups[keep]
    rng, names, means = random.Random(3), sorted(set(groups.tolist())), []
    for _ in range(4000):
        differences = []
        for name in rng.choices(names, k=len(names)):
            of = groups == name
            differences += (better[of].astype(int) - worse[of].astype(int)).tolist()
        means.append(sum(differences) / len(differences))
    found = paired_bootstrap(better, worse, [Path(f"{g}.png") for g in groups])
    assert found.mean == pytest.approx(better.mean() - worse.mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.012)


def test_bootstrap_of_single_questions_is_the_normal_interval():
    rng = np.random.default_rng(4)
    better, worse = rng.random(4000) < 0.7, rng.random(4000) < 0.6
    difference = better.astype(float) - worse
    half = 1.96 * difference.std() / 4000**0.5
    found = paired_bootstrap(better, worse, range(4000))
    assert found.low == pytest.approx(found.mean - half, abs=0.05 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.05 * half)


def test_intervals_over_groups_cover_and_over_questions_do_not():
    rng = np.random.default_rng(5)
    by_group = by_question = 0
    for trial in range(200):
        better, worse, groups = clustered(rng)
        found = paired_bootstrap(better, worse, groups, resamples=400, seed=trial)
        by_group += found.low <= 0.1 <= found.high
        found = paired_bootstrap(better, worse, range(len(groups)), resamples=400, seed=trial)
        by_question += found.low <= 0.1 <= found.high
    assert 0.9 <= by_group / 200 <= 0.985
    assert by_question < by_group - 10


def test_bootstrap_edges():
    same = paired_bootstrap([True, False], [True, False], ["a", "b"])
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    better, worse, groups = clustered(np.random.default_rng(6))
    assert paired_bootstrap(better, worse, groups, seed=1) == paired_bootstrap(better, worse, groups, seed=1)
    assert paired_bootstrap(better, worse, groups, seed=1) != paired_bootstrap(better, worse, groups, seed=2)
    one = paired_bootstrap([True, True], [True, False], ["a", "a"])
    assert (one.mean, one.low, one.high) == (0.5, -1, 1)
    with pytest.raises(ValueError, match="2, 1 and 2 entries"):
        paired_bootstrap([True, True], [True], ["a", "b"])
    with pytest.raises(ValueError, match="0, 0 and 0 entries"):
        paired_bootstrap([], [], [])
    with pytest.raises(ValueError, match="resamples is 0"):
        paired_bootstrap([True], [True], ["a"], resamples=0)


def scored():
    questions = [
        *(question(a, "colour", f"{i % 3}.png") for i, a in enumerate(["red", "red", "blue", "red"])),
        *(question(a, "is", f"{i}.png") for i, a in enumerate(["yes", "no"])),
    ]
    return score(questions, ["red", "Red.", "blue", "green", "yes", "yes"], ["red", "red", "red", "red", "no", "no"])


def test_score_holds_all_numbers():
    found = scored()
    assert found["n"] == 6
    assert found["pictures"] == 3
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["majority"] == pytest.approx(4 / 6)
    assert found["blank"] == pytest.approx(4 / 6)
    assert found["over_majority"]["mean"] == pytest.approx(0)
    # all 27 draws of three pictures, with what each picture gains over the blanked answers
    gains, sizes = np.array([-1 + 1, -1, 1]), np.array([3, 2, 1])
    draws = np.array(list(itertools.product(range(3), repeat=3)))
    means = np.tile(gains[draws].sum(1) / sizes[draws].sum(1), 100)
    assert found["over_blank"]["low"] == pytest.approx(np.percentile(means, 2.5), abs=0.01)
    assert found["over_blank"]["high"] == pytest.approx(np.percentile(means, 97.5), abs=0.01)
    assert found["kinds"]["colour"] == {
        "n": 4,
        "accuracy": 0.75,
        "majority": 0.75,
        "majority_answer": "red",
        "blank": 0.75,
    }
    assert found["kinds"]["is"]["majority_answer"] == "yes"
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(ValueError, match="no questions"):
        score([], [], [])
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        score([question("a")] * 2, ["a", "a"], ["a"])


def test_running_mean_is_the_mean_of_the_window():
    values = np.random.default_rng(0).random(100)
    found = running_mean(values, share=0.1)
    for i in (0, 3, 50, 99):
        assert found[i] == pytest.approx(values[max(0, i - 5) : i + 6].mean())
    assert running_mean(np.array([2.0])).tolist() == [2.0]


DEPTHS = {"random": {"2": [0.7, 0.8], 6: [0.6, 0.6]}, "fixed": {6: [0.65]}, "majority": 0.5, "blank": 0.45}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plots_are_drawn(tmp_path, suffix):
    history = [
        {"stage": stage, "step": step, "loss": 3 / step, "learning_rate": 1e-3 / step}
        for stage in ("projector", "language model")
        for step in range(1, 30)
    ]
    loss_curve(history, tmp_path / f"loss.{suffix}")
    loss_curve(history[:1], tmp_path / f"one.{suffix}")
    depth_curve(DEPTHS, tmp_path / f"depth.{suffix}", "a caption")
    depth_curve({**DEPTHS, "fixed": {}, "blank": None}, tmp_path / f"bare.{suffix}")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{name}.{suffix}" for name in ("bare", "depth", "loss", "one")]
    if suffix == "png":
        assert all(np.asarray(Image.open(path)).std() > 5 for path in tmp_path.iterdir())
    else:
        assert all(path.read_text().rstrip().endswith("</svg>") for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="history is empty"):
        loss_curve([], tmp_path / "none.png")


def page_of(tmp_path, **sample):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "loss.png")
    seeds = [{"seed": seed, "datasets": {"scenes": scored()}} for seed in (0, 1)]
    results = {"caption": "a <caption>", "seeds": seeds, "depths": {"a & b": DEPTHS}}
    shown = {
        "image": Image.new("RGB", (500, 300)), "question": "Is <b> there?", "answer": "Yes.", "expected": "yes",
        "blank": "no", "dataset": "scenes", **sample,
    }  # fmt: skip
    path = write_page(tmp_path, results, [shown], {"loss & rate": tmp_path / "loss.png"})
    assert path == tmp_path / "index.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_whole_and_escaped(tmp_path):
    page = page_of(tmp_path, blank="<script>alert(1)</script>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "Is &lt;b&gt; there?" in page
    assert "a &lt;caption&gt;" in page
    assert 'alt="loss &amp; rate"' in page
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert "src=" in page
    assert all(part.startswith('"data:') for part in page.split("src=")[1:])


def test_a_card_says_in_words_whether_it_is_right(tmp_path):
    page = page_of(tmp_path)
    assert "✓ right" in page
    assert "✗ wrong" not in page
    page = page_of(tmp_path, answer="green")
    assert "✗ wrong" in page
    assert "✓ right" not in page


def test_page_needs_its_plots(tmp_path):
    results = {"caption": "", "seeds": []}
    with pytest.raises(FileNotFoundError):
        write_page(tmp_path, results, [], {"loss": tmp_path / "none.png"})
    with pytest.raises(ValueError, match=r"'\.gif'"):
        write_page(tmp_path, results, [], {"loss": tmp_path / "loss.gif"})
    without = write_page(tmp_path, {**results, "depths": {}}, [], {}).read_text(encoding="utf-8")
    assert "by split depth" not in without


def test_tables_hold_the_scores():
    other = scored() | {"accuracy": 0.5}
    other["kinds"] = {"colour": {**other["kinds"]["colour"], "accuracy": 0.25, "majority_answer": "blue"}}
    seeds = [{"seed": 3, "datasets": {"scenes": scored()}}, {"seed": 4, "datasets": {"scenes": other, "easy": other}}]
    heads, rows = score_rows(seeds)
    assert [row[:4] for row in rows] == [
        ["scenes", "3", "6", "66.7"],
        ["scenes", "4", "6", "50.0"],
        ["easy", "4", "6", "50.0"],
    ]
    assert rows[0][heads.index("over majority")].startswith("+0.0 (")
    _, kinds = kind_rows(seeds)
    assert kinds[0] == ["scenes", "colour", "4", "50.0", "75.0", "red / blue", "75.0"]
    assert kinds[1][:3] == ["scenes", "is", "2"]
    assert kinds[2][:2] == ["easy", "colour"]
    _, depths = depth_rows(DEPTHS)
    assert depths == [["2", f"75.0 +- {100 * np.std([0.7, 0.8], ddof=1):.1f}", ""], ["6", "60.0 +- 0.0", "65.0"]]
