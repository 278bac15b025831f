"""A run folder of the protocol: it resumes, grows, goes on anywhere, and keeps apart what does not belong together."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from protocol_kit import CLASSES, TRAIN, colours, plain

from vst.data.images import ImageTransform
from vst.fit.cache import cached_bytes
from vst.protocol import TaskConfig, run_protocol
from vst.protocol import grid as grid_module
from vst.protocol.features import Models
from vst.protocol.stitched import Stitched
from vst.protocol.tasks import draw, make_task
from vst.protocol.training import LossNotFinite
from vst.results.folders import read_json

pytest_plugins = ("protocol_kit",)


def test_resuming_gives_what_the_uninterrupted_run_gives(config, tmp_path, monkeypatch):
    config = replace(config, objectives=["lfm", "ffm", "ffm+tlt", "ridge+ffm"], cka_depths=[2])
    whole = run_protocol(tmp_path / "whole", config, show=False)
    real, calls = grid_module.measure, []

    def stopped(*args):
        calls.append(1)
        if len(calls) in (2, 4, 7):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(grid_module, "measure", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_protocol(tmp_path / "cut", config, show=False)
    resumed = run_protocol(tmp_path / "cut", config, show=False)
    assert plain(resumed["rows"]) == plain(whole["rows"])
    assert resumed["pushed_pictures"] == whole["pushed_pictures"]
    assert plain(resumed["findings"]) == plain(whole["findings"])


def test_settings_and_names_cannot_change_within_a_folder(config, tiny, data, tmp_path):
    config = replace(config, objectives=["ridge"])
    run_protocol(tmp_path / "run", config, show=False)
    with pytest.raises(ValueError, match=r"differs in train\.batch_size"):
        run_protocol(tmp_path / "run", replace(config, train=replace(TRAIN, batch_size=4)), show=False)
    other = {**config.models, "a": tiny("dinov2", seed=5)}
    with pytest.raises(ValueError, match="rows in which model 'a' is"):
        run_protocol(tmp_path / "run", replace(config, models=other), show=False)
    task = TaskConfig("folder", dict(data), validation=5)
    with pytest.raises(ValueError, match="rows in which task 'colours' is"):
        run_protocol(tmp_path / "run", replace(config, tasks={"colours": task}), show=False)
    run_protocol(tmp_path / "run", replace(config, train=replace(TRAIN, batch_size=4)), overwrite=True, show=False)


def test_a_loss_that_is_not_finite_is_named_and_rows_are_kept(config, tmp_path, monkeypatch):
    real = Stitched.end
    broken = lambda self, z: real(self, z) * (float("nan") if self.cell.chain[-1:] == ("tlt",) else 1)  # noqa: E731
    monkeypatch.setattr(Stitched, "end", broken)
    with pytest.raises(LossNotFinite, match=r"ffm\+tlt,seed0: tlt: the loss is not finite with any of the rates"):
        run_protocol(tmp_path / "run", config, show=False)
    assert len(list((tmp_path / "run" / "rows").glob("*ridge*.json"))) == 2
    monkeypatch.setattr(Stitched, "end", real)
    assert len(run_protocol(tmp_path / "run", config, show=False)["rows"]) == 2 + 6


def test_unreadable_pictures_are_left_out(config, data, tmp_path):
    for part in ("train", "test"):
        colours(tmp_path / part, 5)
    (tmp_path / "train" / "red" / "broken.png").write_text("no picture")
    options = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    config = replace(config, tasks={"t": TaskConfig("folder", options, validation=2)}, objectives=["ridge"])
    results = run_protocol(tmp_path / "run", config, show=False)
    sizes = results["rows"][0]["pictures"]
    assert sum(sizes.values()) == 30
    (name,) = read_json(tmp_path / "run" / "unreadable-t.json")
    assert name.endswith("broken.png")


def test_pictures_beyond_the_limit_of_memory_are_left_out(config, tmp_path):
    for part in ("train", "test"):
        colours(tmp_path / part, 5)
    Image.new("RGB", (600, 500)).save(tmp_path / "test" / "red" / "large.png")
    options = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    task = {"t": TaskConfig("folder", options, validation=2)}
    whole = replace(config, tasks=task, objectives=["ridge"], cache=str(tmp_path / "cache"))
    few = replace(whole, picture_mb=1)
    assert sum(run_protocol(tmp_path / "whole", whole, show=False)["rows"][0]["pictures"].values()) == 31
    # also where another run left the features of all pictures in the cache
    assert sum(run_protocol(tmp_path / "few", few, show=False)["rows"][0]["pictures"].values()) == 30
    ((name, reason),) = read_json(tmp_path / "few" / "unreadable-t.json").items()
    assert name.endswith("large.png")
    assert "picture_mb allows 1" in reason
    with pytest.raises(ValueError, match=r"differs in .*picture_mb"):
        run_protocol(tmp_path / "whole", few, show=False)


def test_rows_alone_are_enough_to_go_on(config, tmp_path):
    """What is published of a run, copied anywhere, grows as the whole run does."""
    few, more = replace(config, objectives=["ridge"]), replace(config, objectives=["ridge", "ffm+tlt"])
    run_protocol(tmp_path / "whole", few, show=False)
    made = {"predictions", "heads", "stages", "features"}
    shutil.copytree(tmp_path / "whole", tmp_path / "rows", ignore=lambda _, names: {*names} & made)
    whole, rows = (run_protocol(tmp_path / name, more, show=False)["rows"] for name in ("whole", "rows"))
    assert plain(rows) == plain(whole)
    assert {r["precision"] for r in rows} == {"fp32"}  # as it came out, not as it was asked for


def test_rows_do_not_depend_on_where_pictures_lie_and_when_they_were_written(config, data, tmp_path):
    moved = {part: shutil.copytree(data[part], tmp_path / "moved" / part) for part in data}
    for file in (tmp_path / "moved").rglob("*.png"):
        os.utime(file, (1, 1))
    elsewhere = {"colours": replace(config.tasks["colours"], options={part: str(path) for part, path in moved.items()})}
    here = run_protocol(tmp_path / "here", config, show=False)
    there = run_protocol(tmp_path / "there", replace(config, tasks=elsewhere), show=False)
    assert plain(there["rows"]) == plain(here["rows"])


def test_other_pictures_under_the_same_paths_are_refused(config, tmp_path):
    colours(tmp_path / "train", 5)
    colours(tmp_path / "test", 3)
    options = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    config = replace(config, tasks={"t": TaskConfig("folder", options, train=10, validation=2, test=6)})
    run_protocol(tmp_path / "run", replace(config, objectives=["ridge"]), show=False)
    colours(tmp_path / "train" / "more", 2)
    for name in CLASSES:
        (tmp_path / "train" / "more" / name / "0.png").rename(tmp_path / "train" / name / "new.png")
    shutil.rmtree(tmp_path / "train" / "more")
    with pytest.raises(ValueError, match="'t', seed 0, that saw other pictures or labels than now"):
        run_protocol(tmp_path / "run", replace(config, objectives=["ridge", "lfm"]), show=False)


def test_the_map_is_of_pictures_that_can_be_read(config, tmp_path):
    """A depth that only the map needs is also there for the picture that takes a broken one's place."""
    for part in ("train", "test"):
        colours(tmp_path / part, 5)
    config = replace(config, objectives=["ridge"], cka_depths=[1, 3], cka_pictures=6)
    for broken in ("red", "green", "blue"):
        (tmp_path / "test" / broken / "0.png").write_text("no picture")
    options = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    config = replace(config, tasks={"t": TaskConfig("folder", options, validation=2)}, directions=["b>b"])
    results = run_protocol(tmp_path / "run", config, show=False)
    (found,) = [r["cka"] for r in results["rows"] if r["kind"] == "cka"]
    task = make_task("t", config.tasks["t"])
    broken = {i for i, path in enumerate(task.pictures) if path.read_bytes() == b"no picture"}
    test = [row for row in draw("t", task, config.tasks["t"], 0).test if row not in broken][:6]
    model = Models(config.models, 4, torch.device("cpu"))["b"]
    transform = ImageTransform(size=4 * model.spec.patch, mean=model.spec.mean, std=model.spec.std, cut="crop")
    with torch.no_grad():
        taps = model.taps(torch.stack([transform(Image.open(task.pictures[row])) for row in test]), [1, 3])
    x, y = (model.patches(taps[depth]).flatten(0, 1).double() for depth in (1, 3))
    x, y = x - x.mean(0), y - y.mean(0)
    cka = (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())
    assert found[0][1] == pytest.approx(float(cka), abs=2e-3)  # features are kept in fp16


def test_maps_of_other_depths_stand_beside_the_first(config, tmp_path):
    config = replace(config, objectives=["ridge"], cka_depths=[1, 3])
    run_protocol(tmp_path / "run", config, show=False)
    results = run_protocol(tmp_path / "run", replace(config, cka_depths=[2]), show=False)
    assert {tuple(r["depths"]) for r in results["rows"] if r["kind"] == "cka"} == {(1, 3), (2,)}


def test_a_task_without_rows_can_be_corrected(config, data, tmp_path):
    masks = tmp_path / "masks"
    for part in ("train", "test"):
        for path in Path(data[part]).rglob("*.png"):
            out = masks / part / path.relative_to(data[part])
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((56, 56), 7 * (path.parent.name == "red"), np.uint8)).save(out)
    options = {"train_images": data["train"], "test_images": data["test"]}
    options |= {"train_masks": str(masks / "train"), "test_masks": str(masks / "test")}
    task = TaskConfig("pairs", {**options, "classes": 3}, validation=6)
    config = replace(config, tasks={"seg": task}, objectives=["ridge"], directions=["b>b"])
    with pytest.raises(ValueError, match="the label 7; expected 0 to 2"):
        run_protocol(tmp_path / "run", config, show=False)
    corrected = replace(task, options={**options, "classes": 8})
    results = run_protocol(tmp_path / "run", replace(config, tasks={"seg": corrected}), show=False)
    assert results["rows"][0]["metric"] == "mIoU"
    assert results["rows"][0]["chance"] is None
    assert "chance" not in (tmp_path / "run" / "tables.md").read_text()


def test_self_stitches_are_made_where_another_depth_enters(config, tiny, tmp_path):
    config = replace(config, models={"a": tiny("dinov2"), "b": tiny("clip", 32, depth=8)}, objectives=["ridge"])
    results = run_protocol(tmp_path / "run", config, show=False)
    places = {(r["source"], r["target"], r["depth"], r["enter"]) for r in results["rows"] if r["kind"] == "stitched"}
    assert places == {("a", "b", 2, 4), ("b", "b", 2, 2), ("b", "b", 4, 4)}


def test_features_depend_on_more_than_weights(tiny, tmp_path):
    folder = shutil.copytree(tiny("clip").removeprefix("hf:"), tmp_path / "clip")
    file = folder / "config.json"
    facts = json.loads(file.read_text())
    digests = []
    for act in ("quick_gelu", "gelu"):
        part = facts.get("vision_config", facts)
        part["hidden_act"] = act
        file.write_text(json.dumps(facts))
        digests.append(Models({"m": f"hf:{folder}"}, 4, torch.device("cpu")).digest("m"))
    assert digests[0] != digests[1]


def test_a_cache_does_not_outgrow_its_limit(config, tmp_path):
    few = {"colours": replace(config.tasks["colours"], train=3, test=2)}
    run_protocol(
        tmp_path / "run", replace(config, tasks=few, objectives=["ridge"], cache=str(tmp_path / "c")), show=False
    )
    kept = cached_bytes(tmp_path / "c")
    more = replace(config, cache=str(tmp_path / "c"), cache_limit_gb=(kept + 1000) / 1e9, objectives=["ridge"])
    with pytest.raises(ValueError, match=r"GB more, and .* holds .* raise cache_limit_gb"):
        run_protocol(tmp_path / "more", more, show=False)


def test_random_weights_are_asked_for_by_name_and_kept_apart(config, tmp_path, monkeypatch):
    """No source is asked for weights, each model has its own, and a run with real ones does not go on from them."""
    config = replace(config, objectives=["ridge"], pretrained=False)
    models = Models({"a": config.models["b"], "b": config.models["b"]}, 4, torch.device("cpu"), pretrained=False)
    assert models.digest("a") != models.digest("b")
    assert models["b"].state_dict().keys() == Models(config.models, 4, torch.device("cpu"))["b"].state_dict().keys()
    for source in {str(s) for s in config.models.values()}:
        hidden = shutil.copytree(source.removeprefix("hf:"), tmp_path / Path(source).name)
        (hidden / "model.safetensors").unlink()
    bare = {name: f"hf:{tmp_path / Path(source).name}" for name, source in config.models.items()}
    found = run_protocol(tmp_path / "run", replace(config, models=bare), show=False)["rows"]
    again = run_protocol(tmp_path / "again", replace(config, models=bare), show=False)["rows"]
    assert plain(found) == plain(again)
    assert "random weights" in (tmp_path / "run" / "index.html").read_text()
    with pytest.raises(ValueError, match="differs in pretrained"):
        run_protocol(tmp_path / "run", replace(config, pretrained=True, models=bare), show=False)
    assert "pretrained" not in replace(config, pretrained=True).settings()
