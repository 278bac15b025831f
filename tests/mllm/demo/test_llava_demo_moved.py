"""The language demo on tiny models and the real questions: stopped, moved, gone on with, and drawn anew."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava_integration.demo import job
from llava_integration.demo.config import LlavaDemoConfig
from llava_integration.train.trainer import MLLMTrainer
from vst.fit.config import FitConfig
from vst.results.drawing import NotDrawn
from vst.tree.folder import read_config


class Stop(Exception):
    pass


@pytest.fixture
def small(tiny, lm, tmp_path, monkeypatch):
    model, tokenizer = lm()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "llm")
    folders = {name: Path(tiny(name, width).removeprefix("hf:")) for name, width in (("clip", 48), ("dinov2", 32))}
    encoders = dataclasses.replace(job.encoders.prepare(quiet=True), **folders)
    found = dataclasses.replace(job.assets.prepare(quiet=True), llm=tmp_path / "llm")
    monkeypatch.setattr(job.encoders, "prepare", lambda: encoders)
    monkeypatch.setattr(job.assets, "prepare", lambda: found)
    fit = FitConfig(epochs=1, calibration=10, save_every=1)
    counts = {"fit_pictures": 8, "easy_vqa": 4, "scenes": 4, "questions": 4, "depth_questions": 2}
    return LlavaDemoConfig(
        splits=[1, 2], grid=4, fit=fit, pretrain_steps=1, finetune_steps=2, precision="fp32",
        stitch="mlp_skip(reads=2)", **counts,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.assets
def test_a_stopped_demo_that_was_moved_goes_on_to_the_same(small, tmp_path, monkeypatch):
    job.run_demo(tmp_path / "whole", small)
    assert read_config(tmp_path / "whole/fit/tree")[1].branches[0].reads(2) == (1, 2)
    monkeypatch.chdir(tmp_path)
    own, calls = MLLMTrainer.training_step, []

    def stopping(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # in the second stage
            raise Stop
        return own(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MLLMTrainer, "training_step", stopping)
        with pytest.raises(Stop):
            job.run_demo("stopped", small)
    shutil.move("stopped", "moved")
    with monkeypatch.context() as patch:
        patch.setattr(job._Job, "leave_model", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            job.run_demo("moved", small)
    shutil.move("moved", "moved again")  # with its rows, which name pictures
    with monkeypatch.context() as patch:
        patch.setattr(job, "depth_curve", lambda *_: 1 / 0)
        with pytest.raises(NotDrawn, match=r"depth-easy-vqa\.png could not be drawn \(ZeroDivisionError"):
            job.run_demo("moved again", small)
    whole, moved = (json.loads((tmp_path / p / "results.json").read_text()) for p in ("whole", "moved again"))
    assert moved["results"]["depths"] == whole["results"]["depths"]
    assert not (tmp_path / "moved again" / "index.html").exists()
    job.run_demo("moved again", small)  # which has only to be drawn
    assert (tmp_path / "moved again" / "index.html").is_file()
    one, two = (load_file(tmp_path / p / "model.safetensors") for p in ("whole", "moved again"))
    assert all(torch.equal(one[n], two[n]) for n in one)
