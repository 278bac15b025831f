"""What is plainly meant is taken, and what is wrong is told in one sentence that names it: at every public boundary.

The last part walks the options of the public functions: each changes something, or is refused.
"""

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vst
from vst import (
    VFM,
    BranchConfig,
    FitConfig,
    VFMSpec,
    VSTConfig,
    VSTEncoder,
    cli,
    evaluate_stitches,
    fit_stitches,
    load_vfm,
)
from vst.demo.config import DemoConfig
from vst.measure.benchmark import BenchmarkConfig, benchmark
from vst.measure.cost import activation_bytes, extra_blocks, fit_flops, full_cost, tree_cost
from vst.measure.execution import runner
from vst.measure.latency import measure_tree
from vst.measure.recommend import measured_rows, recommend
from vst.measure.throughput import measure_fit
from vst.models.checkpoints import describe
from vst.protocol import ProtocolConfig, TaskConfig, TrainConfig
from vst.protocol.grid import run_protocol
from vst.tree.baseline import FullEncoders, FullTower
from vst.trunk.compare import TrunkConfig, compare_trunks

NAN, INF = float("nan"), float("inf")
PROTOCOL = {"models": {"a": "x", "b": "y"}, "directions": ["a>b"], "tasks": {"t": TaskConfig("emoji")}, "depths": [1]}


def refused(call, *words, kind=ValueError):
    """One sentence of a ``kind`` that holds all the words."""
    with pytest.raises(kind) as error:
        call()
    text = str(error.value)
    assert "\n" not in text.strip()
    assert len(text) < 900
    for word in words:
        assert word in text, text


@pytest.fixture
def plan(tiny):
    def make(**changes):
        kept = {"trunk": tiny("dinov2"), "branches": {"a": tiny("clip", 48), "b": tiny("siglip", 48)}}
        return VSTEncoder.plan(**{**kept, "splits": [1, 2], "image_size": 56, **changes})

    return make


ACCEPTED = [
    ({"splits": 2}, {"splits": [2]}),
    ({"splits": "2"}, {"splits": [2]}),
    ({"splits": "1,2"}, {"splits": [1, 2]}),
    ({"splits": "[1, 2]"}, {"splits": [1, 2]}),
    ({"splits": [1.0, 2.0]}, {"splits": [1, 2]}),
    ({"splits": np.array([2, 1])}, {"splits": [1, 2]}),
    ({"splits": torch.tensor([1, 2])}, {"splits": [1, 2]}),
    ({"splits": range(1, 3)}, {"splits": [1, 2]}),
    ({"splits": {"a": 1, "b": "2"}}, {"splits": {"a": [1], "b": [2]}}),
    ({"enters": [1, 2]}, {"enters": {"a": [1, 2], "b": [1, 2]}}),
    ({"splits": [2], "enters": 1}, {"splits": [2], "enters": {"a": [1], "b": [1]}}),
    ({"image_size": "112"}, {"image_size": 112}),
    ({"image_size": 112.0}, {"image_size": 112}),
    ({"image_size": (112, 112)}, {"image_size": 112}),
    ({"splits": {1, 2}}, {"splits": [1, 2]}),
    ({"split": "2"}, {"split": 2}),
    ({"split": np.int64(2)}, {"split": 2}),
    ({"split": "a=1,b=2"}, {"split": {"a": 1, "b": 2}}),
    ({"feature_layer": np.int64(-2)}, {"feature_layer": -2}),
    ({"stitch": {"family": "mlp", "hidden": 8.0}}, {"stitch": {"family": "mlp", "hidden": 8}}),
]


@pytest.mark.parametrize(("given", "plain"), ACCEPTED, ids=lambda value: str(value)[:60])
def test_what_is_plainly_meant_is_taken(plan, given, plain):
    assert plan(**given) == plan(**plain)
    assert plan(**given).to_dict() == plan(**plain).to_dict()


def test_splits_that_can_be_read_but_once(plan):
    assert plan(splits=iter([1, 2])) == plan(splits=[1, 2])
    assert plan(enters=(depth for depth in (1, 2))) == plan(enters=[1, 2])


REFUSED = [
    ({"splits": [True]}, "splits", "[True]"),
    ({"splits": [6.5]}, "splits", "6.5"),
    ({"splits": None}, "splits", "None"),
    ({"splits": "deep"}, "splits", "deep"),
    ({"splits": b"6"}, "splits"),
    ({"splits": {"a": [1]}}, "'a'", "'b'"),
    ({"splits": {"a": [1], "b": [None]}}, "'b'", "None"),
    ({"splits": [9]}, "9", "1..4"),
    ({"enters": [7, 8]}, "[7, 8]", "0..3"),
    ({"enters": [True, 2]}, "enters", "True"),
    ({"enters": [1]}, "enters", "one for each split"),
    ({"image_size": 0}, "image_size", "0"),
    ({"image_size": -14}, "image_size", "-14"),
    ({"image_size": (112, 96)}, "square", "96"),
    ({"image_size": "big"}, "image_size", "big"),
    ({"image_size": True}, "image_size", "True"),
    ({"image_size": 100}, "100", "98"),
    ({"branches": None}, "branches", "None"),
    ({"branches": 3}, "branches", "3"),
    ({"branches": [3]}, "3", "source"),
    ({"trunk": None}, "None", "source"),
    ({"trunk": ["a"]}, "['a']", "source"),
    ({"feature_layer": -5}, "none of the 4 blocks", "-5"),
    ({"feature_layer": 0}, "none of the 4 blocks"),
    ({"feature_layer": -2.5}, "feature_layer", "-2.5"),
    ({"fusion": "additive", "keep_trunk": False, "fusion_weights": [NAN, 1.0]}, "fusion_weights", "nan"),
    ({"fusion": "additive", "keep_trunk": False, "fusion_weights": [True, 1.0]}, "fusion_weights", "True"),
    ({"fusion": "additive", "keep_trunk": False, "fusion_weights": "half"}, "fusion_weights", "half"),
    ({"fusion": ["channel"]}, "fusion", "channel"),
    ({"normalise": None}, "normalise", "None"),
    ({"cut": 3}, "cut", "3"),
    ({"keep_trunk": "no"}, "keep_trunk", "'no'"),
    ({"feature_norm": 1}, "feature_norm", "1"),
    ({"pretrained": "no"}, "pretrained", "'no'"),
    ({"seed": "a"}, "seed", "'a'"),
    ({"seed": 1.5}, "seed", "1.5"),
    ({"seed": 10**30}, "seed", "1000000"),
    ({"split": True}, "True", "split"),
    ({"split": [2]}, "[2]", "split"),
    ({"stitch": 3}, "stitch", "3"),
    ({"stitch": ["mlp"]}, "stitch", "mlp"),
    ({"stitch": {"family": "mlp", "hidden": "wide"}}, "hidden", "wide"),
    ({"stitch": {"family": "mlp", "hidden": True}}, "hidden", "True"),
    ({"stitch": {"family": "lora", "alpha": NAN}}, "alpha", "nan"),
    ({"stitch": {"class_path": "os.system"}}, "class_path"),
    ({"stitch": "mine"}, "mine", "import the module that registers it", "--import"),
]


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: str(row[0])[:60])
def test_a_tree_that_cannot_be_meant_is_told(plan, row):
    refused(lambda: plan(**row[0]), *row[1:])


def test_a_branch_of_which_nothing_is_left_at_a_split_is_told(plan):
    with pytest.warns(UserWarning, match=r"keeps no block of .* at split 3: it is entered at its depth 3"):
        plan(splits=[1, 3])


@pytest.mark.parametrize(
    "name", ["items", "keys", "pop", "forward", "training", "train", "a b", "a-b", "../x", "1a", ""]
)
def test_a_branch_name_that_no_module_can_have(plan, tiny, name):
    refused(lambda: plan(branches={name: tiny("clip", 48)}), repr(name)[1:-1])


def test_a_path_is_a_folder_of_a_model(tiny):
    source = tiny("clip", 48)
    path = Path(source.partition(":")[2])
    assert describe(path) == describe(source)
    made = VSTEncoder.plan(path, [path], [1], 56)
    assert made == VSTEncoder.plan(source, [source], [1], 56)


def test_plain_vits_are_named_as_the_models_that_they_are(monkeypatch):
    from vst.models import checkpoints
    from vst.tree.options import _names

    def spec(source, family="vit"):
        return VFMSpec(source=source, family=family, width=8, depth=4, heads=2, patch=14, hidden=16, image_size=56)

    deit, augreg = spec("timm:deit3_small_patch16_224.fb_in1k"), spec("timm:vit_base_patch16_224.augreg_in21k")
    other = spec("timm:vit_base_patch16_224.mae")
    assert _names([deit, augreg], None) == ["deit3_small_patch16_224", "vit_base_patch16_224"]
    assert _names([augreg, other], None) == ["vit_base_patch16_224_augreg_in21k", "vit_base_patch16_224_mae"]
    assert _names([spec("timm:clip", "clip"), augreg], None) == ["clip", "vit"]
    assert _names([augreg, deit], ["own"]) == ["vit", "own"]
    monkeypatch.setattr(checkpoints, "describe", lambda source: {"a": deit, "b": augreg}[source])
    assert VSTEncoder.plan("a", ["b"], [1], 56).names == ["deit3_small_patch16_224", "vit_base_patch16_224"]


@pytest.fixture(scope="module")
def saved(tree_of, tmp_path_factory):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    return tree, tree.save_pretrained(tmp_path_factory.mktemp("saved") / "tree")


def test_calls_of_a_tree(saved):
    tree, _ = saved
    pixels = torch.randn(1, 3, 56, 56)
    wanted = tree(pixels, split=2)
    for split in ("2", np.int64(2), 2.0, {"clip": 2}, {"clip": np.int64(2)}, "clip=2", torch.tensor(2)):
        assert torch.equal(tree(pixels, split=split), wanted)
    for splits in (2, "2", [np.int64(2)], ["2"]):
        assert list(tree.sweep(pixels, splits)) == [2]
        assert set(tree.taps(pixels, splits)) == set(tree.taps(pixels, [2]))
    picture = Image.new("RGB", (70, 60))
    for wrong in (picture, np.zeros((1, 3, 56, 56)), [pixels], None, "picture.png"):
        for call in (tree, tree.features, tree.sweep, tree.taps, tree.trunk):
            refused(lambda call=call, wrong=wrong: call(wrong), type(wrong).__name__, "transform()")
    for kind in (torch.uint8, torch.int64, torch.bool):
        refused(lambda kind=kind: tree(torch.zeros(1, 3, 56, 56, dtype=kind)), str(kind), "normalised")
    refused(lambda: tree(pixels[0]), "[3, 56, 56]", "[batch, 3, 56, 56]")
    for split in (True, 2.5, [2], "deep", {"clip": True}, {"clip": None}, {1: 2}):
        refused(lambda split=split: tree(pixels, split=split))
    for weights in ([NAN, 1.0], 0.5, ["a", "b"]):
        refused(lambda weights=weights: tree.set_fusion("additive", weights=weights), "fusion_weights")
    for call in (tree.sweep, tree.taps, tree.walk):
        refused(lambda call=call: call(pixels, []), "splits are []")
        refused(lambda call=call: call(pixels, b"2"), "b'2'")
    assert torch.equal(tree(pixels, split=2), wanted)


def test_loading(saved):
    tree, folder = saved
    pixels = torch.randn(1, 3, 56, 56)
    for splits in (2, "2", [2.0], {"clip": 2}, np.array([2])):
        again = VSTEncoder.from_pretrained(folder, splits=splits)
        assert again.splits == [2]
        assert torch.equal(again(pixels), tree(pixels, split=2))
    for dtype in ("float16", "torch.float16", torch.float16):
        assert {p.dtype for p in VSTEncoder.from_pretrained(str(folder), dtype=dtype).parameters()} == {torch.float16}
    for dtype in ("int8", torch.int32, 16, "half?", float):
        refused(lambda dtype=dtype: VSTEncoder.from_pretrained(folder, dtype=dtype), "dtype", "float16")
    refused(lambda: VSTEncoder.from_pretrained(folder, splits=[True]), "True")
    refused(lambda: VSTEncoder.from_pretrained(folder, splits={"dino": [1]}), "'dino'", "'clip'")
    for source in (None, 3, ["a"], ""):
        refused(lambda source=source: VSTEncoder.from_pretrained(source), "saved tree")
    refused(lambda: VSTEncoder.from_config(tree.config.to_dict()), "VSTConfig")
    refused(lambda: VSTConfig.from_dict([1]), "mapping")
    refused(lambda: load_vfm(tree.config.trunk, grid="4", pretrained=False), "grid", "'4'")
    refused(lambda: load_vfm(tree.config.trunk, grid=0, pretrained=False), "grid", "0")
    refused(lambda: load_vfm(3), "3", "source")
    for part in ({"start": "a"}, {"stop": 2.5}, {"stop": True}, {"norm": "no"}, {"stem": 1}):
        refused(lambda part=part: load_vfm(tree.config.trunk, pretrained=False, **part), *part)
    refused(lambda: VSTEncoder(tree.config.to_dict()), "VSTConfig")
    refused(lambda: VFM(tree.config.to_dict(), 4), "VFMSpec")
    refused(lambda: FullTower(tree.config)(Image.new("RGB", (8, 8))), "Image", "transform()")


def test_fits(saved, pictures):
    tree, folder = saved
    where = folder
    for call in (fit_stitches, evaluate_stitches):
        refused(lambda call=call: call(str(folder), pictures), "from_pretrained", "tree")
        refused(lambda call=call: call(None, pictures), "None", "VSTEncoder")
    refused(lambda: fit_stitches(tree, pictures, 3), "FitConfig", "3")
    refused(lambda: fit_stitches(tree, pictures, epoch=3), "'epoch'", "'epochs'", kind=TypeError)
    refused(lambda: fit_stitches(tree, pictures, {"epochs": 0}), "epochs is 0")
    refused(lambda: evaluate_stitches(tree, pictures, batch_size=0), "batch_size is 0")
    refused(lambda: evaluate_stitches(tree, pictures, indices=[99]), "indices[0] is 99", "39")
    refused(lambda: evaluate_stitches(tree, pictures, indices=3), "indices is 3")
    refused(lambda: evaluate_stitches(tree, pictures, batch_size=10**30), "batch_size is 1")
    refused(lambda: evaluate_stitches(tree, pictures, skipped=[]), "skipped is []")
    for call in (fit_stitches, evaluate_stitches):
        refused(lambda call=call: call(tree, pictures, show_progress="no"), "show_progress is 'no'")
        refused(lambda call=call: call(tree, ""), "folder of pictures")
    refused(lambda: fit_stitches(tree, pictures, {3: 4}), "config", "{3: 4}")
    some = [
        evaluate_stitches(tree, pictures, indices=indices) for indices in ([0, 3], np.array([0, 3]), range(0, 4, 3))
    ]
    assert some[0] == some[1] == some[2]
    for targets in ([1], {"clip": "hf:x"}, {"clip": None}):
        refused(lambda targets=targets: fit_stitches(tree, pictures, targets=targets), "targets")
    for folder in (3, True, ""):
        refused(lambda folder=folder: fit_stitches(tree, pictures, folder=folder), "folder is")
    refused(lambda: fit_stitches(tree, pictures, resume="no"), "resume is 'no'")
    refused(lambda: tree.save_pretrained(None), "folder is None")
    refused(lambda: tree.save_pretrained(where / "config.json"), "folder is", "config.json")
    refused(lambda: tree.save_pretrained(where, overwrite="no"), "overwrite is 'no'")
    refused(lambda: tree.load_stitches(None), "folder is None")
    refused(lambda: VSTEncoder.from_pretrained(where, revision=3), "revision is 3")
    refused(lambda: VSTEncoder.from_args(tree.config), "args", "TreeArgs")
    refused(lambda: fit_stitches(tree, pictures, deepspeed="nowhere.json"), "deepspeed", "'nowhere.json'")


def test_features_after_a_fit_are_for_numpy(tree_of, pictures):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    pixels = torch.stack([tree.transform()(picture) for picture in pictures[:2]])
    assert tree.features(pixels)["clip"].tokens.requires_grad  # in training, for whoever trains through them
    fit_stitches(tree, pictures, {"objective": "ridge"}, show_progress=False)
    with torch.no_grad():
        wanted = tree.branch_tokens(pixels)["clip"].numpy()
    assert np.array_equal(tree.features(pixels)["clip"].tokens.numpy(), wanted)
    assert tree.branch_tokens(pixels)["clip"].requires_grad
    assert tree.train().features(pixels)["clip"].map.requires_grad


CONFIGS = [
    (FitConfig, {}, {
        "lr": [NAN, -1, 0, "x", True, 1e300], "epochs": [-1, 0, 1.5, True, "3"], "batch_size": [0, -4], "limit": [0],
        "workers": [-1], "weight_decay": [NAN, -1], "penalty": [NAN, -1], "warmup": [NAN, 1, -0.1], "cache": [3, ""],
        "cache_limit_gb": [NAN, 0], "deepspeed": [1, ""], "checkpointing": ["no"], "objective": [["ffm"], "x"],
        "match": [None], "start": [1], "seed": ["a", None, 0.5, 10**30], "save_every": [0], "heldout": [0],
        "calibration": [0], "precision": [None, "fp16"], "picture_mb": [0, NAN, "many"],
    }),
    (DemoConfig, {}, {
        "trunk": [["clip"], "x"], "splits": [[], [0], [2, 2], [13], 3], "grid": [0], "pictures": [0, "all"],
        "stitch": ["x", 3], "objectives": [["x"], [], "ridge"], "seeds": [[], ["a"], [1, 1]], "batch_size": [0],
        "repeats": [0], "heldout": [1], "fit": [3], "probe_train": [0], "probe_test": [0],
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


@pytest.mark.parametrize("value", ["{class_path: os.system, init_args: {command: ls}}", "{a: 1}", "text", "[x]"])
def test_values_of_another_type_are_one_sentence_on_the_command_line(tmp_path, capsys, value):
    (tmp_path / "x.yaml").write_text(f"batch_size: {value}")
    with pytest.raises(SystemExit):
        cli.main(["latency", "--path", "nowhere", "--config", str(tmp_path / "x.yaml")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: batch_size is ")
    assert "expected int, list[int]" in last


OWN = """
from vst.tree.stitches.base import register
from vst.tree.stitches.mapped import Linear


@register
class Own(Linear):
    family = "own_for_test"
"""


@pytest.mark.parametrize("how", ["own_for_test_module", "own_for_test_module.py", "yaml"])
def test_a_stitch_family_of_ones_own_from_the_command_line(tree_of, tmp_path, monkeypatch, capsys, how):
    import sys

    from vst.tree.stitches import STITCHES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_for_test_module.py").write_text(OWN)
    try:
        exec(OWN, {"__name__": "own"})
        tree_of("dinov2", "clip", splits=[1, 2], stitch="own_for_test").save_pretrained(tmp_path / "tree")
        del STITCHES["own_for_test"]
        with pytest.raises(SystemExit, match="import the module that registers it"):
            cli.main(["inspect", "tree"])
        (tmp_path / "x.yaml").write_text("import: own_for_test_module")
        cli.main(["inspect", "tree", *(["--config", "x.yaml"] if how == "yaml" else ["--import", how])])
        assert "own_for_test" in capsys.readouterr().out
    finally:
        STITCHES.pop("own_for_test", None)
        sys.modules.pop("own_for_test_module", None)


@pytest.mark.parametrize("name", ["bogus", "split_", "class_path"])
def test_an_option_that_there_is_not_is_told_with_the_name_of_what_was_called(tiny, plan, name):
    source = tiny("clip", 48)
    refused(lambda: plan(**{name: 1}), "VSTEncoder.plan", repr(name), "feature_layer", kind=TypeError)
    refused(lambda: VSTEncoder.from_vfms(source, [source], [1], **{name: 1}), "from_vfms", repr(name), kind=TypeError)
    for more in ({}, {"pretrained": False}):
        refused(lambda more=more: load_vfm(source, **more, **{name: 1}), "load_vfm", repr(name), kind=TypeError)
    refused(lambda: plan(feature_layr=1), "did you mean 'feature_layer'", kind=TypeError)


@torch.no_grad()
def test_depths_tokens_and_pixels_of_a_model(tiny):
    model = load_vfm(tiny("clip"))
    pixels = torch.randn(2, 3, 56, 56)
    wanted = model.taps(pixels, [1, 2])
    for depths in ((1, 2), {1, 2}, iter([2, 1]), np.array([1, 2]), torch.tensor([1, 2]), [1.0, 2], range(1, 3)):
        found = model.taps(pixels, depths)
        assert list(found) == [1, 2]
        assert all(type(depth) is int and torch.equal(found[depth], wanted[depth]) for depth in found)
    assert torch.equal(model.taps(pixels, 2)[2], wanted[2])
    assert torch.equal(model(pixels, 2.0), wanted[2])
    assert torch.equal(model.run(wanted[1], np.int64(1), 2.0), wanted[2])
    for depth in (1.5, "1", -1, True, 9, None, NAN, [1], b"1"):
        for call in (model.taps, model.walk):
            refused(lambda call=call, depth=depth: dict(call(pixels, [depth])), "depth", "0 to 4")
        if depth is not None:
            refused(lambda depth=depth: model(pixels, depth))
        refused(lambda depth=depth: model.run(wanted[1], 1, depth))
    refused(lambda: model.taps(pixels, []), "depths", "[]")
    for wrong in (None, "x", np.zeros((2, 17, 32)), wanted[1][0], wanted[1][..., :31], wanted[1].long()):
        for call in (lambda x: model.run(x, 0, 2), model.patches, model.features):
            refused(lambda call=call, wrong=wrong: call(wrong), "tokens", "[batch, tokens, 32]")
    for kind in (torch.float16, torch.bfloat16, torch.float64):  # as a tree does
        assert torch.equal(model(pixels.to(kind)), model(pixels.to(kind).float()))
    for strange in (pixels.transpose(2, 3).contiguous().transpose(2, 3), pixels.clone().requires_grad_()):
        assert torch.allclose(model(strange), model(pixels), atol=1e-5)
    assert model(pixels[:0]).shape == (0, 17, 32)
    refused(lambda: model(pixels.to("meta")), "on cpu", "on meta")
    refused(lambda: model.reset_parameters("a"), "seed", "'a'")
    for grid in (10**6, 10**30):
        refused(lambda grid=grid: load_vfm(tiny("clip"), grid=grid), "grid", "1024")
    for shape in ((2, 1, 56, 56), (2, 56, 56, 3), (2, 3, 57, 57), (2, 4, 56, 56)):
        refused(lambda shape=shape: model(torch.zeros(shape)), str(list(shape)), "[batch, 3, 56, 56]")


def test_what_the_halves_of_a_walk_are_handed(saved):
    tree, _ = saved
    pixels = torch.randn(1, 3, 56, 56)
    taps = tree.taps(pixels)
    wanted = tree.branch_tokens(pixels)
    assert all(torch.equal(x, wanted[name]) for name, x in tree.from_taps(taps).items())
    for wrong in (None, 3, "x", list(taps.values()), {**taps, "a": pixels}, {2: "x"}, {2: taps[2].numpy(force=True)}):
        refused(lambda wrong=wrong: tree.from_taps(wrong), "taps")
    for wrong in (taps[2][:, :9], taps[2][..., :5], taps[2][0]):
        refused(lambda wrong=wrong: tree.from_taps({**taps, 2: wrong}), "taps[2]", str(list(wrong.shape)))
    other = FullTower(tree.config)
    for wrong in (None, 3, pixels, {"clip": pixels}):
        refused(lambda wrong=wrong: FullEncoders.forward(other, wrong), "dinov2")
    refused(lambda: tree.transform()(Image.new("RGB", (0, 5))), "0 x 5")


def test_measurements(saved, tmp_path):
    tree, config = saved[0], saved[0].config
    for call in (measure_tree, measure_fit):
        name = call.__name__
        for given in (None, "folder", config):
            refused(lambda call=call, given=given: call(given), name, "VSTEncoder")
        for value in (0, -1, NAN, INF, True, 10**30, "2", None, 1.5):
            refused(lambda call=call, value=value: call(tree, batch_size=value, repeats=1), "batch_size")
        for value in (0, -1, NAN, INF, True, "2", None, 1.5):
            refused(
                lambda call=call, value=value: call(tree, repeats=value, batch_size=1, show_progress=False), "repeats"
            )
        for device in ("tpu", "cuda:99", 99, None, 3.5, True, ""):
            refused(lambda call=call, device=device: call(tree, device=device), "device", "auto, cpu")
    refused(lambda: measure_tree(tree, dtype="int8"), "dtype", "int8")
    refused(lambda: runner("tree"), "tower", "'tree'")
    for option in ({"bf16": "no"}, {"checkpointing": 1}, {"cache": 3}, {"cache": ""}, {"objective": "x"}):
        refused(lambda option=option: measure_fit(tree, **option), *option)
    for value in (None, 3, {}, BenchmarkConfig):
        refused(lambda value=value: benchmark(tree, value), "config", "BenchmarkConfig")
    refused(lambda: benchmark(tree, BenchmarkConfig(device="cuda:99")), "device", "cuda:99")
    for flag in ("resume", "overwrite"):
        refused(lambda flag=flag: benchmark(tree, BenchmarkConfig(), **{flag: True}), flag, "run folder")
        refused(lambda flag=flag: benchmark(tree, BenchmarkConfig(), tmp_path / "x", **{flag: "no"}), f"{flag} is 'no'")
    for cost in (tree_cost, full_cost, fit_flops, extra_blocks, activation_bytes):
        refused(lambda cost=cost: cost(tree), "config", "VSTConfig")
    assert fit_flops(config, 2) == fit_flops(config, [2.0]) == fit_flops(config, [2])
    for split in (True, "x", 9, [[1]], []):
        refused(lambda split=split: fit_flops(config, split))
    for value in (None, 3, {}, "protocol.yaml"):
        refused(lambda value=value: run_protocol(tmp_path / "y", value), "config", "ProtocolConfig")
    rows = [{"name": "a", "kind": "split", "split": 1, "median_ms": 9.0, "ratio": 0.5}]
    for value in (0, -1, NAN, INF, True, "300", [1]):
        refused(lambda value=value: recommend(rows, latency_ms=value), "latency_ms")
    for value in (None, "runs/demo", 3):
        refused(lambda value=value: recommend(value, budget="2x"), "rows")
        if not isinstance(value, str):
            refused(lambda value=value: measured_rows(value), "folder")


def test_trunks_to_compare(tiny, pictures):
    models = [tiny("dinov2"), tiny("clip", 48)]
    config = TrunkConfig(splits=[1], repeats=0, pictures=8, heldout=4)

    def compared(models=models, config=config, **options):
        return compare_trunks(models, pictures[:16], config, show_progress=False, **options)["rows"]

    paths = [Path(source.partition(":")[2]) for source in models]
    assert [r["errors"] for r in compared(paths)] == [r["errors"] for r in compared()]
    for wrong in (None, 3, "clip", models[:1], [3, 4], iter(models)):
        refused(lambda wrong=wrong: compared(wrong))
    for wrong in (3, "x", {"splits": [1]}):
        refused(lambda wrong=wrong: compared(config=wrong), "config", "TrunkConfig")
    for device in ("tpu", "cuda:99", 99, None):
        refused(lambda device=device: compared(device=device), "device")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["latency", "--resume"], "need a run folder"),
        (["latency", "--overwrite"], "need a run folder"),
        (["latency", "--device", "cuda:99"], "cuda:99"),
        (["throughput", "--overwrite"], "needs a run folder"),
        (["throughput", "--pictures", "0"], "pictures is 0"),
        (["trunk", "--overwrite", "--images", "x"], "needs a run folder"),
        (["trunk", "--images", ""], "'', but"),
        (["trunk", "--compare.stitch", "xyz", "--images", "x"], "xyz"),
        (["recommend", "--results", "x", "--latency_ms", ".nan"], "x holds no results.json"),
    ],
)
def test_options_of_commands_that_would_do_nothing(saved, tiny, monkeypatch, tmp_path, words, told):
    monkeypatch.chdir(tmp_path)
    more = ["--path", str(saved[1])] if words[0] in ("latency", "throughput") else []
    more = ["--models", f"[{tiny('dinov2')},{tiny('clip', 48)}]"] if words[0] == "trunk" else more
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *more])
    assert told in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


# The walk: of every public name, each option with a value that has to change what comes out, or to be refused.


def options_of(name):
    """The options of a public name: the parameters of what is called."""
    value = getattr(vst, name)
    call = value.from_vfms if value is VSTEncoder else value
    return [n for n, p in inspect.signature(call).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD]


def specs():
    base = {"source": "x:a", "family": "vit", "width": 32, "depth": 4, "heads": 2, "patch": 14, "hidden": 64}
    return VFMSpec(**base, image_size=56)


SPEC = {
    "source": "x:b", "family": "clip", "width": 64, "depth": 5, "heads": 4, "patch": 7, "hidden": 65, "image_size": 70,
    "mlp": "swiglu", "cls": False, "registers": 2, "layer_scale": True, "pre_norm": True, "qkv_bias": False,
    "norm_eps": 1e-3, "position": "rotary", "rope_temperature": 50.0, "antialias": True, "mean": (0.1, 0.1, 0.1),
    "std": (0.1, 0.1, 0.1), "license": "mit",
}  # fmt: skip
BRANCH = {
    "name": "other", "spec": "spec", "splits": (1, 3), "enters": (2, 2), "stop": 2, "stitch": "linear"
}  # fmt: skip
TREE = {
    "trunk": "trunk", "branches": {"b": "branch"}, "splits": [2], "image_size": 112, "pretrained": False, "seed": 5,
    "enters": {"a": [2, 3]}, "stitch": "mlp", "keep_trunk": False, "feature_layer": -1, "feature_norm": True,
    "fusion": "sequence", "fusion_weights": [0.2, 0.8], "normalise": "none", "cut": "pad", "split": 2,
}  # fmt: skip
FIT = {
    "objective": "lfm", "match": "raw", "start": "random", "calibration": 8, "penalty": 10.0, "epochs": 2,
    "batch_size": 8, "lr": 1e-2, "weight_decay": 5.0, "warmup": 0.9, "heldout": 4, "limit": 20, "seed": 7,
}  # fmt: skip
# These change how a fit is run, and are held to change nothing of what it gives.
OPERATIONAL = {"precision", "checkpointing", "cache", "cache_limit_gb", "workers", "save_every", "deepspeed"}
BOUNDS = {"picture_mb"}  # which pictures are read at all


def test_every_option_of_a_spec_changes_it():
    assert set(SPEC) == set(options_of("VFMSpec"))
    for name, value in SPEC.items():
        other = dataclasses.replace(specs(), **{name: value})
        assert other != specs(), name
        assert other.to_dict() != specs().to_dict(), name


def test_every_option_of_a_branch_changes_it():
    assert set(BRANCH) == set(options_of("BranchConfig"))
    base = BranchConfig("a", specs(), (1, 2), (1, 2), 3)
    values = {**BRANCH, "spec": dataclasses.replace(specs(), width=64), "stitch": vst.tree.stitches.StitchSpec("mlp")}
    for name, value in values.items():
        assert dataclasses.replace(base, **{name: value}) != base, name


@torch.no_grad()
def test_every_option_of_a_tree_changes_its_tokens(tiny):
    assert set(options_of("VSTEncoder")) <= set(TREE)
    assert set(TREE) == {f.name for f in dataclasses.fields(vst.tree.options.TreeArgs)}
    base = {"trunk": tiny("dinov2"), "branches": {"a": tiny("clip", 32)}, "splits": [1, 2], "image_size": 56}

    def out(**changes):
        tree = VSTEncoder.from_vfms(**{**base, **changes})
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
        return tree.splits, tree.config.names, tree(tree.transform()(picture)[None])

    def same(a, b):
        return a[:2] == b[:2] and a[2].shape == b[2].shape and torch.equal(a[2], b[2])

    wanted = out()
    assert same(out(), wanted)
    values = {**TREE, "trunk": tiny("dinov2", seed=5), "branches": {"b": tiny("siglip", 48)}, "split": 1}
    for name, value in values.items():
        more = {"fusion": "additive"} if name == "fusion_weights" else {}
        assert not same(out(**more, **{name: value}), out(**more)), name


def test_every_option_of_a_fit_changes_the_stitches(tree_of, pictures):
    assert set(FIT) | OPERATIONAL | BOUNDS == {f.name for f in dataclasses.fields(FitConfig)}
    tree = tree_of("dinov2", "clip", splits=[1])
    start = {n: t.clone() for n, t in tree.state_dict().items()}

    def fitted(**changes):
        tree.load_state_dict(start)
        torch.manual_seed(0)
        result = fit_stitches(tree, pictures, {"batch_size": 16, **changes}, show_progress=False)
        return result, torch.cat([p.detach().flatten() for s in tree.stitches().values() for p in s.parameters()])

    _, wanted = fitted()
    assert torch.equal(fitted()[1], wanted)
    for name, value in FIT.items():
        result, found = fitted(**{name: value})
        assert not torch.equal(found, wanted), name
        assert result.reports


def test_every_option_of_loading_a_model_matters(tiny):
    source = tiny("clip")
    values = {
        "source": tiny("dinov2"), "grid": 2, "image_size": 70, "pretrained": False, "seed": 1, "start": 1, "stop": 2,
        "stem": False, "norm": False,
    }  # fmt: skip
    assert set(options_of("load_vfm")) <= set(values)

    def state(**changes):
        first = {"source": source, **changes}
        return load_vfm(first.pop("source"), **first).state_dict()

    for name, value in values.items():
        more = {"pretrained": False} if name == "seed" else {}
        a, b = state(**more), state(**more, **{name: value})
        assert set(a) != set(b) or any(a[n].shape != b[n].shape or not torch.equal(a[n], b[n]) for n in a), name
    refused(lambda: state(grid=4, image_size=56), "grid=4", "image_size=56")


def test_every_option_of_an_evaluation_changes_the_report(tree_of, pictures, picture_folder, capsys):
    tree = tree_of("dinov2", "clip", splits=[1])
    other = tree_of("dinov2", "clip", splits=[1], seed=1)
    values = {"tree": other, "images": pictures[1:9], "indices": [0, 1]}
    assert set(values) | {"targets", "skipped", "batch_size", "show_progress"} == set(options_of("evaluate_stitches"))

    def reported(**changes):
        given = {"tree": tree, "images": pictures[:8], **changes}
        return [r.to_dict() for r in evaluate_stitches(given.pop("tree"), given.pop("images"), **given)]

    wanted = reported()
    assert reported() == wanted
    for name, value in values.items():
        assert reported(**{name: value}) != wanted, name
    spec = tree.config.branches[0].spec
    assert reported(targets={"clip": load_vfm(spec)}) == wanted
    refused(lambda: reported(targets={"clip": load_vfm(spec, pretrained=False)}), "it is another checkpoint")
    sizes = []
    seen = tree.trunk.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for size in (3, 8):
        [report] = reported(batch_size=size)
        assert report["final"]["error"] == pytest.approx(wanted[0]["final"]["error"], rel=1e-4)
    seen.remove()
    assert sizes == [3, 3, 2, 8]
    skipped: dict[str, str] = {}
    evaluate_stitches(tree, ["nowhere.png", picture_folder / "000.png"], skipped=skipped)
    assert list(skipped) == ["nowhere.png"]
    capsys.readouterr()
    reported(show_progress=True)
    assert "held-out pictures" in "".join(capsys.readouterr())


def test_operational_options_of_a_fit_are_observed(tree_of, pictures, tmp_path, monkeypatch):
    """They change how a fit is run and, precision aside, nothing of what it gives; each is seen where it acts."""
    from torch.utils import checkpoint as recomputing

    from vst.fit import loop

    seen = {"states": [], "recomputed": 0}

    def fitted(**changes):
        tree = tree_of("dinov2", "clip", splits=[1])
        folder = changes.pop("folder", None)
        fit_stitches(tree, pictures, {"epochs": 2, "heldout": 4, **changes}, folder=folder, show_progress=False)
        return torch.cat([p.detach().flatten() for s in tree.stitches().values() for p in s.parameters()])

    def loader(*args, **options):
        seen["workers"] = options.get("num_workers", 0)
        return torch.utils.data.DataLoader(*args, **options)

    own_save, own_checkpoint = loop.save_state, recomputing.checkpoint

    def save(accelerator, run, facts):
        seen["states"].append(facts["step"])
        own_save(accelerator, run, facts)

    def checkpoint(*args, **options):
        seen["recomputed"] += 1
        return own_checkpoint(*args, **options)

    monkeypatch.setattr(loop, "DataLoader", loader)
    monkeypatch.setattr(loop, "save_state", save)
    monkeypatch.setattr(recomputing, "checkpoint", checkpoint)
    wanted = fitted()
    assert seen["workers"] == 0
    assert torch.equal(fitted(workers=1), wanted)
    assert seen["workers"] == 1
    assert seen["recomputed"] == 0
    assert torch.equal(fitted(checkpointing=True), wanted)
    assert seen["recomputed"] > 0
    assert seen["states"] == []
    batches = fitted(batch_size=16)
    for every in (1, 2):
        assert torch.equal(fitted(save_every=every, batch_size=16, folder=tmp_path / f"every-{every}"), batches)
        assert seen["states"] == list(range(every, 6, every)), every  # after the last of six steps there are results
        seen["states"].clear()
    assert torch.equal(fitted(precision="fp32"), wanted)
    assert not torch.equal(fitted(precision="bf16"), wanted)
    assert torch.allclose(fitted(cache=str(tmp_path / "c")), wanted, atol=1e-2)  # halves are kept
    assert (tmp_path / "c").exists()
    refused(lambda: fitted(cache=str(tmp_path / "d"), cache_limit_gb=1e-8), "cache_limit_gb")


def test_no_public_name_is_left_out_of_the_walk():
    walked = {"VFMSpec", "BranchConfig", "VSTEncoder", "FitConfig", "fit_stitches", "load_vfm", "evaluate_stitches"}
    results = {"Features", "FitResult", "StitchReport"}  # what comes out: nothing is chosen there
    elsewhere = {"VFM", "VSTConfig"}  # by what makes them: load_vfm, VSTEncoder.plan
    assert walked | results | elsewhere == set(vst.__all__)
