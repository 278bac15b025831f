"""timm's weights on disk, in its own folders and in single files, against the timm model that they are of."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
import timm
import torch
from parity import assert_same, offline, pixels, randomise, timm_states  # noqa: F401
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from vst.models.checkpoints import describe, load_vfm, timm_files, timm_hub

SMALL = {"depth": 2, "embed_dim": 64, "num_heads": 4}
CASES = {
    "vit_small_patch14_dinov2.lvd142m": {"img_size": 56},
    "vit_small_patch16_dinov3_qkvb.lvd1689m": {"img_size": 64},
    "vit_base_patch16_clip_quickgelu_224.openai": {"img_size": 64},
    "vit_base_patch16_siglip_224.v2_webli": {"img_size": 64, "num_classes": 0},
    "vit_base_patch16_siglip_gap_224.webli": {"img_size": 64},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as timm saves it, and its model with a head that a VFM leaves aside."""
    made = {}

    def get(name):
        if name not in made:
            arguments = {**SMALL, **CASES[name]}
            model = randomise(timm.create_model(name, **{"num_classes": 5, **arguments}))
            folder = tmp_path_factory.mktemp("timm")
            save_for_hf(model, folder, model_args=dict(arguments), safe_serialization=True)
            made[name] = model, folder
        return made[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_a_folder_that_timm_saved(saved, name):
    model, folder = saved(name)
    assert (folder / "model.safetensors").is_file()
    vfm = load_vfm(f"hf:{folder}")
    truth = timm_hub.spec_from_module(model, f"hf:{folder}")
    assert vfm.spec == truth == describe(f"hf:{folder}")
    x = pixels(vfm.image_size, 1)
    assert_same(vfm, *timm_states(model, x), x)
    tail = load_vfm(f"hf:{folder}", start=1, stop=2, stem=False)
    assert all(torch.equal(t, vfm.state_dict()[n]) for n, t in tail.state_dict().items())


def test_a_folder_keeps_its_own_normalisation(saved, tmp_path):
    _, folder = saved("vit_small_patch14_dinov2.lvd142m")
    config = json.loads((folder / "config.json").read_text())
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "license": "mit"}
    (copy / "config.json").write_text(json.dumps(config))
    spec = describe(f"hf:{copy}")
    assert (spec.mean, spec.std, spec.license) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "mit")
    del config["pretrained_cfg"]["mean"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"config.json names no mean, so the mean \(0.485"):
        describe(f"hf:{copy}")


def test_a_file_of_a_model_that_timm_knows(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k"
    model = randomise(timm.create_model(name, num_classes=7))
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    source = f"timm:{name}@{tmp_path / 'mine.safetensors'}"
    vfm = load_vfm(source, stop=2)
    assert vfm.spec.source == source
    assert vfm.spec.mean == (0.5, 0.5, 0.5)
    x = pixels(224, 1)
    states, _ = timm_states(model, x)
    with torch.no_grad():
        for depth, ours in vfm.taps(x, range(3)).items():
            torch.testing.assert_close(ours, states[depth], atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match=r"vit_tiny_patch16_224 names no weights of timm's, so the mean"):
        assert describe(f"timm:vit_tiny_patch16_224@{tmp_path / 'mine.safetensors'}").width == 192


def test_files_that_do_not_fit(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k"
    state = timm.create_model(name, num_classes=0).state_dict()
    path = tmp_path / "mine.safetensors"
    save_file({n: t for n, t in state.items() if n != "blocks.3.norm1.bias"}, path)
    with pytest.raises(ValueError, match=r"1 missing \(blocks.3.norm1.bias\)"):
        load_vfm(f"timm:{name}@{path}")
    save_file({**state, "blocks.0.attn.q_norm.weight": torch.ones(64)}, path)
    with pytest.raises(ValueError, match=r"1 foreign \(blocks.0.attn.q_norm.weight\)"):
        load_vfm(f"timm:{name}@{path}")
    torch.save(state, tmp_path / "mine.pth")
    with pytest.raises(ValueError, match=r"mine.pth is no safetensors file, and pickles are not loaded"):
        load_vfm(f"timm:{name}@{tmp_path / 'mine.pth'}")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone.safetensors"):
        load_vfm(f"timm:{name}@{tmp_path / 'gone.safetensors'}")
    for bad in (f"timm:{name}@", f"timm:@{path}"):
        with pytest.raises(ValueError, match=r"write timm:NAME@FILE.safetensors"):
            describe(bad)
    with pytest.raises(ValueError, match=r"timm .* has no model 'vit_nope'"):
        describe(f"timm:vit_nope@{path}")


def test_what_offline_says_is_a_way_that_works(tmp_path):
    name = "vit_tiny_patch16_224.augreg_in21k"
    with pytest.raises(RuntimeError, match=f"timm:{name}@FILE.safetensors"):
        load_vfm(f"timm:{name}")


PARALLEL = [n for n in timm.list_models("vit_*") if "_xp_" in n or "x2_" in n]


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_blocks_are_refused(name):
    with pytest.raises(ValueError, match=r"blocks of the class Parallel\w+, not Block"):
        describe(f"timm:{name}")


@pytest.mark.parametrize("name", ["dinov2-g", "clip-l-336", "dinov3-l", "siglip2-l-512"])
def test_a_description_draws_no_weights(name, monkeypatch):
    built, create = [], timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: built.append(create(*a, **k)) or built[-1])
    describe(name)
    assert len(built) == 1
    assert {p.device.type for p in built[0].parameters()} == {"meta"}


# --- seeded edits of a folder's config.json

NUMBERS = [0, 1, -1, 2, 4, 10**9, 10**400, 14.0, 1e-12, float("nan")]
ODD = [*NUMBERS, None, True, "8", "gelu", "", [], [56, 56], [3, 10**9, 10**9], {}, {"a": 1}]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_edits_of_a_folder_equal_timm_or_are_refused(saved, tmp_path):
    model, home = saved("vit_small_patch14_dinov2.lvd142m")
    folder, rng, kept = Path(shutil.copytree(home, tmp_path / "edited")), random.Random(0), 0
    text, x, begun = (home / "config.json").read_text(), pixels(56, 1), time.monotonic()
    states, _ = timm_states(model, x)
    for _ in range(60):
        config = json.loads(text)
        part = rng.choice([config, config["model_args"], config["model_args"], config["pretrained_cfg"]])
        key = rng.choice([*sorted(part), "depth", "img_size", "class_token", "checkpoint_path"])
        part[key] = rng.choice(ODD)
        if rng.random() < 0.1:
            del part[key]
        (folder / "config.json").write_text(json.dumps(config))
        try:
            vfm = load_vfm(f"hf:{folder}")
        except (ValueError, FileNotFoundError) as error:
            told = str(error)
        else:
            kept, told = kept + 1, ""
            with torch.no_grad():
                torch.testing.assert_close(
                    vfm.run(vfm.embed(x), 0, 2), states[2], atol=1e-5, rtol=0, msg=json.dumps(config)
                )
        assert "\n" not in told, config
        assert not told or str(folder) in told, config
    assert 5 <= kept < 60
    assert time.monotonic() - begun < 30


def test_a_folder_cannot_hand_arguments_to_a_constructor(saved, tmp_path):
    _, home = saved("vit_small_patch14_dinov2.lvd142m")
    config = json.loads((home / "config.json").read_text())
    config["model_args"]["checkpoint_path"] = "/tmp/evil.pth"
    with pytest.raises(ValueError, match="model_args 'checkpoint_path', which is not known here"):
        timm_files.describe_config(config, "hf:x")
    assert load_file(home / "model.safetensors")
