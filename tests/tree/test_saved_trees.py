"""A tree against itself after saving: whole, pruned, in another precision, its stitches alone; damage is named."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tree_kit import pixels_of

from vst import VSTConfig, VSTEncoder
from vst.tree.stitches import STITCHES


@pytest.mark.parametrize("family", [*sorted(STITCHES), {"family": "mlp", "reads": 2}], ids=str)
def test_saved_tree_is_self_contained_and_bit_equal(tree_of, tmp_path, family):
    tree = tree_of("dinov2", "dinov2_registers", "dinov3", splits=[1, 2, 3], widths=(32, 32), stitch=family)
    with torch.no_grad():
        for p in tree.branches.parameters():
            p.add_(0.01 * torch.randn_like(p))
    folder = tree.save_pretrained(tmp_path / "tree")
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    pixels = pixels_of(tree)
    again = VSTEncoder.from_pretrained(folder)
    for split in tree.splits:
        assert torch.equal(again(pixels, split=split), tree(pixels, split=split))
    assert again.config == tree.config
    assert VSTConfig.from_dict(json.loads((folder / "config.json").read_text())) == tree.config
    held = set(load_file(folder / "model.safetensors"))
    assert not {k for k in held if ".blocks.3." in k}  # hidden state -2: nobody's last block
    assert {p for p, v in again.named_parameters() if v.requires_grad} == {
        p for p, _ in again.named_parameters() if ".stitches." in p
    }
    card = (folder / "README.md").read_text()
    assert all(b.spec.source in card for b in tree.config.branches)
    assert "licence" in card


def test_loading_needs_neither_the_network_nor_the_sources(tree_of, tmp_path):
    tree = tree_of("dinov2", "dinov3")
    folder = tree.save_pretrained(tmp_path / "tree")
    pixels = pixels_of(tree)
    torch.save({"pixels": pixels, "out": tree(pixels)}, tmp_path / "x.pt")
    config = json.loads((folder / "config.json").read_text())
    config["trunk"]["source"] = config["branches"][0]["spec"]["source"] = "hf:gone/away"
    (folder / "config.json").write_text(json.dumps(config))
    code = (
        "import socket, torch\n"
        "def no(*a, **k): raise OSError('network used')\n"
        "socket.socket.connect = no; socket.create_connection = no; socket.getaddrinfo = no\n"
        "import pickle; real = torch.load; x = real('x.pt'); torch.load = no\n"
        "import vst; tree = vst.VSTEncoder.from_pretrained('tree')\n"
        "assert torch.equal(tree(x['pixels']), x['out'])\n"
        "import sys; assert not {'transformers', 'deepspeed', 'peft', 'accelerate', 'open_clip', 'datasets',"
        " 'sklearn', 'matplotlib', 'onnx', 'jsonargparse'} & set(sys.modules)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "0"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True, timeout=120)


def test_loading_prunes_to_the_splits_asked_for(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip", splits=[1, 2, 3], keep_trunk=False)
    folder = tree.save_pretrained(tmp_path / "tree")
    pixels = pixels_of(tree)
    for split in (1, 2, 3):
        small = VSTEncoder.from_pretrained(folder, splits=[split])
        assert torch.equal(small(pixels), tree(pixels, split=split))
        assert list(small.branches["clip"].tail.blocks) == [str(i) for i in range(split, 3)]
        assert list(small.trunk.blocks) == [str(i) for i in range(split)]
        assert list(small.branches["clip"].stitches) == [str(split)]
    with pytest.raises(ValueError, match="no stitch at split 7"):
        VSTEncoder.from_pretrained(folder, splits=[7])


def test_loading_into_another_dtype(tree_of, tmp_path):
    folder = tree_of("dinov2", "dinov3").save_pretrained(tmp_path / "tree")
    half = VSTEncoder.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.branches["dinov3"].tail.rope.dtype == torch.float32
    assert half(pixels_of(half)).dtype == torch.float32  # cast in, cast out: the caller's dtype
    assert half(pixels_of(half).bfloat16()).dtype == torch.bfloat16


def test_stitches_alone(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip")
    with torch.no_grad():
        for stitch in tree.stitches().values():
            for p in stitch.parameters():
                p.normal_()
    folder = tree.save_stitches(tmp_path / "stitches")
    assert (folder / "stitches.safetensors").stat().st_size < 200_000
    again = VSTEncoder.from_pretrained(folder)
    pixels = pixels_of(tree)
    assert torch.equal(again(pixels), tree(pixels))
    assert torch.equal(VSTEncoder.from_pretrained(folder, splits=[1])(pixels), tree(pixels, split=1))


def test_push_uploads_a_tree_that_loads(tree_of, monkeypatch):
    import huggingface_hub

    tree, seen = tree_of("dinov2", "clip"), {}

    class Api:
        def create_repo(self, repo_id, **options):
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, **options):
            seen.update(repo=repo_id, tree=VSTEncoder.from_pretrained(folder_path), **options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tree.push_to_hub("me/tree", commit_message="first") == "https://hub/me/tree"
    assert seen["repo"] == "me/tree"
    assert seen["commit_message"] == "first"
    assert torch.equal(seen["tree"](pixels_of(tree)), tree(pixels_of(tree)))


def test_nothing_is_overwritten_unasked(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip")
    folder = tree.save_pretrained(tmp_path / "tree")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds.*overwrite"):
        tree.save_pretrained(folder)
    with pytest.raises(FileExistsError, match="already holds"):
        tree.save_stitches(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    tree.save_pretrained(folder, overwrite=True)


def test_damaged_trees_are_named(tree_of, tmp_path):
    from safetensors.torch import save_file

    tree = tree_of("dinov2", "clip")
    folder = tree.save_pretrained(tmp_path / "tree")
    file, config = folder / "model.safetensors", (folder / "config.json").read_text()
    tensors = load_file(file)
    key = "branches.clip.stitches.1.patches.x_mean"

    def broken(change, message):
        given = dict(tensors)
        change(given)
        save_file(given, file)
        with pytest.raises(ValueError, match=message):
            VSTEncoder.from_pretrained(folder)

    broken(lambda t: t.pop(key), f"1 missing .{key}")
    broken(lambda t: t.update(more=torch.zeros(2)), r"1 foreign .more")
    broken(lambda t: t.update({key: torch.zeros(7)}), r"another shape .*x_mean is \[7\], not \[32\]")
    file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        VSTEncoder.from_pretrained(folder)
    (folder / "config.json").write_text(config.replace('"grid"', '"gird"'))
    with pytest.raises(ValueError, match=r"no field .*gird"):
        VSTEncoder.from_pretrained(folder)
    (folder / "config.json").write_text(config[:100])
    with pytest.raises(ValueError, match=r"config\.json"):
        VSTEncoder.from_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="config of a 'clip' model"):
        VSTEncoder.from_pretrained(folder)
    (folder / "config.json").write_text(config.replace('"grid": 4,', ""))
    with pytest.raises(ValueError, match=r"config is incomplete .*grid"):
        VSTEncoder.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        VSTEncoder.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a hub repository"):
        VSTEncoder.from_pretrained("nobody/nothing-here")


def test_stitches_between_models_of_another_kind_are_another_trees(tree_of, tmp_path):
    """Of the same names and shapes, by a config that says otherwise of one of its models."""
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    folder = tree.save_stitches(tmp_path / "stitches")
    config = tree.config
    other = tree_of("dinov2", "clip", splits=[1, 2])
    (b,) = config.branches
    other.config = replace(config, branches=(replace(b, spec=replace(b.spec, norm_eps=1e-3)),))
    with pytest.raises(ValueError, match=r"stitches of another tree: its norm_eps of clip is 1e-05, and.*is 0.001"):
        other.load_stitches(folder)
    moved = tree_of("dinov2", "clip", splits=[1, 2])
    moved.config = replace(config, trunk=replace(config.trunk, source="hf:elsewhere"))
    moved.load_stitches(folder)


def test_stitches_that_meet_other_weights_bring_a_warning(tree_of, tiny, tmp_path, recwarn):
    """Of models of the same kind; those of one branch are enough, and a tree that was cut has fewer to compare."""
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    folder = tree.save_stitches(tmp_path / "stitches")
    VSTEncoder.from_pretrained(folder, splits=[2])
    tree_of("dinov2", "clip", splits=[1, 2]).load_stitches(folder)
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    other = VSTEncoder.from_vfms(tiny("dinov2"), [tiny("clip", 48, seed=9)], [1, 2], 56)
    with pytest.warns(UserWarning, match=r"fitted between other weights .*branches\.clip\.tail\.blocks"):
        other.load_stitches(folder)
    trunk = Path(tree.config.trunk.source.removeprefix("hf:"))
    moved = shutil.copytree(trunk, tmp_path / "moved")
    source = load_file(trunk / "model.safetensors")
    changed = {k: v * 1.5 if "layer.0.mlp.fc1.weight" in k else v for k, v in source.items()}
    save_file(changed, moved / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["trunk"]["source"] = f"hf:{moved}"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"in 1 of \d+ tensors \(trunk\.blocks\.0\.mlp\.fc1\.weight\)"):
        VSTEncoder.from_pretrained(folder)
