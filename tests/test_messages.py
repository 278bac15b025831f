"""What is plainly meant is taken, and what is wrong is told in one sentence that names it: at every public boundary."""

from pathlib import Path

import numpy as np
import pytest
import torch
from messages_kit import NAN, refused
from PIL import Image

from vst import VFM, VFMSpec, VSTConfig, VSTEncoder, evaluate_stitches, fit_stitches, load_vfm
from vst.models.checkpoints import describe
from vst.tree.baseline import FullTower

pytest_plugins = ("messages_kit",)


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
    refused(lambda: plan(branches={name: tiny("clip", 48)}), f"Branch name {name!r} is ")


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


@pytest.mark.parametrize("name", ["bogus", "split_", "class_path"])
def test_an_option_that_there_is_not_is_told_with_the_name_of_what_was_called(tiny, plan, name):
    source = tiny("clip", 48)
    refused(lambda: plan(**{name: 1}), "VSTEncoder.plan", repr(name), "feature_layer", kind=TypeError)
    refused(lambda: VSTEncoder.from_vfms(source, [source], [1], **{name: 1}), "from_vfms", repr(name), kind=TypeError)
    for more in ({}, {"pretrained": False}):
        refused(lambda more=more: load_vfm(source, **more, **{name: 1}), "load_vfm", repr(name), kind=TypeError)
    refused(lambda: plan(feature_layr=1), "did you mean 'feature_layer'", kind=TypeError)
