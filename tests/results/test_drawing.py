"""Results are there before anything is drawn, and a picture that fails is named."""

import json
import math
from types import SimpleNamespace

import pytest

from llava_integration.evaluate import sweep as sweeps
from llava_integration.evaluate.plot import accuracy_latency_plot
from llava_integration.train.plots import depth_curve, loss_curve
from vst import cli
from vst.measure import benchmark as benchmarks
from vst.protocol import report
from vst.results.drawing import NotDrawn
from vst.results.folders import Run
from vst.trunk import command as trunks


def broken(*args, **options):
    raise KeyError("no fonts")


def results_of(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_a_benchmark_keeps_its_rows(tree_of, tmp_path, monkeypatch):
    config = benchmarks.BenchmarkConfig(repeats=1)
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "benchmark_plot", broken)
        with pytest.raises(NotDrawn, match=r"run/latency\.png could not be drawn \(KeyError: 'no fonts'\)"):
            benchmarks.benchmark(tree_of(), config, tmp_path / "run", show_progress=False)
    rows = results_of(tmp_path / "run")
    assert len(rows) == 5  # two models alone, both in full, two splits
    assert (tmp_path / "run" / "latency.csv").is_file()
    benchmarks.benchmark(tree_of(), config, tmp_path / "run", resume=True, show_progress=False)
    assert results_of(tmp_path / "run") == rows
    assert (tmp_path / "run" / "latency.png").is_file()


def test_a_comparison_of_trunks_keeps_its_rows(tiny, picture_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trunks, "trunk_plot", broken)
    words = ["trunk", "--models", json.dumps([tiny("dinov2"), tiny("clip", 48, seed=1)]), "--compare.grid", "4"]
    with pytest.raises(SystemExit, match=r"NotDrawn: .*trunk\.png could not be drawn"):
        cli.main([*words, "--images", str(picture_folder), "--compare.repeats", "1", "--out", str(tmp_path / "run")])
    assert results_of(tmp_path / "run")["rows"]


def test_a_sweep_keeps_its_results_and_draws_them_when_called_again(tmp_path, monkeypatch):
    tower = {"name": "VST-1", "kind": "split", "split": 1, "accuracy": 0.5, "ratio": 0.9}
    stub = SimpleNamespace(scores=lambda gpus: None, times=lambda: None, results=lambda: {"towers": [tower]})
    monkeypatch.setattr(sweeps, "_Sweep", lambda *_: stub)
    monkeypatch.setattr(sweeps, "show", lambda _: None)
    rows = {kind: sweeps.RowConfig(kind, str(tmp_path / kind)) for kind in ("one", "full")}
    with monkeypatch.context() as patch:
        patch.setattr(sweeps, "accuracy_latency_plot", broken)
        with pytest.raises(NotDrawn, match=r"curve\.png could not be drawn"):
            sweeps.sweep(str(tmp_path / "run"), rows)
    assert results_of(tmp_path / "run") == {"towers": [tower]}
    sweeps.sweep(str(tmp_path / "run"), rows, resume=True)
    assert (tmp_path / "run" / "curve.png").is_file()


def test_a_protocol_keeps_its_rows(tmp_path, monkeypatch):
    run = Run(tmp_path / "run", {})
    run.add(row := {"kind": "cka", "task": "t", "seed": 0, "source": "a", "target": "b"}, "t")
    for name in ("score_tables", "measure_tables"):
        monkeypatch.setattr(report, name, lambda rows: [])
    for name in ("cost_table", "saving"):
        monkeypatch.setattr(report, name, lambda *_: SimpleNamespace(markdown=lambda: ""))
    monkeypatch.setattr(report.rules, "findings", lambda *_: [])
    monkeypatch.setattr(report, "cka_picture", broken)
    run.path("axes.json").write_text("{}")
    with pytest.raises(NotDrawn, match=r"cka-t\.png could not be drawn"):
        report.write_report(run, SimpleNamespace(tolerated_drop=0.0), {})
    assert results_of(tmp_path / "run")["rows"] == [row]


@pytest.mark.parametrize(
    "losses", [[1.0], [2.0, 2.0, 2.0], [1.0, math.nan, 3.0], [math.nan] * 3, [None, 1.0]],
    ids=["one", "equal", "a hole", "none is a number", "null"],
)  # fmt: skip
def test_odd_losses_are_drawn(tmp_path, losses):
    rows = [{"stage": "s", "step": i + 1, "loss": loss, "learning_rate": 0.0} for i, loss in enumerate(losses)]
    loss_curve(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5], [math.nan], [math.nan, 1.0]])
def test_odd_scores_are_drawn(tmp_path, scores):
    found = {"random": {"1": scores}, "fixed": {}, "majority": scores[0], "blank": None}
    depth_curve(found, tmp_path / "depth.png")
    tower = {"name": "a", "kind": "single", "split": None, "accuracy": scores[0], "ratio": scores[-1]}
    accuracy_latency_plot({"towers": [tower, {**tower, "kind": "split", "split": 1}]}, tmp_path / "curve.png")
    assert (tmp_path / "depth.png").stat().st_size > 1000
    assert (tmp_path / "curve.png").stat().st_size > 1000
