"""The protocol on tiny random models: every row trains, resumes, shares its work, and knows what it must know."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vst import cli
from vst.cache import cached_bytes
from vst.checkpoints import load_vfm
from vst.images import ImageTransform
from vst.protocol import ProtocolConfig, TaskConfig, TrainConfig, run_protocol
from vst.protocol import grid as grid_module
from vst.protocol.chains import parse_chain
from vst.protocol.features import Models
from vst.protocol.stitched import Stitched
from vst.protocol.tasks import draw, make_task
from vst.protocol.training import LossNotFinite
from vst.runs import read_json
from vst.vfm import VFM

CLASSES = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (20, 60, 230)}
TRAIN = TrainConfig(
    rates=[1e-3, 3e-3], trial_steps=1, trial_pictures=4, lfm_epochs=1, ffm_epochs=1, tlt_epochs=1, head_epochs=3,
    batch_size=8, calibration=16, patience=2,
)  # fmt: skip


def colours(root, count):
    """Pictures whose class is their colour, with noise."""
    rng = np.random.default_rng(count)
    for name, colour in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.normal(0, 40, (20, 20, 3))
            image = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            image.resize((56, 56)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    colours(root / "train", 10)
    colours(root / "test", 4)
    return {"train": str(root / "train"), "test": str(root / "test")}


@pytest.fixture
def config(tiny, data):
    models = {"a": tiny("dinov2"), "b": tiny("clip", 32, seed=1)}
    task = TaskConfig("folder", dict(data), validation=6)
    return ProtocolConfig(
        models, ["a>b", "b>b"], {"colours": task}, [2], grid=4, train=TRAIN, objectives=["ridge", "ffm", "ffm+tlt"]
    )


def plain(rows):
    """Rows without what differs from run to run."""
    text = json.dumps(rows)
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})


@pytest.mark.slow
def test_every_family_objective_and_direction(config, tmp_path):
    objectives = ["ridge", "procrustes", "lfm", "ffm", "tlt", "lfm+tlt", "ffm+tlt", "ridge+ffm+tlt"]
    families = ["linear", "mlp", "mlp_skip", "lora"]
    few = {"colours": replace(config.tasks["colours"], train=12, validation=3, test=6)}
    once = replace(TRAIN, rates=[1e-3], head_epochs=1, batch_size=12, calibration=12)
    config = replace(config, objectives=objectives, families=families, cka_depths=[2, 4], tasks=few, train=once)
    results = run_protocol(tmp_path / "run", config, show=False)
    rows = [r for r in results["rows"] if r["kind"] == "stitched"]
    assert len(rows) == 2 * (3 * 8 + 5)  # lora has no closed form
    for row in rows:
        assert 0 <= row["score"] <= 1
        assert row["flops"] > 0
        assert row["rescue"] <= row["both_wrong"]
        assert row["interference"] <= row["both_right"]
        stages = row["objective"].split("+")
        start = set() if stages[0] in ("ridge", "procrustes") else {"random"}
        assert set(row["stages"]) == {*start, *stages, "head"}
        assert all(stage["seconds"] > 0 for stage in row["stages"].values())
    own = {(r["family"], r["objective"]): r for r in rows if r["source"] == r["target"]}
    assert own["linear", "ridge"]["seam"]["error"] < 0.05  # a model is its own map, but for the penalty
    assert own["linear", "procrustes"]["seam"]["error"] < 1e-4
    maps = [r for r in results["rows"] if r["kind"] == "cka"]
    assert [(m["source"], m["target"]) for m in maps] == [("a", "a"), ("a", "b"), ("b", "b")]
    for m in maps:
        if m["source"] == m["target"]:
            assert m["cka"][0][0] == pytest.approx(1, abs=1e-6)
    folder = tmp_path / "run"
    for name in ("results.json", "tables.md", "index.html", "cka-colours.png", "scores-colours-mlp.png"):
        assert (folder / name).stat().st_size > 500, name
    assert "ffm+tlt | a into b" in (folder / "tables.md").read_text()
    page = (folder / "index.html").read_text()
    assert "cannot be told here" in page
    assert page.count("data:image/png;base64,") == 2 * 4 + 1


def test_each_picture_is_pushed_once_a_model(config, tmp_path):
    run_protocol(tmp_path / "run", config, show=False)
    assert read_json(tmp_path / "run" / "pushed.json") == {"a": 42, "b": 42}
    first = read_json(tmp_path / "run" / "results.json")["results"]
    naive = sum(r["naive_pictures"].get("b", 0) for r in first["rows"])
    assert naive > 10 * 42
    # another seed and another objective draw the same pictures at the same depths
    grown = replace(config, seeds=[0, 1], objectives=[*config.objectives, "tlt"])
    results = run_protocol(tmp_path / "run", grown, show=False)
    assert results["pushed_pictures"] == {"a": 42, "b": 42}
    assert len(results["rows"]) == 2 * (2 + 2 * 4)
    assert results["rows"][: len(first["rows"])] == first["rows"]
    text = (tmp_path / "run" / "tables.md").read_text()
    assert re.findall(r"^\| (\S+) \| a into b", text, re.M) == ["ridge", "ffm", "tlt", "ffm+tlt"]  # not as it grew
    # another depth pushes once more, and only for what it lacks
    deeper = run_protocol(tmp_path / "run", replace(config, depths=[3]), show=False)
    assert deeper["pushed_pictures"] == {"a": 84, "b": 84}


def test_naive_counts_are_what_the_passes_read(config, tmp_path):
    results = run_protocol(tmp_path / "run", replace(config, objectives=["ffm+tlt"]), show=False)
    (row,) = [r for r in results["rows"] if r["kind"] == "stitched" and r["source"] == "a"]
    train, validation, test = 24, 6, 12
    trial = 2 * (8 + 4)
    ffm = trial + validation + train + validation
    tlt = trial + validation + train + validation
    head = train + validation
    start = TRAIN.calibration
    assert row["naive_pictures"] == {"a": start + ffm + tlt + head + test, "b": start + ffm + test}


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


class Turned(VFM):
    """A model whose tokens at depth 2 stand in another orthonormal basis; what follows undoes it."""

    turning = True

    def taps(self, pixels, depths):
        self.turning = False  # its own pass is the plain model's
        out = VFM.taps(self, pixels, sorted({*depths, 2}))
        self.turning = True
        return {d: out[d] @ self.turn if d == 2 else out[d] for d in depths}

    def run(self, x, start, stop):
        entered = self.turning and (start, stop) == (2, self.spec.depth)
        return super().run(x @ self.turn.T if entered else x, start, stop)


def turned(monkeypatch, tiny):
    """Make model ``b`` of a protocol the model ``a`` in another basis at the seam."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(32, 32)).Q
    real = Models.__getitem__

    def get(self, name):
        model = real(self, name)
        if name == "b" and not isinstance(model, Turned):
            model = load_vfm(tiny("siglip"), grid=4).requires_grad_(False)
            model.__class__ = Turned
            model.turn = turn
            self._loaded[name] = model
        return model

    monkeypatch.setattr(Models, "__getitem__", get)


@pytest.mark.slow
def test_the_known_answer(config, tiny, tmp_path, monkeypatch):
    """B = A in another basis: closed forms find it and FFM keeps it. B unrelated: they cannot."""
    train = replace(TRAIN, rates=[1e-2], ffm_epochs=5, head_epochs=1, calibration=64, penalty=1e-6)
    models = {"a": tiny("siglip"), "b": tiny("siglip", seed=1)}  # no class token: 24 pictures cannot tell its map
    config = replace(
        config, models=models, directions=["a>b"], families=["linear"], objectives=["ridge", "procrustes", "ridge+ffm"]
    )
    config = replace(config, train=train)
    ends = {}
    for name in ("unrelated", "turned"):
        if name == "turned":
            turned(monkeypatch, tiny)
            config = replace(config, models={"a": tiny("siglip"), "b": tiny("siglip")})
        rows = run_protocol(tmp_path / name, config, show=False)["rows"]
        ends[name] = {r["objective"]: r["end"]["error"] for r in rows if r["kind"] == "stitched"}
    assert max(ends["turned"].values()) < 1e-3, ends
    assert min(ends["unrelated"].values()) > 1e-2, ends


def test_axes_are_checked(config):
    for changes, message in [
        ({"directions": ["a-b"]}, "Direction 'a-b' was given; expected A>B with names among a, b"),
        ({"directions": ["a>c"]}, "Direction 'a>c'"),
        ({"objectives": ["ffm+ridge"]}, "closed form that is not first"),
        ({"objectives": ["tlt+ffm"]}, "goes on after tlt"),
        ({"objectives": ["sgd"]}, "has stages \\['sgd'\\]"),
        ({"families": ["spline"]}, "Unknown stitch family 'spline'"),
        ({"depths": []}, "depths is \\[\\]"),
        ({"seeds": [1, 1]}, "seeds is \\[1, 1\\]"),
        ({"cut": "pad"}, "expected crop or squash"),
        ({"models": {"a/b": "x"}}, "names files"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(config, **changes)
    assert parse_chain("ridge+ffm+tlt") == ("ridge", "ffm", "tlt")
    with pytest.raises(ValueError, match="rates are"):
        TrainConfig(rates=[0.0])
    with pytest.raises(ValueError, match="ffm_epochs is 0"):
        TrainConfig(ffm_epochs=0)


def test_a_depth_beyond_the_model_and_a_grid_without_rows(config, tmp_path):
    with pytest.raises(ValueError, match=r"Depth 4 .* from a \(4 blocks\) into b \(4\), and leaves nothing"):
        run_protocol(tmp_path / "run", replace(config, depths=[4]), show=False)
    with pytest.raises(ValueError, match="grid has no row: lora"):
        run_protocol(tmp_path / "run", replace(config, families=["lora"], objectives=["ridge"]), show=False)
    assert not (tmp_path / "run").exists()


def test_the_command_line(config, tmp_path, monkeypatch):
    file = tmp_path / "protocol.yaml"
    values = {
        "models": config.models,
        "directions": config.directions,
        "depths": [2],
        "grid": 4,
        "objectives": ["ridge"],
        "tasks": {"colours": {"source": "folder", "options": config.tasks["colours"].options, "validation": 6}},
        "train": {"head_epochs": 2, "batch_size": 8, "rates": [0.001]},
    }
    file.write_text(json.dumps({"protocol": values, "out": str(tmp_path / "run")}))
    cli.main(["protocol", "--config", str(file)])
    assert read_json(tmp_path / "run" / "results.json")["config"]["train"]["head_epochs"] == 2
    with pytest.raises(SystemExit, match="known sources: emoji"):
        cli.main(["protocol", "--config", str(file), "--protocol.tasks", '{"x": {"source": "nowhere"}}'])
