"""The whole demo on tiny models and the real emoji: stopped, tuned, by recipe, overwritten."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vst.demo.config import DemoConfig
from vst.demo.division import SCENES
from vst.demo.job import run_demo
from vst.fit.config import FitConfig
from vst.measure.cost import tree_cost
from vst.tree.encoder import VSTEncoder


@pytest.fixture
def small(tiny, monkeypatch):
    from vst.demo import assets, job

    folders = {name: Path(tiny(name, width).removeprefix("hf:")) for name, width in (("clip", 48), ("dinov2", 32))}
    found = assets.Assets(emoji=assets.prepare(quiet=True).emoji, **folders)
    monkeypatch.setattr(job.assets, "prepare", lambda: found)
    fit = FitConfig(epochs=1, calibration=10, save_every=1)
    counts = {"pictures": 10, "probe_train": 40, "probe_test": 8, "heldout": 4, "repeats": 1, "batch_size": 1}
    return DemoConfig(splits=[1, 2], grid=4, fit=fit, **counts)


@pytest.mark.assets
def test_a_stopped_run_goes_on(small, tmp_path, monkeypatch):
    from vst.demo import job

    said = []
    monkeypatch.setattr(job, "show_results", said.append)
    run_demo(tmp_path / "whole", small)
    assert [r["objective"] for r in said] == ["ridge", "ffm"]
    with monkeypatch.context() as patch:
        patch.setattr(job._Job, "_scored", fail_after(5, job._Job._scored))  # 3 models, 2 splits by ridge
        with pytest.raises(KeyboardInterrupt):
            run_demo(tmp_path / "stopped", small)
    assert "ridge" in (tmp_path / "stopped" / "index.html").read_text()
    found = run_demo(tmp_path / "stopped", small)
    whole = json.loads((tmp_path / "whole" / "results.json").read_text())["results"]
    for given, wanted in zip(found["towers"], whole["towers"], strict=True):
        assert given["tasks"] == wanted["tasks"]
        assert given["share"] == wanted["share"]
    before = len(said)
    run_demo(tmp_path / "stopped", small)  # complete: shown, not run
    assert len(said) == before + 1
    with pytest.raises(ValueError, match="trunk"):
        run_demo(tmp_path / "stopped", replace(small, trunk="dinov2"))


@pytest.mark.assets
def test_a_tuned_tree_is_scored_by_its_own_trunk(small, tmp_path, monkeypatch):
    """Not by tokens of the published one, which all fits that leave the trunk alone share."""
    from vst.demo import job

    read, own = [], job._Job._scored
    monkeypatch.setattr(job._Job, "_scored", lambda self, tasks, parts: read.append(parts) or own(self, tasks, parts))
    tune = {"trunk": "lora", "tails": "lora", "rank": 2, "lr": 0.05}
    config = replace(small, recipes={"tuned": {"match": "mix", "tune": tune}}, objectives=["ridge", "tuned"])
    found = run_demo(tmp_path / "run", config)
    tree = VSTEncoder.from_pretrained(tmp_path / "run" / "tree")
    assert tree.config.tuned.trunk_blocks == 2
    test = job._Job(None, config, job.assets.prepare()).division(0).tasks[SCENES].test
    with torch.no_grad():
        tokens = tree.branch_tokens(torch.stack([tree.transform()(picture) for picture in test]), 2)
    alone, deep, trunk = read[0], read[-2], read[-1]  # the models come first, the tuned trunk last
    for given, wanted in zip(deep[SCENES, "test"], tokens.values(), strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trunk[SCENES, "test"][0], tokens["clip"], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[SCENES, "test"][0], tokens["clip"], atol=1e-2)
    row = next(r for r in found["towers"] if r["kind"] == "tuned")
    assert row["name"] == "clip tuned"
    assert row["own"]["error"] == pytest.approx(tree.config.tuned.own_error)
    assert (tmp_path / "run" / "index.html").read_text().count("clip tuned") > 0


@pytest.mark.assets
def test_recipes_see_the_pictures_they_name(small, tmp_path, monkeypatch):
    from vst.demo import job

    seen, own = {}, job.fit_stitches
    monkeypatch.setattr(
        job,
        "fit_stitches",
        lambda tree, images, *a, **k: seen.update({len(images): images}) or own(tree, images, *a, **k),
    )
    recipes = {"few": {"pictures": {"singles": 2}}, "more": {"pictures": {"singles": 4}}}
    config = replace(small, recipes=recipes, objectives=["few", "more"])
    found = run_demo(tmp_path / "run", config)
    drawn = job._Job(None, config, job.assets.prepare()).division(0).fit
    assert seen == {2: drawn["singles"][:2], 4: drawn["singles"][:4]}
    assert [f["pictures"] for f in found["fits"]] == [2, 4]
    page = (tmp_path / "run" / "index.html").read_text()
    assert "What pictures are worth" in page
    assert "each doubling" in page
    assert np.asarray(Image.open(tmp_path / "run" / "pictures.png")).std() > 5


@pytest.mark.assets
def test_a_recipe_may_read_several_depths(small, tmp_path):
    from vst.demo import job

    recipes = {"two": {"stitch": {"family": "mlp_skip", "reads": 2}}}
    config = replace(small, splits=[2, 3], recipes=recipes, objectives=["ridge", "two"])
    assert replace(config, stitch={"family": "mlp_skip", "reads": 2}).stitch_of("ridge") == config.stitch_of("two")
    found = run_demo(tmp_path / "run", config)
    towers = {r["name"]: r for r in found["towers"]}
    tree = VSTEncoder.from_pretrained(tmp_path / "run" / "tree")
    assert str(tree.config.branches[0].stitch) == "mlp_skip(reads=2)"
    assert towers["VST-3"]["gflops"] == pytest.approx(tree_cost(tree.config, 3).flops / 1e9)
    assert towers["VST-3"]["gflops"] > towers["VST-3, ridge"]["gflops"]
    division, control = job._Job(None, config, job.assets.prepare()).division(0), "clip alone and its depths 2, 3"
    with torch.no_grad():
        parts = {}
        for part in ("train", "test"):
            images = getattr(division.tasks[SCENES], part)
            pixels = torch.stack([tree.transform()(picture) for picture in images])
            x = tree.trunk.taps(pixels, [2, 3])
            own = tree.trunk.features(x[tree.config.trunk_stop])
            parts[SCENES, part] = [own, *(tree.trunk.patches(x[d]) for d in (2, 3))]
            if part == "test":
                tokens = tree.branch_tokens(pixels, 3)
    scored = job._Job(None, config, None)._scored({SCENES: division.tasks[SCENES]}, parts)[SCENES]["score"]
    assert towers[control]["tasks"][SCENES]["0"] == pytest.approx(scored, abs=0.01)
    assert tokens["dinov2"].shape[1] == config.grid**2


@pytest.mark.assets
def test_overwriting_keeps_nothing_of_the_old_run(small, tmp_path, monkeypatch):
    from vst.demo import job

    folder = tmp_path / "run"
    run_demo(folder, replace(small, objectives=["ridge"]))
    monkeypatch.setattr(job._Job, "models_alone", fail_after(0, job._Job.models_alone))
    with pytest.raises(KeyboardInterrupt):
        run_demo(folder, small, resume=False, overwrite=True)
    assert {p.name for p in folder.iterdir()} - {"rows", ".lock"} == {"environment.json", "run.json"}
    assert not list(folder.glob("rows/*"))


def fail_after(calls, function):
    left = [calls]

    def wrapped(*args, **kwargs):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return function(*args, **kwargs)

    return wrapped
