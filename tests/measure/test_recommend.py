"""The depth that fits a budget, on rows made so that the answer is known."""

import json
import re

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
    better[1]["accuracy"] = 0.5
    better.insert(3, {**better[1], "name": "trunk tuned", "kind": "tuned", "accuracy": 0.9})
    assert "trunk tuned scores 90.0 % at" in " ".join(recommend(better, latency_ms=65).reasons)
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
    with pytest.warns(UserWarning, match=r"results\.json: 'VST-2' has no accuracy: left out of the choice\."):
        found = measured_rows(tmp_path)
    assert recommend(found, latency_ms=1000).row["split"] == 6


def noisy(name, ratio, low, high, flops, ms=None):
    return {
        "name": name, "kind": "split" if name.startswith("VST") else "single", "median_ms": ms or 100 * ratio,
        "split": int(name[4:]) if name.startswith("VST") else None, "ratio": ratio, "ratio_sure_low": low,
        "ratio_sure_high": high, "low_ms": 100 * low, "high_ms": 100 * high, "flops_ratio": flops,
        "accuracy": 0.9 - 0.01 * int(name[4:] if name.startswith("VST") else 0), "accuracy_spread": None,
    }  # fmt: skip


def said(found):
    return " ".join(reason for reason in found.reasons if reason.startswith("Warning"))


def test_a_noisy_row_is_not_recommended_without_a_warning():
    """0.36 of all in full with the interval 0.17 to 0.44, where FLOPs say 0.20: a busy machine."""
    one, deep = noisy("trunk alone", 0.186, 0.18, 0.19, 0.105), noisy("VST-10", 0.21, 0.2, 0.22, 0.13)
    found = recommend([one, noisy("VST-6", 0.36, 0.17, 0.44, 0.20), deep], budget="2x")
    assert found.row["split"] == 6
    assert "0.89x .. 2.44x crosses the budget; VST-10 surely fits" in said(found)
    quiet = recommend([one, noisy("VST-6", 0.36, 0.355, 0.359, 0.20), deep], budget="2x")
    assert said(quiet) == ""
    slow = recommend([one, noisy("VST-6", 0.36, 0.355, 0.359, 0.10), deep], budget="2x")
    assert "takes 1.94x over trunk alone where its FLOPs say 0.95x" in said(slow)
    fast = recommend([one, noisy("VST-6", 0.2, 0.19, 0.21, 0.20), deep], budget="2x")
    assert "takes 1.08x over trunk alone where its FLOPs say 1.90x" in said(fast)


def test_pairs_of_times_give_the_interval_where_they_are_there():
    made = [noisy("trunk alone", 0.2, 0.1, 0.3, 0.2), noisy("VST-6", 0.36, 0.2, 0.6, 0.36)]
    assert "crosses the budget" in said(recommend(made, budget="2x"))
    for row, ratio in zip(made, (1.0, 1.8), strict=True):
        row |= {"trunk_ratio": ratio, "trunk_ratio_sure_low": ratio - 0.1, "trunk_ratio_sure_high": ratio + 0.1}
    assert said(recommend(made, budget="2x")) == ""
    assert "1.70x .. 1.90x crosses the budget; no measured split surely fits" in said(recommend(made, budget="1.85x"))


def test_milliseconds_are_held_against_their_quartiles_and_flops():
    made = [noisy("VST-6", 0.5, 0.4, 0.7, 0.5), noisy("VST-10", 0.3, 0.2, 0.4, 0.3)]
    assert "40 ms .. 70 ms crosses the budget; VST-10 surely fits" in said(recommend(made, latency_ms=60))
    assert said(recommend(made, latency_ms=71)) == ""
    found = recommend(made, latency_ms=45)
    assert found.row["split"] == 10
    assert "VST-6 may fit as well (40 ms .. 70 ms)" in said(found)
    made[0]["flops_ratio"] = 0.2
    assert "takes 50 ms where its FLOPs say 20 ms" in said(recommend(made, latency_ms=71))


def test_rows_of_a_latency_run_are_read(tmp_path, capsys, tiny):
    """Without scores the shallowest split that fits is chosen; batch sizes and dtypes are kept apart."""
    words = [
        "latency",
        f"--tree.trunk={tiny('dinov2')}",
        f"--tree.branches=[{tiny('clip', 32)}]",
        "--tree.splits=[1,3]",
    ]
    cli.main([*words, "--device", "cpu", "--batch_size", "[1,2]", "--repeats", "2", "--out", str(tmp_path / "run")])
    capsys.readouterr()
    with pytest.raises(ValueError, match="measured batch_size 1, 2: choose one of them by --batch_size"):
        measured_rows(tmp_path / "run")
    with pytest.raises(ValueError, match="batch_size is 3; the run measured 1, 2"):
        measured_rows(tmp_path / "run", batch_size=3)
    with pytest.raises(ValueError, match="the run has none by name"):
        measured_rows(tmp_path / "run", "scenes", batch_size=2)
    found = measured_rows(tmp_path / "run", batch_size=2)
    assert {row["batch_size"] for row in found} == {2}
    times = {row["split"]: row["median_ms"] for row in found if row["kind"] == "split"}
    assert recommend(found, latency_ms=1e9).row["split"] == max(times, key=times.get)
    cli.main(["recommend", "--results", str(tmp_path / "run"), "--latency-ms", "1e9", "--batch_size", "2"])
    out = capsys.readouterr().out
    assert "No scores were measured" in out


def test_the_shallowest_that_fits_is_chosen_without_scores():
    made = [{k: v for k, v in row.items() if k != "accuracy"} for row in rows()]
    assert [recommend(made, latency_ms=ms).row["split"] for ms in (30, 60, 89, 90, 1000)] == [10, 6, 6, 2, 2]
    with pytest.raises(ValueError, match="No split fits 29 ms"):
        recommend(made, latency_ms=29)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda stored: "", "no valid JSON"),
        (lambda stored: json.dumps(stored)[:-9], "no valid JSON"),
        (lambda stored: [], "it holds no results"),
        (lambda stored: {"config": {}}, "it holds no results"),
        (lambda stored: {"results": None}, "results is None; expected a mapping"),
        (lambda stored: {"results": {"tasks": {}}}, "it lacks 'towers'"),
        (lambda stored: {"results": {"towers": "none"}}, "expected a list"),
        (lambda stored: {"results": {"towers": [3]}}, "expected a mapping"),
        (lambda stored: {"results": {"towers": []}}, "no splits"),
        (("median_ms", "fast"), "median_ms of VST-2 is 'fast'; expected a finite number"),
        (("median_ms", -1), "median_ms of VST-2 is -1"),
        (("ratio", 0), "ratio of VST-2 is 0; expected a number above 0"),
        (("ratio", float("nan")), "ratio of VST-2 is nan; expected a finite number"),
        (("accuracy", 55.5), "accuracy of VST-2 is 55.5; expected 0 to 1"),
        (("accuracy", True), "accuracy of VST-2 is True; expected a finite number"),
        (("accuracy_spread", "small"), "accuracy_spread of VST-2 is 'small'"),
        (("flops_ratio", "half"), "flops_ratio of VST-2 is 'half'"),
        (("tasks", {"scenes": [0.5]}), "tasks"),
        (("split", "two"), "split of VST-2 is 'two'"),
        (("name", "VST-6"), "'VST-6' more than once"),
    ],
)
def test_results_that_are_not_as_they_were_written(tmp_path, change, said):
    """One sentence names the file; the same budget on the file as it was chooses split 6."""
    path, stored = tmp_path / "results.json", {"results": {"towers": rows()}}
    path.write_text(json.dumps(stored))
    assert recommend(measured_rows(tmp_path), latency_ms=65).row["split"] == 6
    if isinstance(change, tuple):
        stored["results"]["towers"][3][change[0]] = change[1]
        path.write_text(json.dumps(stored))
    else:
        text = change(stored)
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        measured_rows(tmp_path)
    assert str(error.value).startswith(str(path))
    assert str(error.value).endswith("give the folder of another finished run.")
    assert "\n" not in str(error.value)


def bare(**changes):
    rows = {
        "clip": {"kind": "single", "split": None, "accuracy": 0.7, "median_ms": 50.0, "ratio": 0.5},
        "VST-2": {"kind": "split", "split": 2, "accuracy": 0.9, "median_ms": 80.0, "ratio": 0.8},
        "VST-6": {"kind": "split", "split": 6, "accuracy": 0.8, "median_ms": 60.0, "ratio": 0.6},
    }
    return [{"name": name, **row, **changes.get(name.replace("-", "_"), {})} for name, row in rows.items()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"VST_6": {"ratio": float("nan")}}, "ratio of VST-6 is nan"),
        ({"clip": {"ratio": 0.0}}, "ratio of clip is 0"),
        ({"VST_2": {"median_ms": -1}}, "median_ms of VST-2 is -1"),
        ({"VST_2": {"median_ms": "80"}}, "median_ms of VST-2 is '80'"),
        ({"VST_2": {"accuracy": float("nan")}}, "accuracy of VST-2 is nan"),
        ({"VST_2": {"accuracy": None}}, "VST-2 of the splits have no score, others do"),
        ({"VST_2": {"kind": "full"}, "VST_6": {"kind": "full"}}, "No split was measured"),
    ],
)
def test_tables_that_no_choice_can_rest_on_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recommend(bare(**changes), budget="2x")


def test_intervals_that_were_not_told_are_the_times_themselves():
    unknown = {"ratio_sure_low": None, "ratio_sure_high": None}
    rows = bare(clip=unknown, VST_2=unknown, VST_6=unknown)
    assert recommend(rows, budget="1.7x").reasons == recommend(bare(), budget="1.7x").reasons
