"""What is bundled here is there afterwards, exact and ready, without any network."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bundle_kit import MADE, PACKED, bundle, package, refusal, sha, toy, tree_of_files, unbundle

from vst import VSTEncoder, cli, load_vfm
from vst.demo import assets

__all__ = ["toy"]


def ready_without_network(toy, there, monkeypatch):
    """The folders as the library finds them there, which fetches nothing for it."""
    toy.network = False
    monkeypatch.setenv("VST_HOME", str(there))
    return [(folder / "deep/content").read_bytes() for folder in assets.make_ready(toy.recipes(), quiet=True)]


@pytest.mark.parametrize("made", [False, True])
def test_assets_are_ready_there(toy, tmp_path, monkeypatch, capsys, made):
    names = bundle(tmp_path / "out", "--for", "toy", *(["--made"] if made else []))
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert names == ["manifest.json", *(part["name"] for part in manifest["parts"])]
    assert all(part["size"] <= 2000 for part in manifest["parts"])
    forms = {asset["folder"]: asset["form"] for asset in manifest["assets"]}
    assert forms == {"grows": "made" if made else "archives", "shrinks": "made"}  # the smaller one
    stream = b"".join((tmp_path / "out" / name).read_bytes() for name in names[1:])
    assert (MADE["grows"] in stream, PACKED["grows"] in stream) == (made, not made)
    unbundle(tmp_path / "out", tmp_path / "there")
    told = capsys.readouterr().out
    assert f"in place: {tmp_path / 'there/shrinks'}" in told
    assert f"export VST_HOME={tmp_path / 'there'}\n  vst demo" in told
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == [
        "digests.json", "grows", "lock", "ready.json", "shrinks",
    ]  # fmt: skip
    assert ready_without_network(toy, tmp_path / "there", monkeypatch) == [MADE["grows"], MADE["shrinks"]]
    unbundle(tmp_path / "out", tmp_path / "there")  # once more: all is there
    assert "in place:" not in capsys.readouterr().out


def test_archives_that_were_fetched_do_not_stay_where_the_folder_is_made(toy, tmp_path):
    here = tmp_path / "here"
    bundle(tmp_path / "out", "--for", "toy")
    assert toy.fetched == ["grows", "shrinks"]
    assert (here / "archives/grows-1.0.whl").exists()  # the folder is made of it when it is wanted here
    assets.make_ready(toy.recipes(), quiet=True)
    assert not (here / "archives").exists()
    bundle(tmp_path / "two", "--for", "toy")
    assert not (here / "archives").exists()
    assert tree_of_files(tmp_path / "out") == tree_of_files(tmp_path / "two")


def test_an_archive_that_is_not_the_pinned_one_is_refused(toy, tmp_path):
    (tmp_path / "here/archives").mkdir(parents=True)
    (tmp_path / "here/archives/grows-1.0.whl").write_bytes(b"evil")
    said = refusal(bundle, tmp_path / "out", "--for", "toy")
    assert sha(b"evil") in said
    assert package("grows").sha256 in said
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_folder_is_taken_and_this_is_said(toy, tmp_path, monkeypatch, capsys):
    assets.make_ready(toy.recipes(), quiet=True)
    toy.network = False
    bundle(tmp_path / "out", "--for", "toy")
    told = capsys.readouterr().out
    assert "note: grows is taken as it was made (12.0 kB), since its archives (2.0 kB) cannot be fetched" in told
    unbundle(tmp_path / "out", tmp_path / "there")
    assert ready_without_network(toy, tmp_path / "there", monkeypatch) == [MADE["grows"], MADE["shrinks"]]


def test_without_a_network_and_a_sound_folder_it_ends(toy, tmp_path):
    toy.network = False
    assert "no registry can be reached" in refusal(bundle, tmp_path / "out", "--for", "toy")
    toy.network = True
    assets.make_ready(toy.recipes(), quiet=True)
    toy.network = False
    (tmp_path / "here/shrinks/deep/content").write_bytes(MADE["shrinks"][::-1])  # as many bytes
    assert "no registry can be reached" in refusal(bundle, tmp_path / "out", "--for", "toy")


def test_a_missing_package_is_told_once_all_else_is_in_place(toy, tmp_path, monkeypatch, capsys):
    toy.needs = ("no-such-package>=1.0",)
    bundle(tmp_path / "out", "--for", "toy")
    said = refusal(unbundle, tmp_path / "out", tmp_path / "there")
    assert "grows came as archives and cannot be made here without no-such-package>=1.0: install" in said
    assert (tmp_path / "there/archives/grows-1.0.whl").read_bytes() == PACKED["grows"]
    assert (tmp_path / "there/shrinks/deep/content").exists()
    assert "missing in this Python, and not among the wheels: no-such-package>=1.0" in capsys.readouterr().out
    monkeypatch.setattr("vst.bundle.unbundle.missing_of", lambda needs: [])  # it came
    unbundle(tmp_path / "out", tmp_path / "there")
    assert (tmp_path / "there/grows/deep/content").read_bytes() == MADE["grows"]


def test_another_recipe_there_is_refused(toy, tmp_path, monkeypatch):
    bundle(tmp_path / "out", "--for", "toy")
    older = [replace(recipe, version=0) for recipe in toy.recipes()]
    monkeypatch.setattr(sys.modules["toy_recipes"], "recipes", lambda: older)
    said = refusal(unbundle, tmp_path / "out", tmp_path / "there")
    assert "grows is made in another way by the vst of this machine" in said


def test_what_is_there_is_left_where_equal_and_replaced_only_when_asked(toy, tmp_path, monkeypatch):
    bundle(tmp_path / "out", "--for", "toy", "--made")
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "here/shrinks", there / "shrinks")
    before = (there / "shrinks/config.json").stat()
    (there / "grows").mkdir()
    (there / "grows/mine").write_text("mine")
    said = refusal(unbundle, tmp_path / "out", there)
    assert f"{there / 'grows'} differ from what the bundle holds" in said
    assert "--overwrite" in said
    assert tree_of_files(there / "grows") == {"mine": b"mine"}
    unbundle(tmp_path / "out", there, "--overwrite")
    assert (there / "shrinks/config.json").stat().st_ino == before.st_ino
    assert ready_without_network(toy, there, monkeypatch) == [MADE["grows"], MADE["shrinks"]]
    assert not list(there.glob(".unbundle-*"))


def test_list_only_tells(toy, tmp_path, capsys):
    assert not toy.fetched
    cli.main(["bundle", str(tmp_path / "out"), "--for", "toy", "--wheels", "onnx", "--list", "true"])
    told = capsys.readouterr().out
    assert "grows: 1 archive(s) that it is made from, 2.0 kB -> home" in told
    assert "shrinks: the folder as it was made, 303 bytes -> home" in told
    assert "together 2.3 kB and what is not known yet" in told
    assert not toy.fetched
    assert not (tmp_path / "out").exists()


def test_a_tree_gives_the_same_tokens_there(tree_of, tmp_path, capsys):
    tree = tree_of("dinov2", "clip", splits=[1, 3])
    tree.save_pretrained(tmp_path / "runs/mine/tree")
    (tmp_path / "runs/mine/tree/.hidden").write_text("x")
    bundle(tmp_path / "out", "--for", tmp_path / "runs/mine/tree")
    unbundle(tmp_path / "out", tmp_path / "there", "--trees", tmp_path / "trees")
    shutil.rmtree(tmp_path / "runs")
    assert f"vst inspect {tmp_path / 'trees/mine-tree'}" in capsys.readouterr().out
    again = VSTEncoder.from_pretrained(tmp_path / "trees/mine-tree")
    pixels = torch.randn(1, 3, tree.config.image_size, tree.config.image_size)
    with torch.no_grad():
        assert torch.equal(again(pixels), tree(pixels))
    assert not (tmp_path / "trees/mine-tree/.hidden").exists()


def test_a_language_model_on_a_tree_comes_whole(tree_of, lm, tmp_path):
    from llava_integration.models.assemble import assemble, load

    for part in assemble(tree_of(splits=(1, 3)), *lm()):
        part.save_pretrained(tmp_path / "tuned")
    bundle(tmp_path / "out", "--for", tmp_path / "tuned")
    unbundle(tmp_path / "out", tmp_path / "there")
    assert tree_of_files(tmp_path / "there/trees/tuned") == tree_of_files(tmp_path / "tuned")
    assert load(tmp_path / "there/trees/tuned")[0].model.vision_tower.tree.splits == [1, 3]


def test_damaged_trees_and_stitches_on_folders_of_this_machine_are_refused(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip", splits=[1])
    tree.save_stitches(tmp_path / "stitches")
    said = refusal(bundle, tmp_path / "out", "--for", tmp_path / "stitches")
    assert "holds stitches alone, and they stand on hf:/" in said
    assert "save the whole tree" in said
    file = tree.save_pretrained(tmp_path / "whole") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert "model.safetensors" in refusal(bundle, tmp_path / "out", "--for", tmp_path / "whole")
    file.write_bytes(content[:-9])
    assert "cannot be read as safetensors" in refusal(bundle, tmp_path / "out", "--for", tmp_path / "whole")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["demos", "runs/nowhere", "timm:no_such_model", "timm:x@/a.safetensors", "ftp:x"])
def test_what_is_nothing_to_bundle_is_refused(tmp_path, word):
    said = refusal(bundle, tmp_path / "out", "--for", word)
    assert word.removeprefix("timm:") in said
    assert not (tmp_path / "out").exists()


def hub_with(cache, repository, files):
    """Put files into a hub's cache as huggingface_hub does: blobs, a snapshot of links, the revision's name."""
    top = cache / f"models--{repository.replace('/', '--')}"
    for folder in ("blobs", "refs", snapshot := f"snapshots/{'a' * 40}"):
        (top / folder).mkdir(parents=True)
    (top / "refs/main").write_text("a" * 40)
    for file in files:
        shutil.copy(file, blob := top / "blobs" / sha(file.read_bytes()))
        (top / snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return top


LOADS = """
import sys, torch
from vst import load_vfm
state = load_vfm(sys.argv[1]).state_dict()
torch.save(state, sys.argv[2])
"""


def loaded_elsewhere(source, hub, out):
    env = {**os.environ, "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", LOADS, source, str(out)], env=env, check=True, timeout=120)
    return torch.load(out, weights_only=True)


def test_a_model_of_the_hub_is_read_by_the_same_source_there(tiny, tmp_path, monkeypatch, capsys):
    folder = Path(tiny("clip").removeprefix("hf:"))
    extra = tmp_path / "pytorch_model.bin"
    extra.write_bytes(b"pickle")
    hub_with(tmp_path / "cache", "owner/tiny", [*folder.iterdir(), extra])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    bundle(tmp_path / "out", "--for", "hf:owner/tiny")
    unbundle(tmp_path / "out", tmp_path / "there", "--hub", tmp_path / "hub")
    told = capsys.readouterr().out
    assert "export HF_HUB_OFFLINE=1" in told
    assert f"export HF_HUB_CACHE={tmp_path / 'hub'}" in told
    assert "model source: hf:owner/tiny" in told
    assert not list((tmp_path / "hub").rglob("*.bin"))
    assert not [p for p in (tmp_path / "hub").rglob("*") if p.is_symlink()]
    there, wanted = loaded_elsewhere("hf:owner/tiny", tmp_path / "hub", tmp_path / "state"), load_vfm(tiny("clip"))
    assert all(torch.equal(there[name], tensor) for name, tensor in wanted.state_dict().items())


def test_a_model_of_timm_is_read_by_the_same_source_there(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(3)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (tmp_path / "made").mkdir()
    save_file(timm.create_model(name, pretrained=False).state_dict(), tmp_path / "made/model.safetensors")
    (tmp_path / "made/config.json").write_text("{}")
    hub_with(tmp_path / "cache", f"timm/{name}", list((tmp_path / "made").iterdir()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    cli.main(["bundle", str(tmp_path / "out"), "--for", f"timm:{name}", "--part-size", "5MB"])
    assert len(list((tmp_path / "out").glob("part-*"))) == 5  # 22.9 MB
    unbundle(tmp_path / "out", tmp_path / "there", "--hub", tmp_path / "hub")
    there = loaded_elsewhere(f"timm:{name}", tmp_path / "hub", tmp_path / "state")
    torch.manual_seed(3)
    wanted = timm.create_model(name, pretrained=False).blocks[5].attn.qkv.weight
    assert torch.equal(there["blocks.5.attn.qkv.weight"], wanted)


def test_a_damaged_blob_is_refused(tiny, tmp_path, monkeypatch):
    top = hub_with(tmp_path / "cache", "owner/tiny", list(Path(tiny("clip").removeprefix("hf:")).iterdir()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    blob = next(path for path in top.glob("snapshots/*/model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-3] ^= 1
    blob.write_bytes(content)
    said = refusal(bundle, tmp_path / "out", "--for", "hf:owner/tiny")
    assert "model.safetensors is damaged" in said
    assert blob.name in said
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_model_that_is_not_here_and_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    said = refusal(bundle, tmp_path / "out", "--for", "dinov2-s")
    assert "dinov2-s is not in the Hugging Face cache and could not be fetched" in said
    cli.main(["bundle", str(tmp_path / "out"), "--for", "dinov2-s", "--list"])
    assert "timm/vit_small_patch14_dinov2.lvd142m of the hub, not here yet" in capsys.readouterr().out


def test_a_model_in_a_folder_comes_with_its_source(tiny, tmp_path, capsys):
    shutil.copytree(tiny("dinov2").removeprefix("hf:"), tmp_path / "my-dino")
    bundle(tmp_path / "out", "--for", f"hf:{tmp_path / 'my-dino'}")
    unbundle(tmp_path / "out", tmp_path / "there")
    source = f"hf:{tmp_path / 'there/trees/my-dino'}"
    assert f"model source: {source}" in capsys.readouterr().out
    there, here = load_vfm(source).state_dict(), load_vfm(tiny("dinov2")).state_dict()
    assert all(torch.equal(there[name], tensor) for name, tensor in here.items())


def test_folders_of_one_name_come_beside_each_other(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip", splits=[1])
    folders = [tree.save_pretrained(tmp_path / name / "best") for name in ("a", "b")]
    bundle(tmp_path / "out", "--for", *folders)
    unbundle(tmp_path / "out", tmp_path / "there")
    assert sorted(p.name for p in (tmp_path / "there/trees").iterdir()) == ["b-best", "best"]
