"""Sources of models: which are known, at which grid they load, and that each is described once."""

import shutil
from pathlib import Path

import pytest
import torch
from parity import offline  # noqa: F401

from vst.models import checkpoints
from vst.models.checkpoints import describe, load_vfm

pytest_plugins = ("checkpoints_kit",)


def test_unknown_sources():
    with pytest.raises(ValueError, match=r"did you mean 'dinov2-l'.*timm:NAME, hf:ID-or-folder, open_clip:ARCH/TAG"):
        describe("dinov2l")
    for bad in ("facebook/dinov2-large", "clip", "foo:bar", "timm:", "", "TIMM:vit_small_patch14_dinov2"):
        with pytest.raises(ValueError, match=r"is no known model source.*clip-l-336"):
            load_vfm(bad)


def test_grid_and_image_size(folders):
    source = f"hf:{folders('dinov3')[1]}"
    assert load_vfm(source, image_size=48).grid == load_vfm(source, grid=6).grid == 6
    assert load_vfm(source).grid == 4
    with pytest.raises(ValueError, match="grid=6 and image_size=48 were both given"):
        load_vfm(source, grid=6, image_size=48)
    with pytest.raises(ValueError, match="use 48 or 56"):
        load_vfm(source, image_size=50)
    with pytest.raises(TypeError, match="blocks"):
        load_vfm(source, blocks=3)


def test_random_weights_need_no_network():
    one, same, other = (load_vfm("dinov2-s", pretrained=False, seed=s, grid=3, stop=2) for s in (1, 1, 2))
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in one.state_dict().items())
    assert not torch.equal(one.pos_embed, other.pos_embed)
    tail = load_vfm("dinov2-s", pretrained=False, seed=1, grid=3, start=1, stop=2, stem=False, norm=False)
    assert all(torch.equal(t, one.state_dict()[n]) for n, t in tail.state_dict().items())
    assert not tail.training


@pytest.fixture
def described(monkeypatch):
    """Names in the order in which they were described in earnest."""
    names = []
    for reader in checkpoints._READERS.values():
        real = reader.describe
        monkeypatch.setattr(reader, "describe", lambda name, real=real: names.append(name) or real(name))
    return names


def test_a_source_is_described_once(tiny, described):
    from vst import VSTEncoder

    source = tiny("clip")
    for _ in range(2):
        load_vfm("dinov2-s", pretrained=False, grid=2, stop=1)
        VSTEncoder.plan("dinov2-s", [source, "timm:vit_small_patch14_dinov2.lvd142m"], [1], 56)
        load_vfm(source, stop=1)
    assert sorted(described) == sorted([source.removeprefix("hf:"), "vit_small_patch14_dinov2.lvd142m"])
    assert describe("dinov2-s") is describe("timm:vit_small_patch14_dinov2.lvd142m")


def test_a_changed_folder_is_described_anew(tiny, described, tmp_path, monkeypatch):
    one, other = (Path(tiny("clip", width).removeprefix("hf:")) for width in (32, 48))
    folder = tmp_path / "model"
    shutil.copytree(one, folder)
    assert [describe(f"hf:{folder}").width for _ in range(2)] == [32, 32]
    shutil.copy(other / "config.json", folder / "config.json")
    assert [describe(f"hf:{folder}").width for _ in range(2)] == [48, 48]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert [describe(f"hf:{folder}").license for _ in range(2)] == ["mit", "mit"]
    assert len(described) == 3
    monkeypatch.chdir(tmp_path)  # a relative path is another folder elsewhere
    assert describe("hf:model").width == 48
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(one, tmp_path / "elsewhere" / "model")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert describe("hf:model").width == 32


def test_failures_are_not_kept(tiny, described, tmp_path):
    folder = tmp_path / "model"
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            describe(f"hf:{folder}/here")
    shutil.copytree(Path(tiny("clip").removeprefix("hf:")), folder / "here")
    assert describe(f"hf:{folder}/here").width == 32


def test_a_hub_id_is_described_once(tiny, described, monkeypatch):
    import huggingface_hub

    folder = tiny("siglip").removeprefix("hf:")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: folder)
    assert describe("hf:someone/model") is describe("hf:someone/model")
    assert described == ["someone/model"]
