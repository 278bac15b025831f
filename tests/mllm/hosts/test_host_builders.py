"""Functions by which hosts and forks build towers: whatever they take, what is not a tree's goes on to them as it came.

Stand-ins again: LLaVA's form, forks whose functions take more, and Cambrian's list of towers.
"""

import importlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from llava_integration import hosts
from llava_integration.hosts import hooks
from llava_integration.hosts.options import GRID_SIDES
from llava_integration.hosts.resampled import ResampledTower, parse_count
from llava_integration.hosts.tower import VSTVisionTower
from vst import VSTEncoder
from vst.fit import op_builds

ECHO = "return 'own', cfg, more"


@pytest.fixture
def folder(tree_of, tmp_path):
    return tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")


@pytest.fixture
def make_host(tmp_path, monkeypatch):
    """``make_host("name", builder, arch)``: a package with that builder and a module that has imported from it."""
    made = []
    monkeypatch.setattr(hooks, "PACKAGES", ("llava", "eagle", "cambrian"))
    (tmp_path / "path").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delenv("VST_HOSTS", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))

    def make(name, builder, arch="from .multimodal_encoder.builder import build_vision_tower\n"):
        package = tmp_path / "path" / name
        (package / "model" / "multimodal_encoder").mkdir(parents=True)
        for part in ("", "model", "model/multimodal_encoder"):
            (package / part / "__init__.py").write_text("")
        (package / "model" / "multimodal_encoder" / "builder.py").write_text(builder)
        (package / "model" / "arch.py").write_text(arch)
        importlib.invalidate_caches()
        made.append(name)
        return name

    yield make
    hosts.uninstall()
    for module in [m for m in sys.modules if m.split(".")[0] in made]:
        del sys.modules[module]


def arch_of(host):
    return __import__(f"{host}.model.arch", fromlist=["x"])


SIGNATURES = {
    "one, and options": ("cfg, **more", lambda f, cfg: f(cfg, delay_load=True), ({"delay_load": True},)),
    "two by position": ("cfg, *more", lambda f, cfg: f(cfg, 3, "a"), ((3, "a"),)),
    "its own name": ("model_cfg, freeze=True", lambda f, cfg: f(model_cfg=cfg, freeze=False), (False,)),
    "an option by position": ("cfg, delay_load=False, more=None", lambda f, cfg: f(cfg, True), (True, None)),
    "by name alone": ("*, config, delay_load", lambda f, cfg: f(delay_load=True, config=cfg), (True,)),
}


class TestSignatures:
    @pytest.mark.parametrize("form", SIGNATURES)
    def test_what_is_not_a_trees_goes_on_as_it_came(self, make_host, folder, form):
        signature, call, rest = SIGNATURES[form]
        names = [part.strip(" *").split("=")[0] for part in signature.split(",") if part.strip() != "*"]
        first = "config" if "config" in names else names[0]
        values = ", ".join(name for name in names if name != first)
        make_host("llava", f"def build_vision_tower({signature}):\n    return 'own', {first}, {values}\n")
        hosts.install()
        build = arch_of("llava").build_vision_tower
        other = SimpleNamespace(mm_vision_tower="openai/clip")
        assert call(build, other) == ("own", other, *rest)
        tower = call(build, SimpleNamespace(mm_vision_tower=f"vst:{folder}"))
        assert isinstance(tower, VSTVisionTower)
        assert tower.is_loaded != ("delay_load" in str(names) + str(rest))

    def test_a_call_that_does_not_fit_is_the_hosts_own_error(self, make_host, folder):
        make_host("llava", "def build_vision_tower(cfg):\n    return cfg\n")
        hosts.install()
        with pytest.raises(TypeError, match="takes 1 positional argument but 2"):
            arch_of("llava").build_vision_tower(SimpleNamespace(mm_vision_tower=f"vst:{folder}"), 1)

    def test_a_name_and_a_dict(self, make_host, folder, caplog):
        make_host("llava", "def build_vision_tower(name, config=None, **more):\n    return name, config, more\n")
        hosts.install()
        build = arch_of("llava").build_vision_tower
        assert build("google/siglip", config=1, fast=True) == ("google/siglip", 1, {"fast": True})
        assert isinstance(build(f"vst:{folder}", config=1), VSTVisionTower)
        assert "by config has no effect" in caplog.text
        assert isinstance(build({"vision_tower": f"vst:{folder}"}), VSTVisionTower)

    def test_wherever_and_however_it_was_imported(self, make_host, folder, tmp_path):
        make_host("llava", "def build_vision_tower(cfg):\n    return 'own'\n",
                  arch="from .multimodal_encoder.builder import build_vision_tower as build\n")  # fmt: skip
        (tmp_path / "path" / "outside.py").write_text("from llava.model.arch import build as tower_of\n")
        outside = __import__("outside")
        hosts.install()
        given = SimpleNamespace(mm_vision_tower=f"vst:{folder}")
        assert isinstance(outside.tower_of(given), VSTVisionTower)
        assert isinstance(arch_of("llava").build(given), VSTVisionTower)
        assert {"llava.model.arch", "outside"} <= set(hosts.hooked("llava"))
        hosts.uninstall()
        assert outside.tower_of(given) == "own"
        del sys.modules["outside"]


LLAVA = f"def build_vision_tower(cfg, **more):\n    {ECHO}\n"


class TestFurtherPackages:
    def test_named_in_the_call_or_in_the_environment(self, make_host, folder, monkeypatch):
        make_host("mgm", LLAVA)
        assert hosts.find_hosts() == []
        with pytest.raises(ImportError, match="No host is found"):
            hosts.install()
        assert hosts.install(packages=["mgm"]) == ["mgm"]
        given = SimpleNamespace(mm_vision_tower=f"vst:{folder}")
        assert isinstance(arch_of("mgm").build_vision_tower(given), VSTVisionTower)
        hosts.uninstall()
        monkeypatch.setenv("VST_HOSTS", " mgm , ")
        assert hosts.install() == hosts.install(("mgm",)) == hosts.install("mgm") == ["mgm"]
        assert isinstance(arch_of("mgm").build_vision_tower(given), VSTVisionTower)

    def test_what_is_named_and_not_there_is_told(self, make_host, monkeypatch):
        make_host("llava", LLAVA)
        with pytest.raises(ImportError, match="'mgm' was named as a host: none"):
            hosts.install(packages=["mgm"])
        with pytest.raises(ValueError, match="no package's name"):
            hosts.install(packages=["my mgm"])
        make_host("other", "class Builder: pass\n")
        with pytest.raises(ImportError, match="does not build towers as LLaVA does"):
            hosts.install(packages=["other"])


CAMBRIAN = """
def build_vision_tower(cfg, **more):
    return "one", cfg.mm_vision_tower

def build_vision_tower_aux_list(cfg, **more):
    names = getattr(cfg, "mm_vision_tower_aux_list", getattr(cfg, "vision_tower_aux_list", None))
    sizes = getattr(cfg, "mm_vision_tower_aux_token_len_list", getattr(cfg, "vision_tower_aux_token_len_list", None))
    return [("own", f"{name}-interp{size}", more) for name, size in zip(names, sizes)]
"""
ARCH = "from .multimodal_encoder.builder import build_vision_tower_aux_list\n"


class TestCambrian:
    @pytest.fixture
    def build(self, make_host):
        make_host("cambrian", CAMBRIAN, ARCH)
        assert hosts.install() == ["cambrian"]
        return arch_of("cambrian").build_vision_tower_aux_list

    @pytest.mark.parametrize("prefix", ["mm_", ""])
    def test_a_tree_among_others(self, build, folder, prefix):
        keys = (f"{prefix}vision_tower_aux_list", f"{prefix}vision_tower_aux_token_len_list")
        names, sizes = ["siglip/a", f"vst:{folder}@3", "dinov2-b-res378"], [576, 9, 144]
        cfg = SimpleNamespace(**dict(zip(keys, (names, sizes), strict=True)), mm_vision_select_layer=-2)
        first, tree, last = build(cfg, delay_load=True)
        assert (first, last) == (
            ("own", "siglip/a-interp576", {"delay_load": True}),
            ("own", "dinov2-b-res378-interp144", {"delay_load": True}),
        )
        assert isinstance(tree, ResampledTower)
        assert not tree.is_loaded
        assert (getattr(cfg, keys[0]), getattr(cfg, keys[1])) == (names, sizes)
        tree.load_model(device_map="auto")
        assert tree.vision_tower.splits == [3]
        assert (tree.num_patches, tree.num_patches_per_side, tree.hidden_size) == (9, 3, 80)
        assert build(SimpleNamespace(**{keys[0]: names[:1], keys[1]: [4]})) == [("own", "siglip/a-interp4", {})]

    @pytest.mark.parametrize("count", [4, 9, 16, 64])
    def test_its_tokens_are_resampled_as_pictures_are(self, build, folder, count):
        cfg = SimpleNamespace(vision_tower_aux_list=[str(folder)], vision_tower_aux_token_len_list=[count])
        (tower,) = build(cfg)
        pixels, tree = torch.randn(2, 3, 56, 56), VSTEncoder.from_pretrained(folder)
        tokens, side = tree(pixels), int(count**0.5)
        expected = F.interpolate(tokens.view(2, 4, 4, -1).permute(0, 3, 1, 2), size=side, mode="bilinear")
        expected = expected.permute(0, 2, 3, 1).reshape(2, count, -1)
        assert torch.allclose(tower(pixels), expected, atol=1e-6)
        assert (count != 16) or torch.equal(tower(pixels), tokens)
        assert tower(pixels.bfloat16()).dtype == torch.bfloat16
        one, _ = tower(list(pixels))
        assert torch.allclose(one, expected[:1], atol=1e-5)

    def test_a_name_that_carries_its_count(self, build, folder):
        one = __import__("cambrian.model.multimodal_encoder.builder", fromlist=["x"]).build_vision_tower
        assert one(SimpleNamespace(mm_vision_tower=f"vst:{folder}@1-interp16-interp4")).num_patches == 4
        assert parse_count("vst:a-interp16@3-interp9") == ("vst:a-interp16@3", 9)
        assert parse_count("siglip-res384") == ("siglip-res384", None)

    def test_what_cannot_be(self, build, folder, tree_of, tmp_path):
        for sizes, told in (([10], "square number"), ([], "number of tokens for each"), (None, "number of tokens")):
            with pytest.raises(ValueError, match=told):
                build(SimpleNamespace(vision_tower_aux_list=[f"vst:{folder}"], vision_tower_aux_token_len_list=sizes))
        twice = tree_of("dinov2", "clip", widths=(32, 32), fusion="interleave").save_pretrained(tmp_path / "twice")
        with pytest.raises(ValueError, match="no grid"):
            build(SimpleNamespace(vision_tower_aux_list=[f"vst:{twice}"], vision_tower_aux_token_len_list=[16]))

    def test_what_a_reloaded_list_loses_is_told(self, build, folder, caplog):
        cfg = SimpleNamespace(
            mm_vision_tower_aux_list=[f"vst:{folder}"], mm_vision_tower_aux_token_len_list=[16],
            unfreeze_mm_vision_tower=True,
        )  # fmt: skip
        build(cfg)
        assert not caplog.records
        build(cfg, delay_load=True)
        assert "read from its own folder" in caplog.text


class TestDoctor:
    def run(self, *words):
        from llava_integration.__main__ import main

        main(["doctor", *words])

    @pytest.mark.parametrize(
        ("builder", "arch", "used"),
        [
            (LLAVA, "from .multimodal_encoder.builder import build_vision_tower\n", True),
            (LLAVA, "from .multimodal_encoder import builder\nx = lambda c: builder.build_vision_tower(c)\n", True),
            (CAMBRIAN, ARCH, True),
            (LLAVA, "# build_vision_tower(cfg)\nfrom .towers import make as build\n", False),
            (LLAVA, "def make(cfg):\n    '''Not build_vision_tower.'''\n", False),
            (LLAVA, "x = 1  # \xe9\n", False),
            (LLAVA, "from .own import build_vision_tower_aux_list\n", False),
        ],
    )
    def test_whether_the_host_uses_it(self, make_host, capsys, builder, arch, used):
        make_host("cambrian", builder, arch)
        if used:
            self.run()
            assert "All is well." in capsys.readouterr().out
            assert hosts.users("cambrian") == ["model/arch.py"]
            return
        with pytest.raises(SystemExit, match="nothing in the package 'cambrian' uses build_vision_tower or"):
            self.run()
        assert "All is well" not in capsys.readouterr().out

    def test_further_packages(self, make_host, capsys, monkeypatch):
        make_host("mgm", LLAVA)
        monkeypatch.setenv("VST_HOSTS", "mgm")
        self.run()
        assert "mgm" in capsys.readouterr().out
        monkeypatch.setenv("VST_HOSTS", "mgm,nowhere")
        with pytest.raises(SystemExit, match="'nowhere' was named as a host"):
            self.run()

    @pytest.mark.parametrize("deep", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])
    def test_a_lock_without_a_builder(self, make_host, tmp_path, deep):
        make_host("llava", LLAVA)
        lock = tmp_path / "extensions" / deep / "lock"
        lock.parent.mkdir(parents=True)
        self.run()
        builder = os.open(lock, os.O_CREAT | os.O_EXCL)
        assert op_builds.stale_locks() == []
        self.run()
        os.close(builder)
        assert op_builds.stale_locks() == [lock]
        with pytest.raises(SystemExit, match=f"{lock} is left of a build of the operator deepspeed_shm_comm"):
            self.run()
        lock.unlink()
        self.run()

    def test_sides_of_grids(self, make_host, folder, capsys, caplog):
        make_host("llava", LLAVA)
        self.run("--tree", f"vst:{folder}")
        out = " ".join(capsys.readouterr().out.split())
        assert "want pictures of 224, 336, 384, 448 or 512 pixels a side, and this tree's are of 56" in out
        assert "[[56, 112], [112, 56], [112, 112]]" in out
        args = SimpleNamespace(image_aspect_ratio="anyres_max_9", image_grid_pinpoints="(1x1),...,(6x6)")
        VSTVisionTower(f"vst:{folder}", args, delay_load=True)
        assert "this tree's are of 56" in caplog.text
        caplog.clear()
        args.image_grid_pinpoints = [[56, 112]]
        VSTVisionTower(f"vst:{folder}", args, delay_load=True)
        assert not caplog.records

    def test_a_side_that_fits(self, make_host, tree_of, tmp_path, capsys, monkeypatch):
        made = tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")
        make_host("llava", LLAVA)
        monkeypatch.setattr("llava_integration.hosts.doctor.GRID_SIDES", (*GRID_SIDES, 56))
        self.run("--tree", str(made))
        assert "LLaVA-NeXT" not in capsys.readouterr().out
