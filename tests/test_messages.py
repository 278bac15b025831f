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
from vst.measure.benchmark import BenchmarkConfig
from vst.models.checkpoints import describe
from vst.protocol import ProtocolConfig, TaskConfig, TrainConfig
from vst.tree.baseline import FullTower
from vst.trunk.compare import TrunkConfig

NAN = float("nan")
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
    for call in (fit_stitches, evaluate_stitches):
        refused(lambda call=call: call(str(folder), pictures), "from_pretrained", "tree")
        refused(lambda call=call: call(None, pictures), "None", "VSTEncoder")
    refused(lambda: fit_stitches(tree, pictures, 3), "FitConfig", "3")
    refused(lambda: fit_stitches(tree, pictures, epoch=3), "'epoch'", "'epochs'", kind=TypeError)
    refused(lambda: fit_stitches(tree, pictures, {"epochs": 0}), "epochs is 0")
    refused(lambda: evaluate_stitches(tree, pictures, batch_size=0), "batch_size is 0")
    refused(lambda: evaluate_stitches(tree, pictures, indices=[99]), "indices[0] is 99", "39")
    refused(lambda: evaluate_stitches(tree, pictures, indices=3), "indices is 3")
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
        "lr": [NAN, -1, 0, "x", True], "epochs": [-1, 0, 1.5, True, "3"], "batch_size": [0, -4], "limit": [0],
        "workers": [-1], "weight_decay": [NAN, -1], "penalty": [NAN, -1], "warmup": [NAN, 1, -0.1], "cache": [3],
        "cache_limit_gb": [NAN, 0], "deepspeed": [1], "checkpointing": ["no"], "objective": [["ffm"], "x"],
        "match": [None], "start": [1], "seed": ["a", None, 0.5], "save_every": [0], "heldout": [0],
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
        "splits": [[], [0], "6"], "grid": [0], "stitch": [3], "cut": ["x"], "seed": ["a"], "pictures": [1],
        "heldout": [0], "repeats": [-1], "batch_size": [0], "picture_mb": [0, "many"],
    }),
    (BenchmarkConfig, {}, {
        "batch_sizes": [[0], 1, []], "dtypes": [["x"], "float32"], "repeats": [0, 1.5], "device": [3],
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


def test_no_public_name_is_left_out_of_the_walk():
    walked = {"VFMSpec", "BranchConfig", "VSTEncoder", "FitConfig", "fit_stitches", "load_vfm"}
    results = {"Features", "FitResult", "StitchReport"}  # what comes out: nothing is chosen there
    elsewhere = {"VFM", "VSTConfig", "evaluate_stitches"}  # by what makes them: load_vfm, VSTEncoder.plan, fit_stitches
    assert walked | results | elsewhere == set(vst.__all__)
