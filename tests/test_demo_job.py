"""The demo's division of pictures and what it draws from results."""

import json

import numpy as np
import pytest
from PIL import Image

from vst.demo.job import DemoConfig, Division
from vst.report import accuracy_latency_plot, objective_rows, pca_maps, towers_rows


def results(seeds=2):
    def stitch(split, shift):
        agreement = {"error": 0.3 + shift, "channel_error": 0.5 + shift, "cosine": 0.7, "tokens": 64}
        return {
            "split": split,
            "seam": agreement,
            "final": agreement,
            "distance": 0.1,
            "branch_accuracy": 0.7 + shift,
            "accuracy": 0.8 + shift,
        }

    shared = {"ratio_low": 0.5, "ratio_high": 0.6, "median_ms": 20.0, "flops_ratio": 0.5}
    towers = [
        {"name": "all in full", "kind": "full", "split": None, "accuracy": 0.9, "ratio": 1.0, **shared},
        {"name": "a alone", "kind": "single", "split": None, "accuracy": 0.6, "ratio": 0.2, **shared},
        {
            "name": "VST-2",
            "kind": "split",
            "split": 2,
            "accuracy": 0.8,
            "accuracy_spread": 0.01,
            "ratio": 0.5,
            **shared,
        },
    ]
    fits = [
        {"seed": seed, "objective": objective, "splits": [stitch(2, 0.1 * seed)]}
        for seed in range(seeds)
        for objective in ("ridge", "ffm")
    ]
    models = [{"seed": seed, "accuracy": {"a alone": 0.6}} for seed in range(seeds)]
    return {"towers": towers, "fits": fits, "models": models, "caption": "a caption", "majority": 0.1}


def test_tables_hold_means_and_spreads():
    heads, rows = objective_rows(results())
    assert rows[0][:2] == ["2", "ridge"]
    assert rows[0][heads.index("final error")] == f"0.350 +- {np.std([0.3, 0.4], ddof=1):.3f}"
    assert rows[-1][0] == "a alone"
    assert rows[-1][-1] == "60.0 +- 0.0"
    _, towers = towers_rows(results())
    assert towers[2][:2] == ["VST-2", "80.0 +- 1.0"]
    _, single = objective_rows(results(seeds=1))
    assert single[0][2] == "0.300"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn_from_the_results(tmp_path, suffix):
    path = tmp_path / f"curve.{suffix}"
    accuracy_latency_plot(json.loads(json.dumps(results())), path)
    if suffix == "svg":
        text = path.read_text()
        assert "all in full" in text or "<path" in text
    else:
        assert np.asarray(Image.open(path)).std() > 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_pca_maps_show_the_leading_directions():
    """A map that is one direction plus noise is shown as that direction, up to sign."""
    rng = np.random.default_rng(0)
    wave = np.linspace(-1, 1, 64).reshape(1, 64, 1)
    own = wave * rng.normal(size=(1, 1, 12)) + 0.01 * rng.normal(size=(1, 64, 12))
    (shown,) = pca_maps([own])
    assert abs(np.corrcoef(shown[0, :, :, 0].ravel(), wave.ravel())[0, 1]) > 0.99


@pytest.mark.assets
@pytest.mark.parametrize("seed", [0, 1])
def test_test_emoji_are_seen_by_nobody_before(seed):
    from vst.demo import assets

    root = assets.prepare(quiet=True).emoji
    config = DemoConfig(pictures=10_000, probe_train=10_000, probe_test=10_000)
    division = Division.draw(root, config, seed)
    tests = {p.emoji.code for p in division.test}
    assert not tests & {p.emoji.code for p in division.fit}
    assert not tests & {p.emoji.code for p in division.train}
    assert set(division.label(division.train)) == set(division.label(division.test)) == set(range(20))
    assert 0.36 < len(division.test) / (len(division.test) + len(division.train)) < 0.42
    again, other = Division.draw(root, config, seed), Division.draw(root, config, seed + 1)
    assert again == division
    assert {p.emoji.code for p in other.test} != tests
