"""The protocol on tiny random models: every row trains, shares its work, and knows what it must know."""

import json
import re
from dataclasses import replace

import pytest
import torch
from protocol_kit import TRAIN

from vst import cli
from vst.models.checkpoints import load_vfm
from vst.models.vfm import VFM
from vst.protocol import TrainConfig, run_protocol
from vst.protocol.cells import Cell, in_names
from vst.protocol.chains import parse_chain
from vst.protocol.features import Models
from vst.protocol.stitched import Stitched
from vst.results.folders import read_json

pytest_plugins = ("protocol_kit",)


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


def test_a_family_with_options_has_rows_beside_the_plain_one(tiny, config, tmp_path):
    models = {"a": tiny("dinov2"), "b": tiny("dinov2", 32, seed=1)}
    given = replace(config, models=models, directions=["a>b", "a>a"], objectives=["ridge"])
    config = replace(given, families=["linear", "linear( reads = 2 )"])
    assert config.families == ["linear", "linear(reads=2)"]  # one way to write each
    results = run_protocol(tmp_path / "run", config, show=False)
    rows = {(r["family"], r["target"]): r for r in results["rows"] if r["kind"] == "stitched"}
    assert set(rows) == {(family, target) for family in config.families for target in "ab"}
    for target in "ab":
        one, two = (rows[family, target] for family in config.families)
        assert two["stitch_parameters"] - one["stitch_parameters"] == 2 * 32 * 32
        # A matrix more for the 16 patches, another for the class token: two operations a weight and token.
        assert two["flops"] - one["flops"] == 2 * 32 * 32 * 17
    assert rows["linear(reads=2)", "a"]["seam"]["error"] < 0.05  # the depth itself is among what is read
    names = {p.name for p in (tmp_path / "run").rglob("*") if "reads" in p.name}
    assert "colours,a-into-b,linear+reads=2,depth02,ridge,seed0.json" in names
    assert "scores-colours-linear+reads=2.png" in names
    with pytest.raises(ValueError, match=r"families is \['linear', 'linear'\]"):
        replace(config, families=["linear", " linear"])


def test_no_two_families_share_the_name_of_a_file():
    texts = ["x-b", "x/b", "x+b", "x b", "x, b=1", "x,b=1", "x(b", "x"]
    families = ["mlp", "mlp(reads=2)", "mlp(a='x', b=1)", "mlp(a=-1)", *(f"mlp(a={text!r})" for text in texts)]
    names = [in_names(family) for family in families]
    assert names[:2] == ["mlp", "mlp+reads=2"]
    assert len(set(names)) == len(families)
    assert not [name for name in names if re.search(r"[^\w.=+%-]", name)]


def test_tokens_that_a_stitch_reads_lie_side_by_side_from_the_lowest_depth(config):
    models = Models(config.models, config.grid, torch.device("cpu"))
    stitched = Stitched(Cell("colours", "a", "b", "mlp(reads=2)", 3, 3, ("ridge",), 0), models)
    assert stitched.reads == (2, 3)
    tokens = {(model, depth): torch.randn(2, 17, 32) for model in "ab" for depth in (1, 2, 3)}
    assert torch.equal(stitched.read(tokens), torch.cat([tokens["a", 2], tokens["a", 3]], -1))


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


def test_a_new_family_and_a_new_objective_are_one_class_each(config, tmp_path, capsys):
    from torch import nn

    from vst.fit import objectives
    from vst.tree import stitches

    @stitches.register
    class Scale(stitches.Stitch):
        family = "scale_for_test"

        def __init__(self, source, target, split):
            super().__init__(source, target, split)
            self.by = nn.Parameter(torch.ones(()))

        def transform(self, x, trunk):
            return (x[:, :1] if self.maps_cls else None), self.by * x[:, self.source.prefix :]

    @objectives.register
    class Halfway(objectives.Objective):
        name = "halfway"

        def depth(self, enter, stop):
            return (enter + stop) // 2

    try:
        config = replace(config, families=["linear", "scale_for_test"], objectives=["ridge", "halfway+ffm"])
        results = run_protocol(tmp_path / "run", config)
        told = "no rows of what a family cannot do: scale_for_test ridge a>b; scale_for_test ridge b>b\n"
        assert told in capsys.readouterr().err
        rows = [r for r in results["rows"] if r["kind"] == "stitched"]
        assert {(r["family"], r["objective"]) for r in rows} == {
            ("linear", "ridge"), ("linear", "halfway+ffm"), ("scale_for_test", "halfway+ffm")
        }  # fmt: skip
        assert all(r["stages"]["halfway"]["seconds"] > 0 for r in rows if "+" in r["objective"])
        with pytest.raises(ValueError, match="The grid has no row: scale_for_test"):
            run_protocol(tmp_path / "none", replace(config, families=["scale_for_test"], objectives=["ridge"]))
    finally:
        del stitches.STITCHES["scale_for_test"], objectives.OBJECTIVES["halfway"]
