"""The demo's pictures, and what it draws from its rows, on rows made so that the answers are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vst.demo.config import DemoConfig
from vst.demo.curve import share_plot
from vst.demo.division import SCENES, SUBCATEGORIES, TEST_STYLE, Division, TaskData
from vst.demo.page import write_page
from vst.demo.results import demo_results, pack, unpack
from vst.demo.tables import (
    ahead_rows,
    cost_rows,
    demo_markdown,
    detail_rows,
    error_rows,
    fit_rows,
    notes,
    score_rows,
    scores_line,
    show_results,
)
from vst.fit.config import FitConfig
from vst.fit.tuning import TuneConfig
from vst.measure.latency import ALL_IN_FULL
from vst.measure.recommend import measured_rows, recommend
from vst.results.feature_maps import pca_maps
from vst.results.folders import Run, read_json, write_json
from vst.results.tables import markdown
from vst.tree.encoder import VSTEncoder

ROOT = Path(__file__).parents[2]
RIGHT = {"clip alone": 0.6, "dinov2 alone": 0.3, ALL_IN_FULL: 0.8}
TREES = {"ridge": {2: 0.74, 6: 0.66}, "ffm": {2: 0.78, 6: 0.7}}
PICTURES = 200


def counts(kind, share):
    """Of 200 pictures of two classes, the first share of which is right (in masks: of 64 pixels each)."""
    wanted = torch.arange(PICTURES) % 2
    given = torch.where(torch.arange(PICTURES) < share * PICTURES, wanted, 1 - wanted)
    out = np.zeros((PICTURES, 3, 2), int)
    for i in range(PICTURES):
        out[i, 1, wanted[i]] = out[i, 2, given[i]] = 1
        out[i, 0, wanted[i]] = int(wanted[i] == given[i])
    return out * (64 if kind == "segmentation" else 1)


def tower(share, flat=0.5):
    """The scenes tell towers apart; the subcategories do not."""
    hits = share / (2 - share)  # IoU of two classes that are confused evenly
    masks = np.zeros((8, 64, 64), int)
    return {
        SCENES: {"score": hits, "counts": pack(counts("segmentation", share), "int16"), "masks": pack(masks, "uint8")},
        SUBCATEGORIES: {"score": flat, "counts": pack(counts("classification", flat), "int16")},
    }


def report(split, shift):
    agreement = {"error": 0.3 + shift, "channel_error": 0.5 + shift, "cosine": 0.7, "tokens": 64}
    return {"split": split, "seam": agreement, "final": agreement, "distance": 0.1}


def rows(seeds=(0, 1)):
    out = []
    for seed in seeds:
        towers = {name: tower(share) for name, share in RIGHT.items()}
        out.append({"seed": seed, "objective": None, "towers": towers, "majority": {SCENES: 0.2, SUBCATEGORIES: 0.1}})
        for objective, at in TREES.items():
            towers = {f"VST-{split}": tower(share) for split, share in at.items()}
            reports = [report(split, 0.1 * seed) for split in at]
            out.append({"seed": seed, "objective": objective, "towers": towers, "reports": reports, "seconds": {}})
    times = {ALL_IN_FULL: (1.0, 1.25), "clip alone": (0.8, 1.0), "dinov2 alone": (0.2, 0.25), "VST-2": (0.96, 1.2),
             "VST-6": (0.88, 1.1)}  # fmt: skip
    timed = []
    for name, (ratio, trunk) in times.items():
        kind = "full" if name == ALL_IN_FULL else "single" if "alone" in name else "split"
        sure = {"ratio_sure_low": ratio - 0.01, "ratio_sure_high": ratio + 0.01,
                "trunk_ratio_sure_low": trunk - 0.01, "trunk_ratio_sure_high": trunk + 0.01}  # fmt: skip
        split = int(name[4:]) if kind == "split" else None
        timed.append({"name": name, "kind": kind, "split": split, "ratio": ratio, "trunk_ratio": trunk,
                      "flops_ratio": ratio, "median_ms": 100 * ratio, **sure})  # fmt: skip
    return [*out, {"rows": timed, "batch_size": 8, "device": "cpu"}]


@pytest.fixture
def results(tiny):
    tree = VSTEncoder.plan(tiny("clip", 48, 12), {"dinov2": tiny("dinov2", 32, 12)}, [2, 6])
    config = DemoConfig(splits=[2, 6], seeds=[0, 1], probe_test=PICTURES)
    found = demo_results(rows(), config, tree, "ffm")
    return json.loads(json.dumps(found))


def iou(share):
    return share / (2 - share)


def test_shares_and_costs_are_told_of_every_tower(results):
    towers = {r["name"]: r for r in results["towers"]}
    assert list(towers) == [ALL_IN_FULL, "clip alone", "dinov2 alone", "VST-2", "VST-2, ridge", "VST-6", "VST-6, ridge"]
    assert results["better"] == {SCENES: "clip alone", SUBCATEGORIES: "clip alone"}
    gain = iou(0.8) - iou(0.6)
    for name, share in (("VST-2", 0.78), ("VST-6, ridge", 0.66), (ALL_IN_FULL, 0.8), ("clip alone", 0.6)):
        found = towers[name]["share"][SCENES]
        assert found["gain"] == pytest.approx(gain, abs=1e-6)
        assert found["share"] == pytest.approx((iou(share) - iou(0.6)) / gain, abs=1e-6)
        assert found["low"] <= found["share"] <= found["high"]
        assert towers[name]["share"][SUBCATEGORIES]["share"] is None
    assert [towers[n]["extra_flops"] for n in (ALL_IN_FULL, "clip alone", "VST-2")] == pytest.approx([1, 0, 0.8])
    assert towers["VST-2"]["extra_blocks"] == pytest.approx(9 / 11)
    assert towers["VST-2"]["accuracy"] == pytest.approx((iou(0.78) + 0.5) / 2)
    assert towers["VST-2"]["final_error"] == pytest.approx(0.35)


def test_tables_hold_means_spreads_and_intervals(results, capsys):
    heads, cells = score_rows(results)
    by_name = {line[0]: dict(zip(heads, line, strict=True)) for line in cells}
    assert by_name["VST-2"]["scenes, mIoU %"] == f"{100 * iou(0.78):.1f} +- 0.0"
    assert cells[0][2].startswith(f"gain {100 * (iou(0.8) - iou(0.6)):+.1f} (")
    assert cells[0][4].endswith("not distinguishable from zero")
    assert [line[4] for line in cells[1:]] == ["0 %", "-", "-", "-", "-", "-"]
    heads_of_costs, costs = cost_rows(results)
    assert [line[0] for line in costs] == [ALL_IN_FULL, "clip alone", "dinov2 alone", "VST-2", "VST-6"]
    assert dict(zip(heads_of_costs, costs[3], strict=True))["time / clip alone"] == "1.20 (1.19 .. 1.21)"
    assert by_name["VST-2"]["extra blocks"] == "82 %"
    _, errors = error_rows(results)
    assert errors[0][:4] == ["2", "ridge", "0.350 +- 0.071", "0.350 +- 0.071"]
    _, details = detail_rows(results)
    assert details[1][-1] == "60.0"
    assert "clip alone" in notes(results)
    show_results(results)
    assert "distinguishable" in capsys.readouterr().out


def test_a_tuned_trunk_stands_in_the_tables_without_its_branch(tiny):
    tree = VSTEncoder.plan(tiny("clip", 48, 12), {"dinov2": tiny("dinov2", 32, 12)}, [2, 6])
    recipes = {"tuned": {"match": "mix", "tune": {"trunk": "lora"}}}
    config = DemoConfig(
        splits=[2, 6], seeds=[0, 1], probe_test=PICTURES, recipes=recipes, objectives=["tuned", "ridge", "ffm"]
    )
    made, own = rows(), {"error": 0.02, "channel_error": 0.04, "cosine": 1.0, "tokens": 64}
    for fit in [r for r in made if r.get("objective") == "ffm"]:
        made.append({**fit, "objective": "tuned", "steps": 30, "pictures": 12, "seconds": {"fit": 7.0},
                     "trunk": {"tower": tower(0.65), "own": own}})  # fmt: skip
    found = json.loads(json.dumps(demo_results(made, config, tree, "ffm")))
    towers = {r["name"]: r for r in found["towers"]}
    assert list(towers)[3:] == [
        "VST-2", "VST-2, tuned", "VST-2, ridge", "VST-6", "VST-6, tuned", "VST-6, ridge", "clip tuned, tuned"
    ]  # fmt: skip
    trunk = towers["clip tuned, tuned"]
    assert trunk["extra_flops"] == 0
    assert trunk["own"]["error"] == pytest.approx(0.02)
    assert trunk["share"][SCENES]["share"] == pytest.approx((iou(0.65) - iou(0.6)) / (iou(0.8) - iou(0.6)), abs=1e-6)
    _, cells = fit_rows(found)
    assert cells[2][:6] == ["tuned", "30", "12", "7 +- 0", "0.020 +- 0.000", "0.040 +- 0.000"]
    assert cells[2][6].startswith(f"{100 * (iou(0.65) - iou(0.6)):+.1f} (")
    assert cells[2][7] == "+0.0 (+0.0 .. +0.0)"
    assert cells[0][4:] == ["0"] * 4
    heads, ahead = ahead_rows(found)
    assert heads[1] == "ffm ahead of"
    assert [line[:2] for line in ahead] == [["2", "tuned"], ["2", "ridge"], ["6", "tuned"], ["6", "ridge"]]
    assert ahead[0][2] == "+0.0 (+0.0 .. +0.0)"
    behind = towers["VST-6, ridge"]["behind"][SCENES]
    assert behind["points"] == pytest.approx(iou(0.7) - iou(0.66))
    assert behind["low"] <= behind["points"] <= behind["high"]
    assert all(table in demo_markdown(found) for table in (markdown(heads, ahead), markdown(*fit_rows(found))))
    told = {"pictures": {"scenes": 128, "singles": 128}, "stitch": "mlp_skip", "fit": recipes["tuned"]}
    assert found["recipes"] == {"tuned": told}
    assert all("counts" not in json.dumps(f) for f in found["fits"])
    fit = config.fit_of("tuned", 3)
    assert (fit.match, fit.tune.trunk, fit.seed, fit.objective) == ("mix", "lora", 3, "ffm")


def test_a_recipe_with_stitches_of_its_own_is_told_by_its_own_flops(tiny, tmp_path):
    two = {"family": "mlp_skip", "reads": 2}
    tree = VSTEncoder.plan(tiny("clip", 48, 12), {"dinov2": tiny("dinov2", 32, 12)}, [2, 6])
    recipes = {"two": {"stitch": two}}
    config = DemoConfig(
        splits=[2, 6], seeds=[0, 1], probe_test=PICTURES, recipes=recipes, objectives=["two", "ridge", "ffm"]
    )
    made, control = rows(), "clip alone and its depths 3, 6"
    for r in made[-1]["rows"]:
        r["gflops"] = 10 * r["flops_ratio"]
    for r in [r for r in made if r.get("objective") == "ffm"]:
        made.append({**r, "objective": "two", "gflops": {"2": 9.8, "6": 9.0}})
    for r in made:
        if r.get("objective", 0) is None:
            r["towers"][control] = tower(0.7)
    found = json.loads(json.dumps(demo_results(made, config, tree, "ffm")))
    towers = {r["name"]: r for r in found["towers"]}
    assert towers["VST-6, two"]["flops_ratio"] == pytest.approx(0.9)
    assert towers["VST-6, two"]["extra_flops"] == pytest.approx(0.5)
    assert towers["VST-6"]["extra_flops"] == pytest.approx(0.4)
    assert "median_ms" not in towers["VST-6, two"]
    assert towers[control]["extra_flops"] == 0
    assert towers[control]["share"][SCENES]["share"] == pytest.approx(
        (iou(0.7) - iou(0.6)) / (iou(0.8) - iou(0.6)), abs=1e-6
    )
    assert found["recipes"]["two"] == {"pictures": config.kinds, "stitch": "mlp_skip(reads=2)", "fit": {}}
    share_plot(found, tmp_path / "curve.svg")
    show_results(found)
    write_json(tmp_path / "results.json", {"results": found})
    assert {r["name"] for r in measured_rows(tmp_path)} == {*RIGHT, "VST-2", "VST-6"}
    timing = next(r for r in made if "rows" in r)  # shown itself, it has the times of its own tree
    own = {**timing, "stitch": "mlp_skip(reads=2)", "rows": [{**r, "median_ms": 7} for r in timing["rows"]]}
    shown = {r["name"]: r for r in demo_results([*made, own], config, tree, "two")["towers"]}
    assert (shown["VST-6"]["median_ms"], shown["VST-6"]["flops_ratio"]) == (7, pytest.approx(0.88))
    assert shown["VST-6, ffm"]["median_ms"] == pytest.approx(88)


def test_scores_keep_to_their_seeds(tiny):
    tree = VSTEncoder.plan(tiny("clip", 48, 12), {"dinov2": tiny("dinov2", 32, 12)}, [2, 6])
    config = DemoConfig(splits=[2, 6], seeds=[1, 0], probe_test=PICTURES)
    made = rows(seeds=(0, 1))
    made[0]["towers"][ALL_IN_FULL] = tower(0.9)  # seed 0
    found = next(r for r in demo_results(made, config, tree, "ffm")["towers"] if r["name"] == ALL_IN_FULL)
    assert found["tasks"][SCENES] == {"1": iou(0.8), "0": iou(0.9)}


def test_the_better_model_need_not_be_the_trunk(tiny, tmp_path):
    """Then shares are told against the branch alone, which stands where it costs what it costs."""
    tree = VSTEncoder.plan(tiny("dinov2", 32, 12), {"clip": tiny("clip", 48, 12)}, [2, 6])
    made, costs = rows(), {ALL_IN_FULL: 1.0, "clip alone": 0.8, "dinov2 alone": 0.2, "VST-2": 0.9, "VST-6": 0.6}
    for r in made[-1]["rows"]:
        r |= {"flops_ratio": costs[r["name"]], "ratio": costs[r["name"]], "trunk_ratio": costs[r["name"]] / 0.2}
    found = demo_results(
        made, DemoConfig(trunk="dinov2", splits=[2, 6], seeds=[0, 1], probe_test=PICTURES), tree, "ffm"
    )
    towers = {r["name"]: r for r in found["towers"]}
    assert found["better"][SCENES] == "clip alone"
    assert towers["clip alone"]["share"][SCENES]["share"] == pytest.approx(0)
    assert towers["clip alone"]["extra_flops"] == pytest.approx(0.75)
    assert towers["dinov2 alone"]["share"][SCENES]["share"] < 0
    share_plot(found, tmp_path / "curve.svg")
    heads, cells = score_rows(found)
    assert {line[0]: line[heads.index("extra FLOPs")] for line in cells}["clip alone"] == "75 %"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_plot_is_drawn_from_the_results(results, tmp_path, suffix):
    path = tmp_path / f"curve.{suffix}"
    share_plot(results, path)
    if suffix == "png":
        assert np.asarray(Image.open(path)).std() > 5
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_page_shows_masks_and_maps(results, tmp_path):
    run = Run(tmp_path / "run", {})
    share_plot(results, run.path("curve.png"))
    task = TaskData(
        "segmentation", ["background", "food"], [], [Image.new("RGB", (128, 128))] * 8, torch.zeros(0),
        torch.ones(8, 64, 64).long(),
    )  # fmt: skip
    write_page(run, results, rows(), task, {"dinov2's own": np.zeros((8, 4, 4, 3))})
    page = run.path("index.html").read_text()
    for heading in ("ground truth", "clip alone", "VST-6", "both in full", "dinov2&#x27;s own", "background"):
        assert heading in page
    share = results["towers"][3]["share"][SCENES]["share"]
    assert f"split 2 keeps {100 * share:.0f} % of it for 80 %" in page
    assert page.count("data:image/png") == 1 + 8 * 6 + 8 * 2


def test_what_is_recommended_is_the_tree_that_was_kept(results, tmp_path):
    write_json(tmp_path / "results.json", {"results": results})
    assert "VST-2, ridge" not in [r["name"] for r in measured_rows(tmp_path)]
    scenes = measured_rows(tmp_path, SCENES)
    assert next(r for r in scenes if r["name"] == "VST-2")["accuracy"] == pytest.approx(iou(0.78))
    assert recommend(scenes, budget="1.25x", of="clip alone").row["split"] == 2
    assert recommend(scenes, budget="1.15x", of="clip alone").row["split"] == 6
    with pytest.raises(ValueError, match="task is 'x'; the run has scenes, subcategories"):
        measured_rows(tmp_path, "x")


def test_scores_are_told_as_soon_as_they_are_known():
    line = scores_line("seed 3", {"clip alone": tower(0.6), "VST-2": tower(0.78)})
    assert line.splitlines() == [
        f"seed 3: scenes, mIoU %: clip alone {100 * iou(0.6):.1f}, VST-2 {100 * iou(0.78):.1f}",
        "seed 3: subcategories, accuracy %: clip alone 50.0, VST-2 50.0",
    ]


def test_small_numbers_are_packed():
    values = np.random.default_rng(0).integers(0, 255, (5, 3, 4))
    stored = json.loads(json.dumps(pack(values, "uint8")))
    assert np.array_equal(unpack(stored), values)
    with pytest.raises(ValueError, match="do not fit into uint8"):
        pack(values + 10, "uint8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trunk": "siglip"}, "trunk is 'siglip'; expected clip or dinov2"),
        ({"objectives": []}, "one or more"),
        ({"objectives": ["rdge"]}, "one or more of"),
        ({"probe_train": 0}, "probe_train is 0; expected at least 40"),
        ({"repeats": 0}, "repeats is 0"),
        ({"heldout": 500}, "heldout is 500; expected at most 400"),
        ({"seeds": [1, 1]}, "each once"),
        ({"recipes": {"ffm": {}}}, "Recipe 'ffm' needs a name that is no objective's"),
        ({"recipes": {"models": {}}}, "nor 'models'"),
        ({"recipes": {"a": {"epochs": 0}}}, "epochs is 0"),
        ({"objectives": ["lfm"], "fit": FitConfig(hints=2)}, "hints needs an objective"),
        ({"recipes": {"a": {"stitch": "conv"}}}, "Unknown stitch family 'conv'"),
        ({"stitch": {"family": "linear", "rank": 3}}, "has no option .*rank"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**options)
    assert (DemoConfig().branch, DemoConfig(trunk="dinov2").branch) == ("dinov2", "clip")


def test_a_closed_form_stands_beside_a_fit_that_tunes():
    fit = FitConfig(match="mix", hints=1, augment=True, tune={"tails": "lora"})
    config = DemoConfig(fit=fit)
    assert config.fit_of("ffm", 2) == replace(fit, seed=2)
    assert config.fit_of("procrustes", 2).start == "procrustes"
    ridge = config.fit_of("ridge", 2)
    assert (ridge.objective, ridge.tune.tails, ridge.hints, ridge.augment) == ("ridge", "none", 0, False)


def test_an_objective_before_the_tail_tunes_the_trunk_alone():
    config = DemoConfig(fit=FitConfig(match="mix", tune={"trunk": "lora", "tails": "lora"}), objectives=["lfm", "ffm"])
    assert config.fit_of("lfm", 0).tune == TuneConfig(trunk="lora")
    assert config.fit_of("ffm", 0).tune == config.fit.tune
    assert config.fit_of("ridge", 0).tune == TuneConfig()
    deep = DemoConfig(fit=replace(config.fit, hints=2, beyond=True), objectives=["ridge", "lfm", "ffm"])
    assert (deep.fit_of("lfm", 0).hints, deep.fit_of("lfm", 0).beyond) == (0, False)
    assert deep.fit_of("ffm", 0).hints == 2
    wide = DemoConfig(fit=config.fit, recipes={"wide": {"tune": {"rank": 32}}}, objectives=["wide"])
    assert wide.fit_of("wide", 0).tune == replace(config.fit.tune, rank=32)


def test_the_demo_fits_by_the_recipe_that_was_judged():
    """Of the recipes side by side, the one whose results docs/recipe.md shows by the bare names, but for precision."""
    stored = read_json(ROOT / "docs/results/recipes/results.json")["config"]
    judged = DemoConfig(**{**stored, "fit": FitConfig(**stored["fit"])})
    shown, demo = judged.objectives[-1], DemoConfig()
    assert demo.stitch_of("ffm") == judged.stitch_of(shown)
    same = {"precision": "auto", "cache": None, "save_every": 10}
    assert demo.fit_of("ffm", 0) == replace(judged.fit_of(shown, 0), **same)


def test_pca_maps_show_the_leading_directions():
    """A map that is one direction plus noise is shown as that direction, up to sign."""
    rng = np.random.default_rng(0)
    wave = np.linspace(-1, 1, 64).reshape(1, 64, 1)
    own = wave * rng.normal(size=(1, 1, 12)) + 0.01 * rng.normal(size=(1, 64, 12))
    (shown,) = pca_maps([own])
    assert abs(np.corrcoef(shown[0, :, :, 0].ravel(), wave.ravel())[0, 1]) > 0.99


@pytest.mark.assets
@pytest.mark.parametrize("seed", [0, 1])
def test_test_pictures_show_nothing_that_was_seen(seed, monkeypatch):
    """Neither their emoji nor their drawing style."""
    from vst.demo import assets, division, emoji, pasted

    root = assets.prepare(quiet=True).emoji
    opened = []

    def remember(path, *args, **kwargs):
        opened.append(Path(path))
        return Image_open(path, *args, **kwargs)

    Image_open = Image.open
    for module in (emoji, pasted):
        monkeypatch.setattr(module.Image, "open", remember)
    config = DemoConfig(pictures=60, probe_train=60, probe_test=50)
    drawn = division.Division.draw(root, config, seed)
    monkeypatch.undo()
    seen = {p.stem for p in opened if p.parent.name != TEST_STYLE}
    unseen = {p.stem for p in opened if p.parent.name == TEST_STYLE}
    assert len(seen) > 60
    assert len(unseen) > 50
    assert not seen & unseen
    scenes, single = drawn.tasks[SCENES], drawn.tasks[SUBCATEGORIES]
    fit = drawn.pictures(config.kinds)
    assert (len(fit), len(drawn.heldout), len(scenes.test), len(single.train)) == (60, 64, 50, 60)
    assert scenes.test_labels.shape == (50, 64, 64)
    assert 0 < scenes.test_labels.float().mean() < 8
    assert len(single.classes) == 20
    again, other = (Division.draw(root, config, s) for s in (seed, seed + 1))
    assert all(torch.equal(again.tasks[t].test_labels, drawn.tasks[t].test_labels) for t in drawn.tasks)
    assert again.fit == drawn.fit
    assert fit == [*drawn.fit["scenes"], *drawn.fit["singles"]]
    assert drawn.pictures({"scenes": 0, "singles": 7}) == drawn.fit["singles"][:7]
    assert not torch.equal(other.tasks[SCENES].test_labels, scenes.test_labels)
    with pytest.raises(ValueError, match="probe_test is 5000"):
        Division.draw(root, DemoConfig(probe_test=5000), 0)
