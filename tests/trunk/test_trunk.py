"""Which model should be the trunk: the rule on rows with a known answer, the errors against a fit's own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vst import cli, fit_stitches
from vst.tree.encoder import VSTEncoder
from vst.trunk.compare import FOLDERS, TrunkConfig, compare_trunks, named
from vst.trunk.report import trunk_rows, verdict

FEW = TrunkConfig(pictures=24, heldout=8, repeats=0, splits=[1, 3])


@pytest.fixture
def pair(tiny):
    return {"a": tiny("dinov2"), "b": tiny("clip", 48, seed=1)}


def row(trunk, split, error, channel, score=None):
    return {"trunk": trunk, "split": split, "errors": {"x": error}, "channel_errors": {"x": channel}, "score": score,
            "trunk_flops_ratio": 1.1, "flops_ratio": 0.8}  # fmt: skip


class TestVerdict:
    def test_the_lower_error_at_every_split_in_both_scales(self):
        rows = [row("a", 2, 0.1, 0.2), row("a", 6, 0.5, 0.6), row("b", 2, 0.3, 0.5), row("b", 6, 0.7, 0.9)]
        trunk, sentence = verdict(rows, {}, {})
        assert trunk == "a"
        assert sentence.startswith(
            "Take a as the trunk: with a as the trunk the other comes out with errors 0.10 / 0.50"
        )
        assert "1.10 to 1.10 times a alone" in sentence
        rows[3] = row("b", 6, 0.4, 0.9)
        assert verdict(rows, {}, {})[0] is None
        rows[3] = row("b", 6, 0.7, 0.5)
        trunk, sentence = verdict(rows, {}, {})
        assert trunk is None
        assert "do not tell" in sentence

    def test_with_labels_the_probe_decides(self):
        rng = np.random.default_rng(0)
        low, high = rng.random(400) < 0.6, rng.random(400) < 0.8
        rows = [row("a", 2, 0.1, 0.1, low.mean()), row("b", 2, 0.9, 0.9, high.mean())]
        alone = {"a": {"score": 0.5}, "b": {"score": 0.75}, "all in full": {"score": 0.9}}
        trunk, sentence = verdict(rows, alone, {("a", 2): low, ("b", 2): high})
        assert trunk == "b"
        assert f"{100 * high.mean():.1f}" in sentence
        assert "b 75.0 %" in sentence
        near = high.copy()
        near[:3] = ~near[:3]
        trunk, sentence = verdict(rows, alone, {("a", 2): near, ("b", 2): high})
        assert trunk is None
        assert "within noise" in sentence


@pytest.mark.parametrize("stitch", ["mlp_skip", "linear(reads=2)"])
def test_errors_are_those_of_a_ridge_fit(pair, pictures, stitch):
    many = [p.resize((60, 60)) for p in pictures * 10][:40]
    config = replace(FEW, stitch=stitch)
    found = compare_trunks(pair, many, config, heldout_images=many[:8], show_progress=False)
    assert [(r["trunk"], r["split"]) for r in found["rows"]] == [("a", 1), ("a", 3), ("b", 1), ("b", 3)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()[:24]
    tree = VSTEncoder.from_vfms(pair["a"], {"b": pair["b"]}, [1, 3], image_size=56, stitch=stitch)
    fit = fit_stitches(tree, [many[i] for i in order], objective="ridge", heldout_images=many[:8], show_progress=False)
    for own, wanted in zip(found["rows"][:2], fit.reports, strict=True):
        assert own["errors"]["b"] == pytest.approx(wanted.final.error, rel=1e-3)
        assert own["channel_errors"]["b"] == pytest.approx(wanted.final.channel_error, rel=1e-3)
        assert own["score"] is None
    assert found["grid"] == 4


def test_pictures_beyond_the_limit_of_memory_are_skipped(pair, tmp_path):
    folder = colours(tmp_path / "pictures", 12)
    Image.new("RGB", (600, 500)).save(folder / "light" / "large.png")
    options = {"config": replace(FEW, picture_mb=1), "show_progress": False}
    found = compare_trunks(pair, str(folder), **options)
    assert "picture_mb allows 1" in found["skipped"]["light/large.png"]
    held = compare_trunks(pair, [Image.new("RGB", (60, 60))] * 24, heldout_images=str(folder), **options)
    assert "light/large.png" in held["skipped"]
    assert "light/large.png" not in compare_trunks(pair, str(folder), FEW, show_progress=False)["skipped"]


def test_several_models_and_times(tiny, pictures):
    models = [tiny("dinov2"), tiny("clip", 48, seed=1), tiny("siglip", 32)]
    config = TrunkConfig(pictures=8, heldout=4, repeats=1, splits=[2])
    found = compare_trunks(named(models), pictures * 4, config, show_progress=False)
    assert len(found["rows"]) == 3
    assert all(len(r["errors"]) == 2 and r["trunk_ratio"] > 0 for r in found["rows"])
    heads, cells = trunk_rows(found)
    assert {len(line) for line in cells} == {len(heads)}


def colours(folder, count=24):
    """Two classes that any features tell apart, and one file that is no picture."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 210)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            values = (level + rng.normal(0, 8, (60, 60, 3))).clip(0, 255)
            Image.fromarray(values.astype(np.uint8)).save(folder / name / f"{i}.png")
    (folder / "dark" / "broken.png").write_bytes(b"no picture")
    return folder


def test_the_command(pair, tmp_path, capsys, monkeypatch):
    folder = colours(tmp_path / "pictures")
    words = ["trunk", "--models", json.dumps(pair), "--images", str(folder), "--labels", "true", "--out"]
    words += [str(tmp_path / "run"), "--compare.splits", "[1,3]", "--compare.repeats", "1", "--device", "cpu"]
    cli.main(words)
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert results["sentence"] in said.replace("\n", " ")
    assert all(r["score"] == 1 for r in results["rows"])
    assert {name: m["score"] for name, m in results["alone"].items()} == {"a": 1, "b": 1, "all in full": 1}
    assert results["trunk"] is None
    assert list(results["skipped"]) == ["dark/broken.png"]
    assert (tmp_path / "run" / "trunk.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="not empty; give overwrite"):
        cli.main(words)
    with pytest.raises(SystemExit, match="splits"):
        cli.main([*words[:-6], "--compare.splits", "[99]", "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_bad_input_is_named(pair, pictures, tmp_path):
    with pytest.raises(ValueError, match="expected two or more sources"):
        compare_trunks([pair["a"]], pictures)
    with pytest.raises(ValueError, match="expected at least 6"):
        compare_trunks(pair, pictures[:2], FEW, show_progress=False)
    same, lora = {"a": pair["a"], "b": pair["a"]}, TrunkConfig(stitch="lora", repeats=0, splits=[2])
    with pytest.raises(ValueError, match="have no closed form"):
        compare_trunks(same, pictures, lora, show_progress=False)
    with pytest.raises(ValueError, match="for some of the pictures only"):
        compare_trunks(pair, pictures, FEW, labels=FOLDERS, heldout_images=pictures)
    with pytest.raises(ValueError, match="40 pictures and 3 labels"):
        compare_trunks(pair, pictures, FEW, labels=[0, 1, 0], show_progress=False)
    with pytest.raises(ValueError, match="heldout_labels were given without"):
        compare_trunks(pair, pictures, FEW, heldout_labels=[0, 1, 0])
    with pytest.raises(ValueError, match="1 held-out ones"):
        compare_trunks(pair, pictures, FEW, heldout_images=pictures[:1], show_progress=False)
    held = {"heldout_images": pictures[:8], "heldout_labels": [2] * 8}
    with pytest.raises(ValueError, match="8 of 8 held-out pictures are of classes that no training picture has"):
        compare_trunks(pair, pictures, FEW, labels=[0, 1] * 20, **held, show_progress=False)
    pictures[0].save(tmp_path / "loose.png")
    for i in range(8):
        pictures[0].save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="lies in no class folder"):
        compare_trunks(pair, str(tmp_path), FEW, labels=FOLDERS, show_progress=False)
    with pytest.raises(ValueError, match="repeats -1"):
        TrunkConfig(repeats=-1)


def test_names_are_the_sources_last_parts():
    sources = [
        "clip-l-336",
        "hf:org/dinov2",
        "timm:dinov2",
        "timm:vit_x.y",
        "hf:/models/3d/",
        "open_clip:ViT-B-16/laion",
    ]
    found = named(sources)
    assert list(found.values()) == sources
    assert list(found) == ["clip_l_336", "dinov2", "dinov2_2", "vit_x_y", "m3d", "laion"]


def test_ready_names_become_a_tree():
    """The documented call, without weights: its names have to be a branch's."""
    models = named(["clip-l-336", "dinov2-l"])
    tree = VSTEncoder.plan(models["clip_l_336"], {"dinov2_l": models["dinov2_l"]}, [4, 12, 20], 336)
    assert [b.name for b in tree.branches] == ["dinov2_l"]
