"""vst export: files that other runtimes read, compared there with the tree."""

import json

import numpy as np
import pytest
import torch
from export_kit import FAMILIES, built, pixels_of

from vst import cli
from vst.export import programs
from vst.export.programs import export_tree

pytest.importorskip("onnxscript")
ort = pytest.importorskip("onnxruntime")


def run(folder, pixels):
    session = ort.InferenceSession(str(folder / "tree.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixels": pixels.numpy()}), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onnx_gives_the_trees_tokens(tree_of, tmp_path, name):
    tree = built(tree_of, name)
    before = {k: v.clone() for k, v in tree.state_dict().items()}
    parity = export_tree(tree, tmp_path / "out", split=1, show_progress=False)
    assert parity.error < 1e-4
    for batch in (1, 4):
        pixels = pixels_of(tree, batch)
        with torch.no_grad():
            want = tree(pixels, split=1)
        found = run(tmp_path / "out", pixels)
        assert list(found) == ["tokens"]
        np.testing.assert_allclose(found["tokens"], want.numpy(), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in tree.state_dict().items())


def test_every_branch_is_an_output(tree_of, tmp_path):
    tree = built(tree_of, "dinov3-siglip-clip")
    pixels = pixels_of(tree, 3)
    split = {"siglip": 1, "clip": 3}
    export_tree(tree, tmp_path / "out", split=split, by_branch=True, fold=False, show_progress=False)
    with torch.no_grad():
        want = tree.branch_tokens(pixels, split)
    found = run(tmp_path / "out", pixels)
    assert list(found) == list(want)
    for name, x in want.items():
        np.testing.assert_allclose(found[name], x.numpy(), rtol=1e-3, atol=1e-4)
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["split"] == split
    assert facts["outputs"] == {name: ["batch", *x.shape[1:]] for name, x in want.items()}
    assert facts["folded"] is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_own_program(tree_of, tmp_path, dtype):
    tree = built(tree_of, "clip-dinov2-registers").to(dtype)
    parity = export_tree(tree, tmp_path / "out", split=3, format="torch-export", show_progress=False)
    assert parity.runtime == "torch"
    program = torch.export.load(tmp_path / "out" / "tree.pt2").module()
    pixels = pixels_of(tree, 4).to(dtype)
    with torch.no_grad():
        want, (found,) = tree(pixels, split=3), program(pixels)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance)


def test_the_command(tree_of, tmp_path, capsys):
    tree = built(tree_of, "dinov2-clip")
    folder, out = str(tree.save_pretrained(tmp_path / "tree")), tmp_path / "out"
    cli.main(["export", folder, "--split", "1", "--out", str(out)])
    told = capsys.readouterr().out
    assert (f"split 1: {out / 'tree.onnx'}\nonnxruntime on the CPU against the tree: relative") in told
    assert sorted(p.name for p in out.iterdir()) == ["export.json", "preprocessor_config.json", "tree.onnx"]
    with torch.no_grad():
        np.testing.assert_allclose(run(out, pixels_of(tree, 1))["tokens"], tree(pixels_of(tree, 1), 1), atol=1e-4)
    assert str(tmp_path).encode() not in (out / "tree.onnx").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(SystemExit, match="holds an export already"):
        cli.main(["export", folder, "--out", str(out)])
    cli.main(["export", folder, "--format", "torch-export", "--out", str(out), "--overwrite", "true"])
    assert (out / "tree.pt2").exists()
    assert not (out / "tree.onnx").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"format": "tflite"}, "format is 'tflite'; expected onnx or torch-export"),
        ({"split": 2}, "holds no stitch at split 2"),
        ({"by_branch": "yes"}, "by_branch is 'yes'"),
        ({"fold": 1}, "fold is 1"),
    ],
)
def test_wrong_options(tree_of, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        export_tree(built(tree_of, "linear"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bf16_is_for_torchs_own_format(tree_of, tmp_path):
    tree = built(tree_of, "linear").bfloat16()
    with pytest.raises(ValueError, match="dtype is bfloat16, in which ONNX"):
        export_tree(tree, tmp_path / "out")
    folder = str(tree.save_pretrained(tmp_path / "tree"))
    with pytest.raises(SystemExit, match="dtype is bfloat16, in which ONNX"):
        cli.main(["export", folder, "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert not (tmp_path / "out").exists()


class InvalidGraph(Exception):
    """As onnxruntime names its kinds."""


class NotImplemented(Exception):
    """As onnxruntime names its kinds."""


def test_what_cannot_be_run_is_not_kept(tree_of, tmp_path, monkeypatch):
    def refuses(path, kind):
        raise kind(f"Load model from {path} failed")

    monkeypatch.setattr(programs, "onnx_runner", lambda path: refuses(path, InvalidGraph))
    with pytest.raises(ValueError, match=r"was not kept: onnxruntime: Load model from tree\.onnx failed"):
        export_tree(built(tree_of, "linear"), tmp_path / "out", show_progress=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(programs, "onnx_runner", lambda path: refuses(path, NotImplemented))
    parity = export_tree(built(tree_of, "linear"), tmp_path / "out", show_progress=False)
    assert parity.reason == "onnxruntime does not take it (Load model from tree.onnx failed)"


def test_a_tree_stays_as_it_is(tree_of, tmp_path):
    tree = built(tree_of, "linear").train()
    tree.trunk.eval()
    modes = [part.training for part in tree.modules()]
    export_tree(tree, tmp_path / "out", format="torch-export", show_progress=False)
    assert [part.training for part in tree.modules()] == modes


def test_a_folder_that_holds_something_else(tree_of, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds something that is no export"):
        export_tree(built(tree_of, "linear"), tmp_path, overwrite=True)


def test_other_tokens_are_not_kept(tree_of, tmp_path, monkeypatch):
    """What was exported is run; here its weights are spoilt on the way."""
    tree = built(tree_of, "linear")
    alone = programs.alone_at

    def spoilt(*args):
        part = alone(*args)
        with torch.no_grad():
            weight = next(iter(part.stitches().values())).patches.inner.weight
            weight.add_(torch.randn(weight.shape))
        return part

    export_tree(tree, tmp_path / "out", show_progress=False)
    kept = (tmp_path / "out" / "tree.onnx").read_bytes()
    monkeypatch.setattr(programs, "alone_at", spoilt)
    with pytest.raises(ValueError, match="gives other tokens than the tree itself"):
        export_tree(tree, tmp_path / "out", overwrite=True, show_progress=False)
    assert (tmp_path / "out" / "tree.onnx").read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_missing_packages_are_named(tree_of, tmp_path, monkeypatch):
    real = programs.importlib.util.find_spec
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda n: None if n == "onnxscript" else real(n))
    with pytest.raises(ImportError, match=r"needs onnxscript.*vfm-stitch-tree\[export\]"):
        export_tree(built(tree_of, "linear"), tmp_path / "out")
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda n: None if n == "onnxruntime" else real(n))
    parity = export_tree(built(tree_of, "linear"), tmp_path / "out", show_progress=False)
    assert str(parity) == "not compared: onnxruntime is not installed"
