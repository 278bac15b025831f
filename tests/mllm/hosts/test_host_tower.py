"""The vision tower of the original LLaVA: every attribute that hosts touch, and the seven traps."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llava_integration.hosts.options import parse_name
from llava_integration.hosts.tower import VSTVisionTower
from vst import VSTEncoder

ARGS = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
ATTRIBUTES = {  # of LLaVA 1.2.2, LLaVA-NeXT, Cambrian and Eagle
    "is_loaded", "hidden_size", "num_patches", "num_patches_per_side", "config", "image_processor", "image_size",
    "dummy_feature", "dtype", "device", "select_layer", "select_feature", "feature_select", "vision_tower_name",
    "patch_size", "unfreeze_mm_vision_tower", "delay_load", "args", "grid_size", "num_tokens", "input_image_size",
    "load_model", "requires_grad_",
}  # fmt: skip


@pytest.fixture
def tree(tree_of):
    return tree_of("dinov2", "clip")


@pytest.fixture
def folder(tree, tmp_path):
    return tree.save_pretrained(tmp_path / "tree")


@pytest.fixture
def tower(folder):
    return VSTVisionTower(f"vst:{folder}", ARGS)


def delayed(folder):
    return VSTVisionTower(f"vst:{folder}", ARGS, delay_load=True)


def same(tower, tree):
    ours, theirs = tower.to_tree().state_dict(), tree.state_dict()
    assert set(ours) == set(theirs)
    return all(torch.equal(t, theirs[n].to(t.dtype)) for n, t in ours.items())


def fit_a_little(tower):
    """Stitches that are no longer those of the folder."""
    with torch.no_grad():
        for stitch in tower.vision_tower.stitches().values():
            for parameter in stitch.parameters():
                parameter.add_(torch.randn_like(parameter))
    return tower


def linear_reinit(model):
    """What transformers' loader does to modules that a checkpoint does not cover."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not getattr(module, "_is_hf_initialized", False):
            module.weight.data.normal_(0, 0.02)


class TestAttributes:
    @pytest.mark.parametrize("delay", [True, False])
    def test_every_attribute_answers(self, folder, tree, delay):
        tower = VSTVisionTower(f"vst:{folder}", ARGS, delay_load=delay)
        assert {name for name in ATTRIBUTES if not hasattr(tower, name)} == set()
        assert tower.is_loaded != delay
        assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side) == (tree.width, tree.tokens, 4)
        assert (tower.image_size, tower.patch_size, tower.config.image_size) == (56, 14, 56)
        assert tower.config.image_size // tower.config.patch_size == tower.num_patches_per_side
        assert tower.dummy_feature.shape == (1, tree.width)
        assert (tower.select_layer, tower.select_feature) == (-2, "patch")
        assert tower.dtype == torch.float32
        assert tower.device == torch.device("cpu")

    @pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16])
    def test_tokens_are_the_trees_in_the_type_of_the_pictures(self, tower, tree, kind, cast):
        pixels = torch.randn(2, 3, 56, 56).to(kind)
        tower.to(dtype=cast)
        expected = tree.to(cast)(pixels.to(cast)).to(kind)
        assert torch.equal(tower(pixels), expected)
        assert tower(pixels).dtype == kind
        one, two = tower(list(pixels))
        assert one.shape == two.shape == (1, 16, tree.width)
        assert torch.allclose(torch.cat([one, two]).float(), expected.float(), atol=2e-2)

    def test_autocast_around_it_changes_nothing(self, tower):
        pixels = torch.randn(1, 3, 56, 56)
        expected = tower(pixels)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tower(pixels), expected)

    def test_a_split_by_name_and_by_hand(self, folder, tree):
        pixels = torch.randn(1, 3, 56, 56)
        only = VSTVisionTower(f"vst:{folder}@1", ARGS)
        assert only.vision_tower.splits == [1]
        assert torch.equal(only(pixels), tree(pixels, split=1))
        both = VSTVisionTower(f"vst:{folder}", ARGS)
        both.split = 1
        assert torch.equal(both(pixels), tree(pixels, split=1))
        with pytest.raises(ValueError, match="split 2"):
            VSTVisionTower(f"vst:{folder}@2", ARGS)

    def test_a_split_by_branch(self, tree_of, tmp_path):
        tree, pixels = tree_of("dinov2", "clip", "siglip"), torch.randn(1, 3, 56, 56)
        folder, mixed = tree.save_pretrained(tmp_path / "tree"), {"clip": 1, "siglip": 3}
        only = VSTVisionTower(f"vst:{folder}@clip=1,siglip=3", ARGS)
        assert only.split == mixed
        torch.testing.assert_close(only(pixels), tree(pixels, split=mixed))
        assert [list(b.stitches) for b in only.vision_tower.branches.values()] == [["1"], ["3"]]
        both = VSTVisionTower(f"vst:{folder}", ARGS)
        both.split = mixed
        torch.testing.assert_close(both(pixels), tree(pixels, split=mixed))
        for wrong, told in (("clip=1", "expected exactly"), ("clip=2,siglip=3", "no stitch at split 2")):
            with pytest.raises(ValueError, match=told):
                VSTVisionTower(f"vst:{folder}@{wrong}", ARGS)

    def test_names(self):
        assert parse_name("vst:/a/b") == ("/a/b", None)
        assert parse_name("vst:user/tree@14") == ("user/tree", 14)
        assert parse_name("/a/b@14") == ("/a/b@14", None)
        with pytest.raises(ValueError, match="vst:PATH"):
            parse_name("vst:")

    def test_not_loaded_is_told(self, folder):
        with pytest.raises(RuntimeError, match=r"call load_model\(\) first"):
            delayed(folder)(torch.zeros(1, 3, 56, 56))
        with pytest.raises(FileNotFoundError):
            VSTVisionTower("vst:/nowhere/at/all", ARGS)
        with pytest.raises(ValueError, match="patch tokens alone"):
            VSTVisionTower(f"vst:{folder}", SimpleNamespace(mm_vision_select_feature="cls_patch"))

    def test_the_tree_comes_out_again(self, tower, tmp_path):
        fit_a_little(tower).to_tree().save_pretrained(tmp_path / "out")
        pixels = torch.randn(1, 3, 56, 56)
        assert torch.equal(VSTEncoder.from_pretrained(tmp_path / "out")(pixels), tower(pixels))


class TestImageProcessor:
    def test_it_is_the_trees_transform(self, tower, tree, pictures):
        processor = tower.image_processor
        expected = torch.stack([tree.transform()(p) for p in pictures[:3]])
        assert torch.equal(processor(pictures[:3], return_tensors="pt")["pixel_values"], expected)
        assert torch.equal(processor.preprocess(pictures[0], return_tensors="pt")["pixel_values"][0], expected[0])
        assert (processor.crop_size["height"], processor.size["shortest_edge"]) == (56, 56)
        assert tuple(processor.image_mean) == tree.config.trunk.mean
        frames = np.stack([np.asarray(p) for p in pictures[:3]])  # a video, as LLaVA-NeXT gives one
        assert torch.equal(processor.preprocess(frames, return_tensors="pt")["pixel_values"], expected)
        tensor = torch.from_numpy(frames[0]).permute(2, 0, 1)
        assert np.array_equal(processor(tensor, return_tensors="np")["pixel_values"][0], expected[0].numpy())
        with pytest.raises(ValueError, match="uint8"):
            processor(np.zeros((4, 4, 3), np.float32))


class TestTraps:
    def test_1_trained_weights_survive_a_reload(self, folder, tower, caplog):
        caplog.set_level(logging.INFO, "llava_integration")
        state = fit_a_little(tower).state_dict()
        again = delayed(folder)
        assert len(list(again.parameters())) == len(list(tower.parameters()))
        again.load_state_dict(state)
        assert again.is_loaded
        again.load_model()
        assert same(again, tower.to_tree())
        lines = [r.getMessage() for r in caplog.records if "stitches" in r.getMessage()]
        sums = [line.split("stitches ")[1].split(" ")[0] for line in lines]
        read, restored = sums  # what was saved, and what came back
        assert read == restored
        VSTVisionTower(f"vst:{folder}", ARGS)
        assert f"stitches {read}" not in caplog.records[-1].getMessage()

    def test_1_dropped_weights_are_an_error(self, folder, tower, tree_of, tmp_path):
        state = tower.state_dict()
        with pytest.raises(ValueError, match="no place for"):
            delayed(f"{folder}@1").load_state_dict(state, strict=False)
        other = delayed(tree_of("dinov2", "clip", splits=(1, 2, 3)).save_pretrained(tmp_path / "other"))
        other.stamp.copy_(state["stamp"])  # as the loader that saves memory brings it
        with pytest.raises(ValueError, match="another tree"):
            _ = other.is_loaded

    def test_1_weights_lost_behind_every_hook_are_an_error(self, folder, tower):
        """The loader that saves memory sets parameters itself; what it lacks it fills with rubbish."""
        for lost in ("lambda", "stitches"):
            again = delayed(folder)
            for name, tensor in tower.state_dict().items():
                owner, _, key = name.rpartition(".")
                module = again.get_submodule(owner)
                value = torch.zeros_like(tensor) if lost in name else tensor
                if key in module._parameters:
                    module._parameters[key] = nn.Parameter(value, requires_grad=False)
                else:
                    module._buffers[key] = value
            with pytest.raises(ValueError, match="something was dropped"):
                again.load_model()

    def test_1_no_name_that_older_loaders_rename(self, tree_of, tmp_path):
        for trunk in ("dinov2", "dinov3"):
            made = tree_of(trunk, "clip")
            tower = VSTVisionTower(f"vst:{made.save_pretrained(tmp_path / trunk)}", ARGS)
            assert not [n for n in tower.state_dict() if "gamma" in n or "beta" in n]
            pixels = torch.randn(1, 3, tower.image_size, tower.image_size)
            assert torch.equal(tower(pixels), made(pixels))
            again = delayed(tmp_path / trunk)
            again.load_state_dict(tower.state_dict())
            assert torch.equal(again(pixels), made(pixels))

    def test_2_weights_drawn_by_the_host_are_not_taken_for_real(self, folder, tree):
        tower = delayed(folder)
        linear_reinit(tower)
        assert not tower.is_loaded
        tower.load_model()
        linear_reinit(tower)  # once loaded they are left alone
        assert same(tower, tree)

    def test_2_built_without_memory(self, folder, tree):
        with torch.device("meta"):
            tower = VSTVisionTower(f"vst:{folder}", ARGS)
        assert not tower.is_loaded
        with pytest.raises(ValueError, match="load_model was given low_cpu_mem"):
            tower.load_model(low_cpu_mem=True)
        tower.load_model(device_map="auto")
        assert same(tower, tree)
        assert tower.device == torch.device("cpu")

    def test_2_load_model_keeps_what_was_restored(self, folder, tower):
        few = {n: p for n, p in fit_a_little(tower).named_parameters() if ".stitches." in n}
        again = delayed(folder)
        again.load_state_dict(few, strict=False)
        assert not again.is_loaded
        again.load_model(device_map={"": "cpu"})
        assert same(again, tower.to_tree())

    def test_3_and_5_it_freezes_itself(self, folder, tower):
        """A host that trains all parameters that want a gradient trains none of the tower's."""
        for made in (tower, delayed(folder)):
            assert not any(p.requires_grad for p in made.parameters())
        assert not tower(torch.randn(1, 3, 56, 56)).requires_grad
        tower.vision_tower.freeze()  # a stage of the stitches' own
        tower(torch.randn(1, 3, 56, 56)).sum().backward()
        assert {".stitches." in n for n, p in tower.named_parameters() if p.grad is not None} == {True}

    def test_4_an_fp32_run_casts_it_to_fp16(self, tower, tree):
        tower.to(dtype=torch.float16, device="cpu")
        pixels = torch.randn(2, 3, 56, 56)
        tokens = tower(pixels)
        assert tokens.dtype == torch.float32
        assert (tokens - tree(pixels)).abs().max() < 0.05

    @pytest.mark.parametrize("fusion", ["interleave", "sequence"])
    def test_7_anyres_wants_a_grid(self, tree_of, tmp_path, fusion):
        made = tree_of("dinov2", "clip", widths=(32, 32), fusion=fusion).save_pretrained(tmp_path / "tree")
        tower = VSTVisionTower(f"vst:{made}", ARGS)
        assert tower(torch.zeros(1, 3, 56, 56)).shape[1] == tower.num_patches == 32
        with pytest.raises(ValueError, match="no grid"):
            _ = tower.num_patches_per_side
        for option in ({"mm_patch_merge_type": "spatial_unpad"}, {"image_aspect_ratio": "anyres_max_9"}):
            with pytest.raises(ValueError, match="no grid"):
                VSTVisionTower(f"vst:{made}", SimpleNamespace(**option))


ZERO = """
import sys, torch, deepspeed
from types import SimpleNamespace
from llava_integration.hosts.tower import VSTVisionTower
from vst import VSTEncoder
from vst.fit.processes import leave_group
deepspeed.init_distributed(dist_backend="gloo")
settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
args = SimpleNamespace(mm_vision_select_layer=-2)
def check(delay):
    with deepspeed.zero.Init(config_dict_or_path=settings):
        tower = VSTVisionTower("vst:" + sys.argv[1], args, delay_load=delay)
    assert all(p.numel() == 0 for p in tower.parameters()), "not divided"
    assert tower.is_loaded != delay
    tower.load_model()
    assert tower.is_loaded
    whole = VSTEncoder.from_pretrained(sys.argv[1])
    with deepspeed.zero.GatheredParameters(list(tower.parameters())):
        assert torch.equal(torch.nn.utils.parameters_to_vector(whole.parameters()).sort()[0],
                           torch.nn.utils.parameters_to_vector(tower.parameters()).sort()[0])
        pixels = torch.ones(1, 3, 56, 56)
        assert torch.equal(tower(pixels), whole(pixels))
for delay in (False, True):
    check(delay)
print("SAME")
leave_group()
"""


@pytest.mark.slow
def test_6_divided_by_zero_3(folder, tmp_path):
    """Built inside ``zero.Init``, in two processes: its parameters are filled through their gathered form."""
    pytest.importorskip("deepspeed")
    (tmp_path / "run.py").write_text(ZERO)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(tmp_path / "run.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("SAME") == 2
