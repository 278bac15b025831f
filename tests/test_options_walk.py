"""The walk: each option of every public name has a value that changes what comes out, or that is refused."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from messages_kit import refused
from PIL import Image

import vst
from vst import BranchConfig, FitConfig, TuneConfig, VFMSpec, VSTEncoder, evaluate_stitches, fit_stitches, load_vfm


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
    "objective": "lfm",
    "match": "raw",
    "start": "random",
    "calibration": 8,
    "penalty": 10.0,
    "epochs": 2,
    "batch_size": 8,
    "lr": 1e-2,
    "weight_decay": 5.0,
    "warmup": 0.9,
    "heldout": 4,
    "limit": 20,
    "seed": 7,
    "hints": 1,
    "beyond": True,
    "augment": True,
    "tune": {"tails": "norms"},
}
TUNE = {
    "trunk": "none", "tails": "none", "rank": 2, "alpha": 1.0, "matrices": "mlp", "lr": 1e-2, "own": 50.0,
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
    start, config = {n: t.clone() for n, t in tree.state_dict().items()}, tree.config

    def fitted(**changes):
        tree.config, tree.changes = config, None
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
    assert set(TUNE) == {f.name for f in dataclasses.fields(TuneConfig)}
    both = {"trunk": "lora", "tails": "lora", "lr": 0.1}
    _, wanted = fitted(tune=both, epochs=2)
    for name, value in TUNE.items():
        assert not torch.equal(fitted(tune={**both, name: value}, epochs=2)[1], wanted), name


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
    walked = {"VFMSpec", "BranchConfig", "VSTEncoder", "FitConfig", "TuneConfig"}
    walked |= {"fit_stitches", "load_vfm", "evaluate_stitches", "evaluate_trunk"}
    results = {"Features", "FitResult", "StitchReport"}  # what comes out: nothing is chosen there
    elsewhere = {"VFM", "VSTConfig"}  # by what makes them: load_vfm, VSTEncoder.plan
    assert walked | results | elsewhere == set(vst.__all__)
