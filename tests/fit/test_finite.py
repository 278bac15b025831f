"""Numbers that are not finite, and runs that are resumed as others: a fit stops and keeps what was good."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vst import VSTEncoder, fit_stitches
from vst.fit.matching import Matcher
from vst.fit.teacher import Teacher


def spoiled_from(monkeypatch, call, only=None):
    """Losses of a fit that are not numbers from one step on, of all stitches or of one."""
    own, calls = Matcher.forward, []

    def forward(self, *args):
        calls.append(1)
        losses = own(self, *args)
        if len(calls) < call:
            return losses
        factor = torch.ones(len(losses))
        factor[slice(None) if only is None else only] = float("nan")
        return losses * factor

    monkeypatch.setattr(Matcher, "forward", forward)


@pytest.mark.parametrize("step", [3, 10, 14])
def test_the_first_step_is_named_and_the_state_before_it_is_kept(tree_of, pictures, tmp_path, monkeypatch, step):
    spoiled_from(monkeypatch, step, only=1)
    options = {"folder": tmp_path / "run", "epochs": 4, "batch_size": 8, "save_every": 2, "show_progress": False}
    with pytest.raises(RuntimeError, match=rf"loss of clip@3 is not finite at step {step}: lower lr"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, **options)
    assert not (tmp_path / "run" / "stitches").exists()
    assert not (tmp_path / "run" / "results.json").exists()
    state = max((tmp_path / "run" / "state").glob("step-*"))
    assert int(state.name[5:]) == (step - 1) // 2 * 2
    assert all(torch.isfinite(t).all() for t in load_file(state / "model.safetensors").values())
    monkeypatch.undo()
    resumed, whole = tree_of("dinov2", "clip"), tree_of("dinov2", "clip")
    fit_stitches(resumed, pictures, **options, resume=True)
    fit_stitches(whole, pictures, **(options | {"folder": tmp_path / "whole"}))
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


def spoil_after(monkeypatch, step):
    """An update that overflows, after the last look at its loss."""
    own, calls = torch.optim.AdamW.step, []

    def overflowing(self, *args, **kwargs):
        out = own(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == step:
            self.param_groups[0]["params"][0].data.flatten()[0] = float("inf")
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", overflowing)


@pytest.mark.parametrize("step", [2, 4])
def test_weights_that_are_not_finite_are_not_saved(tree_of, pictures, tmp_path, monkeypatch, step):
    spoil_after(monkeypatch, step)
    options = {"folder": tmp_path / "run", "epochs": 1, "batch_size": 8, "save_every": 2, "show_progress": False}
    with pytest.raises(RuntimeError, match=rf"weights of clip@1 are not finite after step {step}"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, **options)
    assert not (tmp_path / "run" / "stitches").exists()
    assert [p.name for p in (tmp_path / "run").glob("state/step-*")] == ([] if step == 2 else ["step-00000002"])


def stopped(tree, pictures, folder, monkeypatch):
    """A fit that ended after its first state."""
    options = {"folder": folder, "epochs": 1, "batch_size": 8, "save_every": 2, "show_progress": False}
    with monkeypatch.context() as patch:
        spoiled_from(patch, 3)
        with pytest.raises(RuntimeError, match="not finite"):
            fit_stitches(tree, pictures, **options)
    return options


@pytest.mark.parametrize("step", [99999, 0, 4, 3, "2"])
def test_a_state_that_tells_of_another_step_is_refused(tree_of, pictures, tmp_path, monkeypatch, step):
    options = stopped(tree_of("dinov2", "clip"), pictures, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / "state" / "step-00000002" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": step}))
    with pytest.raises(ValueError, match=r"step-00000002 is damaged .*resume, which starts from the first step"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, **options, resume=True)


def test_other_frozen_weights_under_the_same_names_are_refused(tiny, tree_of, pictures, tmp_path, monkeypatch):
    models = tiny("dinov2", 32, 4), [tiny("clip", 48, 4, seed=1)]
    options = stopped(VSTEncoder.from_vfms(*models, (1, 3), 56), pictures, tmp_path / "run", monkeypatch)
    other = VSTEncoder.from_vfms(*models, (1, 3), 56)
    for p in other.trunk.parameters():
        p.data = p.data * 1.01
    with pytest.raises(ValueError, match=r"cannot be resumed because its config differs in weights \("):
        fit_stitches(other, pictures, **options, resume=True)
    fit_stitches(VSTEncoder.from_vfms(*models, (1, 3), 56), pictures, **options, resume=True)


def test_a_run_of_an_earlier_version_goes_on(tree_of, pictures, tmp_path, monkeypatch):
    options = stopped(tree_of("dinov2", "clip"), pictures, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / "run.json"
    noted = json.loads(file.read_text())
    del noted["weights"]
    file.write_text(json.dumps(noted))
    fit_stitches(tree_of("dinov2", "clip"), pictures, **options, resume=True)
    assert (tmp_path / "run" / "results.json").is_file()


def test_every_frozen_tensor_counts(tree_of):
    tree = tree_of("dinov2", "clip")
    teacher = Teacher(tree)
    before = teacher.fingerprint()
    tensors = {n: t for n, t in tree.state_dict().items() if ".stitches." not in n and t.is_floating_point()}
    for value in tensors.values():
        kept = value.clone()
        value.add_(1e-3)
        assert teacher.fingerprint() != before
        value.copy_(kept)
    next(iter(tree.stitches().values())).patches.inner.linear.weight.data.add_(1)
    assert teacher.fingerprint() == before
