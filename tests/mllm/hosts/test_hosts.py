"""How hosts are hooked, and what doctor says of them.

The hosts here are stand-ins: LLaVA-NeXT's contract as it is documented, which raises on whatever lies outside of it.
The real LLaVA 1.2.2 is driven in ``tests/contract``.
"""

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llava_integration import hosts
from llava_integration.hosts import hooks
from llava_integration.hosts.tower import VSTVisionTower


@pytest.fixture
def folder(tree_of, tmp_path):
    return tree_of("dinov2", "clip").save_pretrained(tmp_path / "tree")


class Contract:
    """A tower seen through what LLaVA-NeXT's documents say that it touches; anything else is an error."""

    ALLOWED = (
        "is_loaded", "load_model", "hidden_size", "num_patches", "num_patches_per_side", "config", "image_processor",
        "image_size", "to", "requires_grad_", "parameters", "__call__",
    )  # fmt: skip

    def __init__(self, tower):
        self._tower = tower

    def __getattr__(self, name):
        if name not in self.ALLOWED:
            raise AssertionError(f"LLaVA-NeXT's contract has no {name}")
        return getattr(self._tower, name)

    def __call__(self, images):
        return self._tower(images)


@pytest.fixture(params=["llava", "eagle"])
def host(request, tmp_path, monkeypatch):
    """A stand-in of a host on the path: builder, and an architecture that has imported its function by name."""
    root = tmp_path / "path"
    package = root / request.param
    for part in ("", "model", "model/multimodal_encoder"):
        (package / part).mkdir(parents=True)
        (package / part / "__init__.py").write_text("")
    (package / "model" / "multimodal_encoder" / "builder.py").write_text(
        "def build_vision_tower(cfg, **kwargs):\n"
        "    return 'own', getattr(cfg, 'mm_vision_tower', getattr(cfg, 'vision_tower', None)), kwargs\n"
    )
    (package / "model" / "arch.py").write_text("from .multimodal_encoder.builder import build_vision_tower\n")
    (package / "model" / "late.py").write_text("from .multimodal_encoder.builder import build_vision_tower\n")
    (package / "train.py").write_text(
        f"import sys\nfrom {request.param}.model.arch import build_vision_tower\nfrom types import SimpleNamespace\n"
        "tower = build_vision_tower(SimpleNamespace(vision_tower=sys.argv[2]))\n"
        "print(__name__, sys.argv[1:], type(tower).__name__, tower.is_loaded)\n"
    )
    monkeypatch.syspath_prepend(root)
    monkeypatch.setattr(hooks, "PACKAGES", (request.param,))
    for name in [n for n in sys.modules if n.split(".")[0] == request.param]:
        monkeypatch.delitem(sys.modules, name)
    yield request.param
    hosts.uninstall()
    for name in [n for n in sys.modules if n.split(".")[0] == request.param]:
        del sys.modules[name]


class TestHosts:
    def imported(self, host, name) -> types.ModuleType:
        return __import__(f"{host}.model.{name}", fromlist=["x"])

    @pytest.mark.parametrize("first", [True, False], ids=["host imported first", "host imported later"])
    def test_install_twice_and_uninstall(self, host, folder, first):
        arch = self.imported(host, "arch") if first else None
        assert hosts.install() == hosts.install() == [host]
        arch = arch or self.imported(host, "arch")
        late = self.imported(host, "late")
        for module in (arch, late, self.imported(host, "multimodal_encoder.builder")):
            for name in (f"vst:{folder}", str(folder)):
                assert isinstance(module.build_vision_tower(SimpleNamespace(mm_vision_tower=name)), VSTVisionTower)
            given = SimpleNamespace(mm_vision_tower="openai/clip", vision_tower=f"vst:{folder}")
            assert module.build_vision_tower(given, delay_load=True) == ("own", "openai/clip", {"delay_load": True})
        hosts.uninstall()
        hosts.uninstall()
        for module in (arch, late):
            found = module.build_vision_tower(SimpleNamespace(vision_tower=f"vst:{folder}"))
            assert found == ("own", f"vst:{folder}", {})

    def test_what_is_ours(self, folder, tmp_path):
        assert hosts.is_ours("vst:x")
        assert hosts.is_ours(str(folder))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
        for other in (None, "", "openai/clip-vit", str(tmp_path), "/no/such/vst:folder"):
            assert not hosts.is_ours(other)

    def test_next_contract(self, host, folder, pictures):
        """Construction, training set-up, 2-D pooling and anyres as LLaVA-NeXT does them, through the contract alone."""
        hosts.install()
        built = self.imported(host, "arch").build_vision_tower(
            SimpleNamespace(mm_vision_tower=f"vst:{folder}", mm_vision_select_layer=-2), delay_load=False
        )
        tower = Contract(built)
        projector = nn.Linear(tower.hidden_size, 8)
        assert tower.config.hidden_size == tower.hidden_size
        tower.to(dtype=torch.bfloat16, device="cpu")
        tower.requires_grad_(False)
        processor = tower.image_processor
        side = min(processor.size.values()) if isinstance(processor.size, dict) else min(processor.size)
        assert side == tower.image_size == processor.crop_size["height"]
        frames = processor.preprocess(pictures[:4], return_tensors="pt")["pixel_values"]
        tokens = projector(tower(frames))
        assert tokens.dtype == torch.float32
        grid = tokens.view(4, tower.num_patches_per_side, tower.num_patches_per_side, -1)
        assert nn.functional.avg_pool2d(grid.permute(0, 3, 1, 2), 2).shape == (4, 8, 2, 2)
        tower.requires_grad_(True)
        projector(tower(frames)).sum().backward()
        assert all((p.grad is not None) == (".stitches.3." in n) for n, p in built.named_parameters())

    def test_a_module_runs_hooked(self, host, folder, capsys, monkeypatch):
        from llava_integration.__main__ import main

        monkeypatch.setattr(sys, "argv", ["x"])
        main(["--local_rank=0", f"{host}.train", f"vst:{folder}"])  # as DeepSpeed's launcher starts it
        assert (
            capsys.readouterr().out.split("\n")[0] == f"__main__ ['--local_rank=0', 'vst:{folder}'] VSTVisionTower True"
        )
        with pytest.raises(SystemExit, match="no module"):
            main([f"{host}.nothing"])

    @pytest.mark.parametrize("code", ["None", "0", "3"])
    def test_a_module_that_ended_well_leaves_its_group(self, host, tmp_path, monkeypatch, code):
        left = []
        monkeypatch.setattr("vst.fit.processes.leave_group", lambda: left.append(1))
        (tmp_path / "ending.py").write_text(f"import sys; sys.exit({code})")
        monkeypatch.syspath_prepend(tmp_path)
        if code == "3":
            with pytest.raises(SystemExit):
                hosts.run_module("ending", [])
        else:
            hosts.run_module("ending", [])
        assert len(left) == (code != "3")

    def test_a_broken_host(self, host, monkeypatch):
        builder = self.imported(host, "multimodal_encoder.builder").__file__
        del sys.modules[f"{host}.model.multimodal_encoder.builder"]
        with open(builder, "w") as file:
            file.write("import no_such_package_at_all\n")
        with pytest.raises(ImportError, match=f"{host}' is found but"):
            hosts.install()

    def test_no_host(self, monkeypatch):
        monkeypatch.setattr(hooks, "PACKAGES", ("no_such_host",))
        with pytest.raises(ImportError, match="No host is found"):
            hosts.install()


class TestDoctor:
    def run(self, *words):
        from llava_integration.__main__ import main

        main(["doctor", *words])

    def test_all_is_well(self, host, folder, capsys):
        self.run("--tree", f"vst:{folder}@1")
        out = capsys.readouterr().out
        for part in ("torch", "hooked", "VST-1", "MB in float16", "16 tokens of width 80", "All is well."):
            assert part in out
        assert "VST-3" not in out
        assert hosts.hooked(host) == []

    def test_a_bad_tree(self, folder, capsys):
        (folder / "model.safetensors").write_bytes(b"nothing")
        with pytest.raises(SystemExit, match=r"Something is wrong: The tree .* does not load \(.*\)"):
            self.run("--tree", str(folder))

    def test_nothing_to_serve(self, monkeypatch):
        from llava_integration.hosts import doctor

        monkeypatch.setattr(hooks, "PACKAGES", ())
        monkeypatch.setattr(doctor, "auto_classes_served", lambda: False)
        with pytest.raises(SystemExit, match="install the original LLaVA"):
            self.run()

    def test_something_missing(self, monkeypatch):
        from llava_integration.hosts import doctor

        real = doctor.installed
        monkeypatch.setattr(doctor, "installed", lambda name: None if name == "timm" else real(name))
        with pytest.raises(SystemExit, match=r"timm is missing, the library needs timm>=[\d.]+: pip install"):
            self.run()


def test_older_transformers_are_told(monkeypatch):
    from llava_integration.hosts import versions

    monkeypatch.setattr(versions, "version", lambda name: "4.37.2")
    assert not versions.auto_classes_served()
    with pytest.raises(ImportError, match=r"here is 4\.37\.2"):
        versions.check_auto_classes()
