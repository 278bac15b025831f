"""Every field of the configs of a run refuses wrong values in one sentence, from Python and from files."""

import dataclasses

import pytest
from messages_kit import NAN, refused

from vst import FitConfig, TuneConfig, cli
from vst.demo.config import DemoConfig
from vst.measure.benchmark import BenchmarkConfig
from vst.protocol import ProtocolConfig, TaskConfig, TrainConfig
from vst.trunk.compare import TrunkConfig

PROTOCOL = {"models": {"a": "x", "b": "y"}, "directions": ["a>b"], "tasks": {"t": TaskConfig("emoji")}, "depths": [1]}
CONFIGS = [
    (FitConfig, {}, {
        "lr": [NAN, -1, 0, "x", True, 1e300], "epochs": [-1, 0, 1.5, True, "3"], "batch_size": [0, -4], "limit": [0],
        "workers": [-1], "weight_decay": [NAN, -1], "penalty": [NAN, -1], "warmup": [NAN, 1, -0.1], "cache": [3, ""],
        "cache_limit_gb": [NAN, 0], "deepspeed": [1, ""], "checkpointing": ["no"], "objective": [["ffm"], "x"],
        "match": [None], "start": [1], "seed": ["a", None, 0.5, 10**30], "save_every": [0], "heldout": [0],
        "calibration": [0], "precision": [None, "fp16"], "picture_mb": [0, NAN, "many"],
        "hints": [-1, 0.5, "x"], "beyond": ["no"], "augment": ["no"], "tune": [3, {"trunk": "x"}],
    }),
    (TuneConfig, {}, {
        "trunk": ["norms", None], "tails": ["x", 1], "rank": [0, 1.5], "alpha": [0, NAN, "x"], "matrices": ["qkv"],
        "lr": [0, NAN], "own": [-1, NAN],
    }),
    (DemoConfig, {}, {
        "trunk": [["clip"], "x"], "splits": [[], [0], [2, 2], [13], 3], "grid": [0], "pictures": [0, "all"],
        "stitch": ["x", 3], "objectives": [["x"], [], "ridge"], "seeds": [[], ["a"], [1, 1]], "batch_size": [0],
        "repeats": [0], "heldout": [1], "fit": [3], "probe_train": [0], "probe_test": [0],
        "recipes": [3, {"a": 3}, {"a": {"lr": -1}}, {"a": {"seed": 1}}],
    }),
    (TrainConfig, {}, {
        "rates": [[NAN], [], 0.1, [0]], "trial_steps": [0], "trial_pictures": [0], "batch_size": [0], "warmup": [NAN],
        "weight_decay": [-1], "penalty": [NAN], "patience": [0], "lfm_epochs": ["5", -1], "ffm_epochs": [0],
        "tlt_epochs": [0], "head_epochs": [0], "calibration": [0],
    }),
    (TaskConfig, {"source": "emoji"}, {
        "train": [0, "a"], "validation": [0], "test": [0.5], "options": [[1]], "source": [3],
    }),
    (ProtocolConfig, PROTOCOL, {
        "models": [["a"], {"a": 3}, {}], "directions": ["a>b", ["a>c"], []], "depths": [[0], [1.5], 3],
        "grid": [0, "8"], "mask_size": [0], "cut": ["pad"], "cka_depths": [[-1]], "cka_pictures": [0],
        "cache_limit_gb": [NAN], "cache": [1], "tolerated_drop": [NAN, 2], "seeds": [["a"], []],
        "families": [[3], ["x"]], "objectives": [[3], ["x"]], "train": [{}], "tasks": [{"t": 3}, []],
        "precision": ["fp16"], "pretrained": ["no", 1], "picture_mb": [0, NAN],
    }),
    (TrunkConfig, {}, {
        "splits": [[], [0], "6"], "grid": [0, 10**6], "stitch": [3, "x"], "cut": ["x"], "seed": ["a"], "pictures": [1],
        "heldout": [0], "repeats": [-1], "batch_size": [0], "picture_mb": [0, "many"],
    }),
    (BenchmarkConfig, {}, {
        "batch_sizes": [[0], 1, [], [10**30]], "dtypes": [["x"], "float32"], "repeats": [0, 1.5], "device": [3],
        "execution": ["x"],
    }),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "base", "wrong"), CONFIGS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_field_of_a_run_is_checked_where_it_is_read(kind, base, wrong):
    assert set(wrong) == {f.name for f in dataclasses.fields(kind)}
    kind(**base)
    for name, values in wrong.items():
        for value in values:
            refused(lambda name=name, value=value: kind(**{**base, name: value}))


@pytest.mark.parametrize(
    ("command", "text", "words"),
    [
        ("fit", "fit: {epochs: -3}", "epochs is -3"),
        ("fit", "fit: {lr: .nan}", "lr is nan"),
        ("fit", "fit: {batch_size: 0}", "batch_size is 0"),
        ("demo", "demo: {pictures: 0}", "pictures is 0"),
        ("demo", "demo: {fit: {warmup: 2}}", "warmup"),
        ("demo", "demo: {stitch: mine}", "import the module"),
        ("protocol", "protocol: {depths: [0]}", "depths [0]"),
        ("protocol", "protocol: {train: {rates: [.nan]}}", "rates[0] is nan"),
    ],
)
def test_a_file_of_a_run_is_refused_before_anything_is_done(tmp_path, monkeypatch, command, text, words):
    whole = {
        "fit": "\ntree: {trunk: a, branches: [b], splits: [1]}\nimages: nowhere",
        "protocol": "\nprotocol: {models: {a: x, b: y}, directions: [a>b], depths: [1], tasks: {t: {source: emoji}}}",
    }
    (tmp_path / "whole.yaml").write_text(whole.get(command, ""))
    (tmp_path / "wrong.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    files = [word for name in ("whole", "wrong") for word in ("--config", f"{name}.yaml")]
    files = files if (tmp_path / "whole.yaml").read_text() else files[2:]
    with pytest.raises(SystemExit) as stop:
        cli.main([command, *files, "--out", "out"])
    assert words in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()
