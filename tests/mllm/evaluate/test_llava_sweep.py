"""The sweep: shares of a gain on scores with known answers, times, and the whole of it in real processes."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from llava_integration.commands import COMMANDS
from llava_integration.evaluate.first_token import first_token
from llava_integration.evaluate.plot import accuracy_latency_plot
from llava_integration.evaluate.sweep import RowConfig, _Sweep, sweep
from llava_integration.models.assemble import load
from vst import cli
from vst.parsing import parse, run

pytest_plugins = ("lmms_kit", "training_kit")


ROOT = Path(__file__).parents[3]
MAYBE = type(None)
ROW = {
    "name": str, "kind": str, "split": (int, MAYBE), "accuracy": float, "accuracy_spread": (float, MAYBE),
    "tasks": dict, "majority": dict, "share": dict, "median_ms": float, "low_ms": float, "high_ms": float,
    "ratio": float, "ratio_low": float, "ratio_high": float, "ratio_sure_low": float, "ratio_sure_high": float,
    "repeats": int, "tower_ms": float, "first_token_ms": float, "tower_share": float, "tower_share_low": float,
    "tower_share_high": float, "prompt_tokens": int, "parameter_mb": float, "tower_parameter_mb": float,
    "peak_mb": (float, MAYBE),
}  # fmt: skip
SHARE = {
    "gain": float, "gain_error": (float, MAYBE), "share": (float, MAYBE), "share_error": (float, MAYBE),
    "noise": float, "seeds": int, "text": str,
}  # fmt: skip


def check_schema(results):
    """What plots, tables and recommendations may count on, no less and no more."""
    assert results.keys() == {"towers", "one", "score", "caption"}
    assert results["one"] in [row["name"] for row in results["towers"]]
    for row in results["towers"]:
        assert row.keys() == ROW.keys()
        for key, kind in ROW.items():
            assert isinstance(row[key], kind), (row["name"], key)
        assert row["kind"] in {"single", "full", "split", "control"}
        assert 0 <= row["accuracy"] <= 1
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["tasks"].keys() == row["share"].keys() == row["majority"].keys()
        for scores in row["tasks"].values():
            assert scores.keys() == next(iter(row["tasks"].values())).keys()  # the same seeds
            assert all(0 <= score <= 1 for score in scores.values())
        for share in row["share"].values():
            assert share.keys() == SHARE.keys()
            for key, kind in SHARE.items():
                assert isinstance(share[key], kind), (row["name"], key)


def test_a_row_of_splits_by_branch_is_handed_on_and_drawn(tmp_path):
    """As the sweep writes it for the process that evaluates."""
    words = ["evaluate", "--model", "m", "--out", "o", "--split", str({"clip": 1, "siglip": 3})]
    assert parse(COMMANDS, words)["evaluate"].split == {"clip": 1, "siglip": 3}
    rows = [
        {"name": name, "kind": "split", "split": split, "accuracy": 0.5, "ratio": ratio}
        for name, split, ratio in (("a", {"clip": 1, "siglip": 3}, 0.9), ("b", 3, 0.7), ("c", 1, 0.8))
    ]
    accuracy_latency_plot({"towers": rows}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_published_sweep_keeps_the_schema():
    path = ROOT / "docs" / "results" / "llava-sweep" / "results.json"
    check_schema(json.loads(path.read_text())["results"])


def test_the_tower_is_a_part_of_the_first_token(folder):
    model, processor = load(folder)
    # Longer by far than what they compute, so that the share is known: 0.2 of 0.2 + 0.3 seconds.
    model.model.vision_tower.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    model.model.language_model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
    found = first_token(model, processor, split=1, batch_size=2, repeats=3)
    assert found["tower_share"] == pytest.approx(0.4, abs=0.1)
    assert found["tower_ms"] >= 200
    assert found["first_token_ms"] >= 500
    assert model.model.vision_tower.split == 3  # left as it was
    assert 0 < found["tower_parameter_mb"] < found["parameter_mb"]
    longer = first_token(model, processor, split=1, question="What is this? " * 10, repeats=1)
    assert longer["prompt_tokens"] > found["prompt_tokens"]


@pytest.mark.parametrize(
    ("rows", "seeds", "message"),
    [
        ({"a": RowConfig("one", "x")}, [0], "exactly one of kind full"),
        ({"a": RowConfig("full", "x"), "b": RowConfig("vst", "x", 2)}, [0], "at least one row of kind one"),
        ({"a": RowConfig("full", "x"), "b": RowConfig("one", "x")}, [], "seeds is empty"),
    ],
)
def test_bad_sweeps_are_named(rows, seeds, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sweep(str(tmp_path / "run"), rows, seeds)
    assert not (tmp_path / "run").exists()


def test_the_script_knows_a_sweep_by_its_rows(tmp_path):
    def help_of(*words):
        done = subprocess.run(
            [sys.executable, str(ROOT / "eval" / "lmms.py"), *words, "--help"],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "share of the two-model gain" in help_of("--config", str(ROOT / "configs" / "llava" / "sweep.yaml"))
    assert "share of the two-model gain" not in help_of()


@pytest.mark.parametrize(("gpus", "how"), [(0, "one after another, each on one process"), (2, "2 at a time")])
def test_a_sweep_says_what_is_to_come_and_how(tmp_path, monkeypatch, capsys, gpus, how):
    """The paper's sweep: six towers, two stages, three seeds; a model that is there is not counted."""
    monkeypatch.chdir(ROOT)
    words = ["sweep", "--config", "configs/llava/sweep.yaml", "--out", str(tmp_path / "run"), "--gpus", str(gpus)]
    values = parse(COMMANDS, words)["sweep"]
    rows = {name: replace(row, model=str(tmp_path / Path(row.model).name)) for name, row in values["rows"].items()}

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_Sweep, "_call", stop)
    for left, models in ((36, 18), (34, 17)):
        with pytest.raises(KeyboardInterrupt):
            sweep(str(tmp_path / "run"), rows, values["seeds"], gpus=gpus, overwrite=left < 36)
        said = capsys.readouterr().out
        assert f"{left} trainings (of {models} models) and 18 evaluations to do, {how}" in said
        assert "several processes" in said
        (tmp_path / "clip-2").mkdir(exist_ok=True)
        (tmp_path / "clip-2" / "config.json").write_text("{}")


def test_rows_are_checked():
    with pytest.raises(ValueError, match="expected one of one, full, vst, control"):
        RowConfig("tree", "x")
    with pytest.raises(ValueError, match="names no split"):
        RowConfig("vst", "x")


@pytest.mark.slow
def test_a_sweep_trains_takes_resumes_and_is_recommended_from(kit, folder, questions, tmp_path, capfd):
    trained = tmp_path / "trained-{seed}"
    rows = {
        "model one": {"kind": "one", "model": str(folder), "split": 3},
        "full": {"kind": "full", "model": str(folder), "split": 1},
        "VST-1": {
            "kind": "vst", "split": 1, "model": str(trained),
            "train": [["--config", str(kit.yaml("x")), "--out", str(trained), "--trainer.seed", "{seed}",
                       "--batch_size", "4", "--trainer.per_device_train_batch_size", "4"]],
        },
        "missing": {"kind": "control", "model": str(tmp_path / "moved")},
    }  # fmt: skip
    values = {"out": str(tmp_path / "run"), "rows": rows, "tasks": ["vst_scenes"], "limit": 4, "repeats": 2}
    values |= {"data": str(questions), "seeds": [7]}
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(values))
    words = ["sweep", "--config", str(file)]
    with pytest.raises(SystemExit, match="holds no trained model for missing"):
        run(COMMANDS, words)
    assert not (tmp_path / "run" / "results.json").exists()
    assert (tmp_path / "trained-7" / "model.safetensors").is_file()
    done = tmp_path / "run" / "scores" / "model-one-7" / "results.json"
    before = done.stat().st_mtime_ns
    (tmp_path / "moved").symlink_to(folder)  # what was missing is there now
    capfd.readouterr()
    run(COMMANDS, [*words, "--resume"])
    said = capfd.readouterr().out
    assert done.stat().st_mtime_ns == before
    assert "model one, seed 7" not in said
    assert "missing, seed 7: evaluate" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    check_schema(results)
    assert [row["name"] for row in results["towers"]] == list(rows)
    assert {row["kind"] for row in results["towers"]} == {"single", "full", "split", "control"}
    for row in results["towers"]:
        assert row["tasks"]["vst_scenes"].keys() == {"7"}
        assert row["tower_share"] > 0
        assert row["ratio"] > 0
    assert (tmp_path / "run" / "curve.png").stat().st_size > 5000
    cli.main(["recommend", "--results", str(tmp_path / "run"), "--latency_ms", "100000"])
    assert capfd.readouterr().out.startswith("split 1\n")
