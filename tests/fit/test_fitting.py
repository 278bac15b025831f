"""Fitting: it learns, it resumes bit for bit, it does not care how many processes run it or how pictures are broken."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vst import FitConfig, VSTEncoder, evaluate_stitches, fit_stitches
from vst.fit.cache import TargetCache, cache_bytes, check_room, digest
from vst.fit.config import rate_factor
from vst.fit.matching import Matcher
from vst.fit.teacher import Teacher, transforms

SCRIPT = Path(__file__).parents[2] / "train" / "stitch.py"


def state_of(tree):
    return {k: v.clone() for k, v in tree.state_dict().items()}


@pytest.mark.parametrize("family", ["linear", "mlp", "mlp_skip", "lora"])
@pytest.mark.parametrize("objective", ["ffm", "lfm"])
def test_fitting_lowers_what_it_optimises_and_moves_nothing_else(tree_of, pictures, family, objective):
    tree = tree_of("dinov2", "clip", splits=[1, 2], widths=(32, 32), stitch=family)
    if family != "lora":
        fit_stitches(tree, pictures, objective="ridge", show_progress=False)
    start = evaluate_stitches(tree, pictures)
    before = state_of(tree)
    result = fit_stitches(tree, pictures, objective=objective, epochs=12, lr=3e-3, batch_size=8, show_progress=False)
    end = evaluate_stitches(tree, pictures)
    for a, b in zip(start, end, strict=True):
        if objective == "ffm":
            assert b.final.channel_error < a.final.channel_error
        else:  # the ridge start is the best linear map at the seam already, and mlp's ReLU starts open
            assert b.seam.channel_error < a.seam.channel_error * (1.01 if family in ("linear", "mlp") else 1)
    assert result.history[-1]["mean"] < result.history[0]["mean"]
    assert result.steps == 12 * 4
    after = state_of(tree)
    moved = {k for k in after if not torch.equal(after[k], before[k])}
    assert moved
    assert all(".stitches." in k for k in moved)


def test_a_fit_that_ends_above_its_start_says_so(tree_of, pictures):
    def fit(lr):
        return fit_stitches(tree_of(splits=[1]), pictures, lr=lr, batch_size=4, show_progress=False)

    with pytest.warns(UserWarning, match="The loss ended at .* after 8 steps, above the .* of its first step") as told:
        risen = fit(10.0)
    ended, began = risen.history[-1]["mean"], risen.history[0]["mean"]
    assert ended > began
    assert any(f"ended at {ended:.3f} after 8 steps, above the {began:.3f}" in str(w.message) for w in told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        still = fit(1e-12)
    assert still.history[0]["step"] == risen.history[0]["step"] == 1
    assert still.history[0]["mean"] == pytest.approx(began)  # that of the closed form


def test_ffm_ends_closer_than_ridge_and_lfm_at_the_end(tree_of, pictures):
    """The method's claim, on models small enough to see it in seconds."""
    errors = {}
    for objective in ("ridge", "lfm", "ffm"):
        tree = tree_of("dinov2", "clip", splits=[1])
        fit_stitches(tree, pictures, objective=objective, epochs=15, lr=3e-3, show_progress=False)
        errors[objective] = evaluate_stitches(tree, pictures)[0].final.channel_error
    assert errors["ffm"] < errors["lfm"]
    assert errors["ffm"] < errors["ridge"]


def test_config_is_checked():
    for options, message in [
        ({"objective": "tlt"}, "objective is 'tlt'; expected one of ridge, procrustes, lfm, ffm"),
        ({"match": "cosine"}, "match is 'cosine'"),
        ({"epochs": 0}, "epochs is 0; expected at least 1"),
        ({"lr": -1.0}, "lr is -1.0 and warmup 0.03; expected a rate above 0"),
        ({"objective": "ridge", "start": "random"}, "needs start='ridge'"),
        ({"objective": "lfm", "match": "norm"}, "goes with objective ffm only"),
    ]:
        with pytest.raises(ValueError, match=message):
            FitConfig(**options)


def test_too_few_pictures_and_no_branches(tree_of, tiny, pictures):
    with pytest.raises(ValueError, match="3 pictures were given; a fit needs 5"):
        fit_stitches(tree_of("dinov2", "clip"), pictures[:3], show_progress=False)
    with pytest.raises(ValueError, match="no branches"):
        fit_stitches(VSTEncoder.from_vfms(tiny("clip"), [], []), pictures, show_progress=False)


def test_a_loss_that_is_not_finite_is_named(tree_of, pictures, monkeypatch):
    real = Matcher.forward
    monkeypatch.setattr(Matcher, "forward", lambda self, *a: real(self, *a) * float("nan"))
    with pytest.raises(RuntimeError, match=r"loss of clip@1, clip@3 is not finite at step 1: lower lr"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, show_progress=False)


def test_schedule_warms_up_and_ends_at_zero():
    rates = [rate_factor(i, 100, 0.1) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9] == rates[10] == 1
    assert rates[55] == pytest.approx(0.5, abs=0.02)
    assert 0 < rates[99] < 0.001


def test_checkpointing_recomputes_and_gives_the_same_stitches(tree_of, pictures):
    a, b = tree_of("dinov2", "clip"), tree_of("dinov2", "clip")
    runs = []
    for tree, checkpointing in ((a, False), (b, True)):
        ran = []
        hook = lambda *_, ran=ran: ran.append(torch.is_grad_enabled())  # noqa: E731
        tree.branches["clip"].tail.blocks["2"].register_forward_pre_hook(hook)
        fit_stitches(tree, pictures, epochs=2, checkpointing=checkpointing, show_progress=False)
        runs.append(sum(ran))
        assert not tree.branches["clip"].tail.checkpointing
    assert runs[1] == 2 * runs[0] > 0
    for k, v in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[k], v, atol=1e-6, rtol=1e-6)


def test_bf16_fits_and_leaves_fp32_stitches(tree_of, pictures):
    results = {}
    for precision in ("fp32", "bf16", "fp32"):  # one process may change its mind
        tree = tree_of("dinov2", "dinov3")
        results[precision] = fit_stitches(tree, pictures, precision=precision, epochs=4, show_progress=False)
        assert {p.dtype for p in tree.parameters()} == {torch.float32}
    full, half = (results[p].reports[0].final.channel_error for p in ("fp32", "bf16"))
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


def test_half_precision_trees_are_reported_but_not_fitted(tree_of, pictures, tmp_path):
    folder = tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")
    tree = VSTEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert evaluate_stitches(tree, pictures)[0].pictures == len(pictures)
    with pytest.raises(ValueError, match="stitches are not fp32; load it with"):
        fit_stitches(tree, pictures, show_progress=False)


def test_unreadable_heldout_pictures_cost_nothing_but_the_report(tree_of, pictures, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("broken")
    with pytest.warns(UserWarning, match="No report: None of 1 held-out"):
        result = fit_stitches(
            tree_of("dinov2", "clip"),
            pictures,
            heldout_images=tmp_path / "bad",
            folder=tmp_path / "run",
            show_progress=False,
        )
    assert result.reports == []
    assert result.skipped["x.png"]
    assert (tmp_path / "run" / "stitches" / "stitches.safetensors").exists()
    with pytest.raises(FileNotFoundError):
        fit_stitches(tree_of("dinov2", "clip"), pictures, heldout_images=tmp_path / "typo", show_progress=False)


@pytest.mark.parametrize("objective", ["ffm", "lfm"])
def test_cached_targets_are_the_targets(tree_of, pictures, tmp_path, objective, monkeypatch):
    """Rows are the target's features to fp16's precision, under their picture's number; later epochs read them."""
    calls = []
    real = Teacher.target
    monkeypatch.setattr(Teacher, "target", lambda self, *a: calls.append(1) or real(self, *a))
    plain, cached, again = (tree_of("dinov2", "clip") for _ in range(3))
    options = {"objective": objective, "epochs": 3, "show_progress": False}
    fit_stitches(plain, pictures, **options)
    uncached = len(calls)
    result = fit_stitches(cached, pictures, cache=str(tmp_path / "cache"), **options)
    first = len(calls) - uncached
    fit_stitches(again, pictures, cache=str(tmp_path / "cache"), **options)
    second = len(calls) - uncached - first
    assert second < first < uncached
    for k, v in cached.state_dict().items():
        assert torch.equal(again.state_dict()[k], v)
    (folder,) = (tmp_path / "cache").iterdir()
    written = (folder / "rows.f16").stat().st_size + (folder / "sums.u64").stat().st_size
    assert written == result.cache_bytes
    shapes = {int(d): tuple(s) for d, s in json.loads((folder / "cache.json").read_text())["shapes"].items()}
    cache = TargetCache(tmp_path / "cache", folder.name, len(pictures), shapes)
    rows = [i for i in range(len(pictures)) if cache.has([i])]
    assert len(rows) == result.pictures
    pixels = torch.stack([transforms(plain)["target_clip"](pictures[i]) for i in rows])
    wanted = Matcher(Teacher(plain), objective).wanted("clip", real(Teacher(plain), "clip", pixels))
    assert set(wanted) == set(shapes)
    for depth, values in cache.read(rows).items():
        torch.testing.assert_close(values, wanted[depth], atol=5e-3, rtol=1e-3)


def test_cache_key_changes_with_all_that_a_row_depends_on(tree_of, picture_folder, tmp_path):
    def folders(tree, **options):
        before = set((tmp_path / "c").glob("*"))
        fit_stitches(tree, picture_folder, cache=str(tmp_path / "c"), show_progress=False, **options)
        return len(set((tmp_path / "c").glob("*")) - before)

    assert folders(tree_of("dinov2", "clip")) == 1
    assert folders(tree_of("dinov2", "clip")) == 0
    assert folders(tree_of("dinov2", "clip"), batch_size=8, lr=1e-4, seed=1) == 0
    assert folders(tree_of("siglip", "clip")) == 0  # the trunk does not matter to a target
    assert folders(tree_of("dinov2", "clip"), objective="lfm") == 1
    assert folders(tree_of("dinov2", "clip", cut="squash")) == 1
    assert folders(tree_of("dinov2", "clip", feature_layer=-1)) == 1
    assert folders(tree_of("dinov2", "siglip")) == 1
    assert folders(tree_of("dinov2", "clip"), limit=20) == 1
    Image.new("RGB", (30, 30), (1, 2, 3)).save(picture_folder / "000.png")
    assert folders(tree_of("dinov2", "clip")) == 1


def test_cache_is_sized_before_it_is_written(tree_of, pictures, tmp_path):
    # LLaVA's 558K pictures, 24 x 24 tokens of a ViT-L, fp16
    assert cache_bytes(558_000, {23: (576, 1024)}) / 1e9 == pytest.approx(658, abs=1)
    with pytest.raises(ValueError, match=r"558,000 pictures needs 658\.\d GB; the limit is 50 GB"):
        check_room(tmp_path / "new", {"key": {23: (576, 1024)}}, 558_000, 50)
    with pytest.raises(ValueError, match=r"needs 0\.2 GB"):  # all branches together
        check_room(tmp_path / "new", {k: {3: (100, 100)} for k in "abcde"}, 2000, 0.1)
    assert not list(tmp_path.iterdir())
    options = {"cache": str(tmp_path / "c"), "cache_limit_gb": 1e-6, "show_progress": False}
    with pytest.raises(ValueError, match="cache_limit_gb"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, **options)


def test_cache_rows_survive_and_unwritten_ones_are_known(tmp_path):
    shapes = {2: (3, 4), 5: (1, 2)}
    cache = TargetCache(tmp_path, "key", 10, shapes)
    values = {2: torch.randn(2, 3, 4), 5: torch.randn(2, 1, 2)}
    cache.write([7, 1], values)
    again = TargetCache(tmp_path, "key", 10, shapes)
    assert again.has([1, 7])
    assert not again.has([1, 2])
    with pytest.raises(LookupError, match="not written yet"):
        again.read([1, 2])
    for depth, value in again.read([1, 7]).items():
        torch.testing.assert_close(value, values[depth].flip(0), atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="beyond fp16's range"):
        cache.write([3], {2: torch.full((1, 3, 4), 1e6), 5: torch.zeros(1, 1, 2)})
    assert not cache.has([3])


def test_digest_sees_bytes():
    a = torch.arange(6.0)
    assert digest({}, {"a": a}) == digest({}, {"a": a.clone()})
    assert digest({}, {"a": a}) != digest({}, {"a": a + 1e-6})
    assert digest({}, {"a": a}) != digest({}, {"a": a.reshape(2, 3)})
    assert digest({"x": 1}) != digest({"x": 2})


def test_broken_files_are_counted_and_stop_nothing(tree_of, picture_folder, tmp_path):
    (picture_folder / "zero.png").touch()
    (picture_folder / "text.jpg").write_text("no picture")
    whole = (picture_folder / "001.png").read_bytes()
    (picture_folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("CMYK", (40, 40), (9, 200, 30, 4)).save(picture_folder / "cmyk.jpg")
    Image.new("LA", (40, 20), (9, 100)).save(picture_folder / "alpha.png")
    Image.new("P", (33, 20)).save(picture_folder / "palette.gif")
    tree = tree_of("dinov2", "clip")
    folder = tmp_path / "run"
    result = fit_stitches(tree, picture_folder, folder=folder, seed=3, heldout=1, show_progress=False)
    assert {"zero.png", "text.jpg", "cut.png"} == set(result.skipped)
    stored = json.loads((folder / "results.json").read_text())
    assert set(stored["results"]["skipped"]) == set(result.skipped)
    assert "known format" in stored["results"]["skipped"]["text.jpg"]
    assert stored["config"]["fit"]["seed"] == 3
    assert stored["environment"]


def test_nothing_readable_is_an_error(tree_of, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"None of 5 pictures could be read \(.*png: "):
        fit_stitches(tree_of("dinov2", "clip"), tmp_path, show_progress=False)


def test_runs_are_not_overwritten_and_finished_ones_are_read_back(tree_of, pictures, tmp_path):
    tree = tree_of("dinov2", "clip")
    folder = tmp_path / "run"
    first = fit_stitches(tree, pictures, folder=folder, show_progress=False)
    with pytest.raises(FileExistsError, match="overwrite"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, folder=folder, show_progress=False)
    fresh = tree_of("dinov2", "clip")
    again = fit_stitches(fresh, pictures, folder=folder, resume=True, show_progress=False)
    assert again.reports == first.reports
    for k, v in tree.state_dict().items():
        assert torch.equal(fresh.state_dict()[k], v)
    with pytest.raises(ValueError, match=r"differs in pictures\.count"):
        fit_stitches(fresh, pictures[:30], folder=folder, resume=True, show_progress=False)
    with pytest.raises(ValueError, match=r"differs in pictures\.fingerprint"):
        fit_stitches(fresh, pictures[::-1], folder=folder, resume=True, show_progress=False)
    fit_stitches(fresh, pictures, folder=folder, resume=True, workers=1, save_every=7, show_progress=False)
    with pytest.raises(ValueError, match=r"differs in fit\.lr"):
        fit_stitches(fresh, pictures, folder=folder, resume=True, lr=0.5, show_progress=False)
    fit_stitches(fresh, pictures, folder=folder, overwrite=True, lr=0.5, show_progress=False)


def _config(tiny, picture_folder, **fit):
    """Stitches, trunk and tail are trained together: what is compared holds the changes as well."""
    tune = {"trunk": "lora", "tails": "lora", "rank": 4}
    return {
        "tree": {
            "trunk": tiny("dinov2"),
            "branches": [tiny("clip", 48, seed=1)],
            "splits": [1, 3],
            "image_size": 56,
        },
        "images": str(picture_folder),
        "fit": {"epochs": 10, "batch_size": 8, "save_every": 3, "lr": 0.003, "tune": tune, **fit},
    }


def _launch(config, out, tmp_path, *extra, processes=1, wait=True):
    file = tmp_path / f"{Path(out).name}.yaml"
    file.write_text(json.dumps(config))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command += [str(SCRIPT), "--config", str(file), "--out", str(out), *extra]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=env, **pipe)
    if not wait:
        return process
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0, out[-3000:]
    return out


def _kill_at_first_state(process, folder):
    deadline = time.monotonic() + 200
    while not list((folder / "state").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:  # torchrun's workers too
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((folder / "state").glob("step-*"))
    assert not (folder / "results.json").exists()


def _stitches(folder):
    return load_file(Path(folder) / "stitches" / "stitches.safetensors")


@pytest.mark.slow
def test_kill_and_resume_gives_the_uninterrupted_stitches(tiny, picture_folder, tmp_path):
    config = _config(tiny, picture_folder)
    _launch(config, tmp_path / "whole", tmp_path)
    process = _launch(config, tmp_path / "killed", tmp_path, wait=False)
    _kill_at_first_state(process, tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL
    _launch(config, tmp_path / "killed", tmp_path, "--resume", "true")
    whole, resumed = _stitches(tmp_path / "whole"), _stitches(tmp_path / "killed")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any(k.startswith("changes.trunk.") for k in whole)
    results = [json.loads((tmp_path / n / "results.json").read_text())["results"] for n in ("whole", "killed")]
    assert results[0]["reports"] == results[1]["reports"]
    assert results[0]["history"] == results[1]["history"]
    assert not (tmp_path / "killed" / "state").exists()  # a finished run keeps no training state


@pytest.mark.slow
def test_two_processes_give_the_single_process_stitches_also_after_a_kill(tiny, picture_folder, tmp_path):
    broken = [f"{i:03d}.png" for i in (5, 6, 11, 20)]  # shares of unequal size
    for name in broken:
        (picture_folder / name).write_text("broken")
    config = _config(tiny, picture_folder, batch_size=7)
    _launch(config, tmp_path / "one", tmp_path)
    _launch(config, tmp_path / "two", tmp_path, processes=2)
    one, two = _stitches(tmp_path / "one"), _stitches(tmp_path / "two")
    for k in one:
        torch.testing.assert_close(two[k], one[k], atol=1e-4, rtol=1e-4)
    process = _launch(config, tmp_path / "killed", tmp_path, processes=2, wait=False)
    _kill_at_first_state(process, tmp_path / "killed")
    _launch(config, tmp_path / "killed", tmp_path, "--resume", "true", processes=2)
    resumed = _stitches(tmp_path / "killed")
    for k in two:
        torch.testing.assert_close(resumed[k], two[k], atol=1e-6, rtol=1e-6)
    skipped = json.loads((tmp_path / "two" / "results.json").read_text())["results"]["skipped"]
    assert sorted(skipped) == broken


@pytest.mark.slow
def test_deepspeed_config_is_accepted_and_gives_the_same_stitches(tiny, picture_folder, tmp_path):
    pytest.importorskip("deepspeed")
    zero = tmp_path / "zero2.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    config = _config(tiny, picture_folder)
    _launch(config, tmp_path / "plain", tmp_path, processes=2)
    config["fit"]["deepspeed"] = str(zero)
    _launch(config, tmp_path / "zero", tmp_path, processes=2)  # fails unless the engine is DeepSpeed's
    plain, sharded = _stitches(tmp_path / "plain"), _stitches(tmp_path / "zero")
    for k in plain:
        torch.testing.assert_close(sharded[k], plain[k], atol=1e-4, rtol=1e-4)


def test_zero_three_is_refused(tree_of, pictures, tmp_path):
    zero = tmp_path / "zero3.json"
    zero.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ValueError, match="ZeRO stage 3; stitches are a few MB"):
        fit_stitches(tree_of("dinov2", "clip"), pictures, deepspeed=str(zero), show_progress=False)
