"""The depth that fits a budget, on rows made so that the answer is known."""

import json

import pytest

from vst import cli
from vst.measure.recommend import measured_rows, recommend


def rows(spread=None, **scores):
    """Full 100 ms, trunk 20 ms, branch 80 ms; splits 2, 6, 10 at 90, 60, 30 ms."""
    table = {
        "all in full": ("full", None, 100, 0.80),
        "trunk alone": ("single", None, 20, 0.50),
        "branch alone": ("single", None, 80, 0.70),
        "VST-2": ("split", 2, 90, 0.78),
        "VST-6": ("split", 6, 60, 0.75),
        "VST-10": ("split", 10, 30, 0.60),
    }
    return [
        {"name": name, "kind": kind, "split": split, "median_ms": ms, "ratio": ms / 100,
         "accuracy": scores.get(name.replace("-", ""), score), "accuracy_spread": spread}
        for name, (kind, split, ms, score) in table.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"latency_ms": 1000}, 2),
        ({"latency_ms": 90}, 2),
        ({"latency_ms": 89.9}, 6),
        ({"latency_ms": 30}, 10),
        ({"budget": "1.5x"}, 10),  # of the trunk's 20 ms
        ({"budget": "3"}, 6),
        ({"budget": "4.5X"}, 2),
        ({"budget": "0.6x", "of": "all in full"}, 6),
    ],
)
def test_the_best_within_the_budget(budget, expected):
    assert recommend(rows(), **budget).row["split"] == expected


def test_noise_makes_the_cheaper_one_win():
    assert recommend(rows(spread=0.02), latency_ms=100).row["split"] == 6  # 3 points, twice the spread is 4
    assert recommend(rows(spread=0.01), latency_ms=100).row["split"] == 2
    said = " ".join(recommend(rows(spread=0.02), latency_ms=100).reasons)
    assert "not distinguishable" in said
    assert "VST-2" in said


def test_it_says_when_one_model_is_enough():
    plain = " ".join(recommend(rows(), latency_ms=65).reasons)
    assert "one model" not in plain
    assert "Beyond the budget, VST-2 scores 78.0 %" in plain
    better = rows()
    better[1]["accuracy"] = 0.9
    assert "trunk alone scores 90.0 %" in " ".join(recommend(better, latency_ms=65).reasons)
    near = rows(spread=0.02)
    near[1]["accuracy"], near[1]["accuracy_spread"] = recommend(near, latency_ms=65).row["accuracy"] - 0.03, 0.02
    assert "one model is enough" in " ".join(recommend(near, latency_ms=65).reasons)  # three points, twice the spread


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Give one budget"),
        ({"budget": "1.2x", "latency_ms": 3}, "Give one budget"),
        ({"budget": "fast"}, "expected a factor"),
        ({"budget": "-1x"}, "expected a factor"),
        ({"budget": "1.2x", "of": "nobody"}, "expected one of all in full"),
        ({"latency_ms": -3}, "above 0"),
        ({"latency_ms": 3, "of": "trunk alone"}, "leave it out"),
        ({"budget": "1.2x"}, "cheapest measured one is VST-10 at 1.50x"),
    ],
)
def test_bad_budgets_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        recommend(rows(), **options)


def test_command_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"results": {"towers": rows()}}))
    cli.main(["recommend", "--results", str(tmp_path), "--latency-ms", "65"])
    out = capsys.readouterr().out
    assert out.startswith("split 6\n")
    cli.main(["recommend", "--results", str(tmp_path), "--budget", "1.5x"])
    assert capsys.readouterr().out.startswith("split 10\n")


def test_what_was_not_measured_is_not_recommended(tmp_path):
    with pytest.raises(FileNotFoundError, match="finished run"):
        measured_rows(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps({"results": [{"name": "VST-2", "kind": "split"}]}))
    with pytest.raises(ValueError, match="both scored and timed"):
        measured_rows(tmp_path)
    unscored = [row | ({"accuracy": None} if row["split"] == 2 else {}) for row in rows()]
    (tmp_path / "results.json").write_text(json.dumps({"results": {"towers": unscored}}))
    assert recommend(measured_rows(tmp_path), latency_ms=1000).row["split"] == 6
