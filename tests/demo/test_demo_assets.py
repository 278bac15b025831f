"""The offline default: fetching, checking, converting, and what stands in the folders afterwards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file

from vst.demo import assets, convert, emoji, unchanged

SILENT = Progress(disable=True)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("VST_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def package_of(content: bytes, registry: str = "npm", filename: str = "toy-1.0.tgz") -> assets.Package:
    return assets.Package("toy", "1.0", registry, filename, hashlib.sha256(content).hexdigest(), len(content))


def fake_npm(folder: Path, monkeypatch, script: str) -> None:
    """An ``npm`` on PATH that runs ``script`` in the folder it is called in."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_home(monkeypatch):
    monkeypatch.setenv("VST_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert assets.home() == Path("/a")
    monkeypatch.delenv("VST_HOME")
    assert assets.home() == Path("/b/vst")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert assets.home() == Path("/c/.cache/vst")


class TestFetch:
    def test_downloads_once(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, 'echo "$@" >> ../../calls; printf good > toy-1.0.tgz')
        for _ in range(2):
            path = assets.fetch(package_of(b"good"), SILENT)
            assert path == root / "archives/toy-1.0.tgz"
            assert path.read_bytes() == b"good"
        assert (root / "calls").read_text().splitlines() == ["pack --silent toy@1.0"]
        assert sorted(p.name for p in (root / "archives").iterdir()) == ["toy-1.0.tgz"]

    def test_pypi_command(self, root, monkeypatch):
        commands = []

        def run(command, cwd, **_):
            commands.append(command)
            (cwd / "toy-1.0.whl").write_bytes(b"good")
            return assets.subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(assets.subprocess, "run", run)
        assets.fetch(package_of(b"good", "pypi", "toy-1.0.whl"), SILENT)
        (command,) = commands
        assert command[:4] == [assets.sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary", ":all:", "toy==1.0"} <= set(command)

    def test_wrong_bytes_downloaded(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, "printf evil > toy-1.0.tgz")
        package = package_of(b"good")
        with pytest.raises(RuntimeError) as error:
            assets.fetch(package, SILENT)
        given = hashlib.sha256(b"evil").hexdigest()
        assert given in str(error.value)
        assert package.sha256 in str(error.value)
        assert "mirror" in str(error.value)
        assert list((root / "archives").iterdir()) == []

    def test_wrong_bytes_on_disk(self, root):
        (root / "archives").mkdir(parents=True)
        (root / "archives/toy-1.0.tgz").write_bytes(b"goo")
        with pytest.raises(
            RuntimeError, match=r"\(3 bytes\); expected .* \(4 bytes\) for toy 1.0: delete .*toy-1.0.tgz"
        ):
            assets.fetch(package_of(b"good"), SILENT)

    def test_other_file_downloaded(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, "printf good > other.tgz")
        with pytest.raises(RuntimeError, match=r"npm brought \['other.tgz'\] .* expected toy-1.0.tgz"):
            assets.fetch(package_of(b"good"), SILENT)

    def test_npm_fails(self, root, tmp_path, monkeypatch):
        fake_npm(tmp_path / "bin", monkeypatch, "echo no such host >&2; exit 7")
        with pytest.raises(RuntimeError, match=r"(?s)status 7; expected 0.*no such host"):
            assets.fetch(package_of(b"good"), SILENT)

    def test_npm_missing(self, root, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(RuntimeError, match=r"npm was not found.*install Node.js.*toy-1.0.tgz"):
            assets.fetch(package_of(b"good"), SILENT)

    def test_pip_missing(self, root, monkeypatch):
        monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match=r"has no pip.*-m ensurepip"):
            assets.fetch(package_of(b"good", "pypi"), SILENT)


class TestPrepare:
    """With toy recipes, whose archives are put in place by hand."""

    @pytest.fixture
    def made(self, root, monkeypatch):
        made = []

        def make(archives, folder):
            made.append(archives[0].stem)
            time.sleep(0.05)
            (folder / "content").write_bytes(archives[0].read_bytes())

        recipes = tuple(
            assets.Recipe(n, (package_of(n.encode(), filename=f"{n}.tgz"),), 1, make) for n in ("dino", "clip", "moji")
        )
        monkeypatch.setattr(assets, "_RECIPES", recipes)
        return made

    @staticmethod
    def place_archives(root):
        (root / "archives").mkdir(parents=True, exist_ok=True)
        for name in ("dino", "clip", "moji"):
            (root / "archives" / f"{name}.tgz").write_bytes(name.encode())

    def test_twice(self, root, made):
        self.place_archives(root)
        ready = assets.prepare(quiet=True)
        assert ready == assets.Assets(dinov2=root / "dino", clip=root / "clip", emoji=root / "moji")
        assert (ready.emoji / "content").read_bytes() == b"moji"
        assert sorted(p.name for p in root.iterdir()) == ["clip", "digests.json", "dino", "lock", "moji", "ready.json"]
        assert assets.prepare(quiet=True) == ready
        assert made == ["dino", "clip", "moji"]

    @pytest.mark.parametrize(
        "change", ["version", "archive", "cut", "gone", "same size", "foreign", "a file", "ready.json"]
    )
    def test_made_anew(self, root, made, monkeypatch, change, capsys):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        self.place_archives(root)
        dino, clip, moji = assets._RECIPES
        expected = ["clip"]
        if change == "version":
            clip = replace(clip, version=2)
        elif change == "archive":
            clip = replace(clip, packages=(package_of(b"new", filename="clip.tgz"),))
            (root / "archives/clip.tgz").write_bytes(b"new")
        elif change == "cut":
            (root / "clip/content").write_bytes(b"cl")
        elif change == "gone":
            (root / "clip/content").unlink()
        elif change == "same size":
            (root / "clip/content").write_bytes(b"clap")
        elif change == "foreign":
            (root / "clip/other").write_bytes(b"")
        elif change == "a file":
            (root / "clip/content").unlink()
            (root / "clip").rmdir()
            (root / "clip").write_bytes(b"clip")
        else:
            (root / "ready.json").write_text("{")
            expected = ["dino", "clip", "moji"]
        monkeypatch.setattr(assets, "_RECIPES", (dino, clip, moji))
        capsys.readouterr()
        assets.prepare()
        told = " ".join(capsys.readouterr().err.split())
        changed_here = change in ("cut", "gone", "same size", "foreign", "a file")
        assert ("clip is not what was made any more" in told) == changed_here
        assert made == expected
        assert [path.name for path in (root / "clip").iterdir()] == ["content"]
        assert (root / "clip/content").read_bytes() == (b"new" if change == "archive" else b"clip")

    def test_an_edit_that_keeps_size_and_time_is_seen(self, root, made):
        self.place_archives(root)
        assets.prepare(quiet=True)
        self.place_archives(root)
        content = root / "clip/content"
        before = content.stat()
        content.write_bytes(b"clap")
        os.utime(content, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert content.stat().st_mtime_ns == before.st_mtime_ns
        assets.prepare(quiet=True)
        assert content.read_bytes() == b"clip"

    def test_bytes_are_read_once_where_times_moved(self, root, made, monkeypatch):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        reads, digest = [], unchanged._digest
        monkeypatch.setattr(unchanged, "_digest", lambda folder: reads.append(folder.name) or digest(folder))
        assets.prepare(quiet=True)
        assert reads == []
        os.utime(root / "clip/content")
        assets.prepare(quiet=True)
        assert set(reads) == {"clip"}
        reads.clear()
        assets.prepare(quiet=True)
        assert (reads, made) == ([], [])

    def test_a_home_of_a_version_that_kept_no_digests(self, root, made):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        ready = (root / "ready.json").read_bytes()
        (root / "digests.json").unlink()
        assets.prepare(quiet=True)
        assert made == []
        assert (root / "ready.json").read_bytes() == ready  # that version compares it as a whole
        self.place_archives(root)
        (root / "clip/content").write_bytes(b"clap")
        assets.prepare(quiet=True)
        assert made == ["clip"]

    @pytest.mark.parametrize("name", ["ready.json", "digests.json"])
    @pytest.mark.parametrize("text", ["", "[]", "3", '{"clip": 3}', '{"clip": {"sha256": 3}}', "\udcff"])
    def test_notes_that_are_damaged(self, root, made, name, text):
        self.place_archives(root)
        assets.prepare(quiet=True)
        self.place_archives(root)
        (root / name).write_bytes(text.encode(errors="surrogateescape"))
        assets.prepare(quiet=True)
        assert [(root / folder / "content").read_bytes() for folder in ("dino", "clip", "moji")] == [
            b"dino", b"clip", b"moji",
        ]  # fmt: skip
        assert assets._unseen(assets._RECIPES, root) == []

    def test_a_home_that_cannot_be_written_to(self, root, made, monkeypatch):
        self.place_archives(root)
        assets.prepare(quiet=True)
        made.clear()
        monkeypatch.setattr(assets.os, "access", lambda *_: False)
        os.utime(root / "clip/content")
        assert assets.prepare(quiet=True).clip == root / "clip"
        (root / "clip/content").write_bytes(b"clap")
        with pytest.raises(RuntimeError, match=r"^clip in .*home is missing, or not what was made.*VST_HOME\.$"):
            assets.prepare(quiet=True)
        assert made == []

    def test_a_home_that_is_a_file(self, root, made):
        root.write_bytes(b"mine")
        with pytest.raises(RuntimeError, match=r"home is a file.*VST_HOME\.$"):
            assets.prepare(quiet=True)
        assert root.read_bytes() == b"mine"

    def test_two_at_once(self, root, made):
        self.place_archives(root)
        results = []
        threads = [threading.Thread(target=lambda: results.append(assets.prepare(quiet=True))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 3
        assert made == ["dino", "clip", "moji"]

    def test_failure_leaves_the_old_and_no_rubbish(self, root, made, monkeypatch):
        self.place_archives(root)
        assets.prepare(quiet=True)
        self.place_archives(root)

        def fail(archives, folder):
            (folder / "content").write_bytes(b"half")
            raise RuntimeError("converter broke")

        dino, clip, moji = assets._RECIPES
        monkeypatch.setattr(assets, "_RECIPES", (dino, replace(clip, version=2, make=fail), moji))
        with pytest.raises(RuntimeError, match="converter broke"):
            assets.prepare(quiet=True)
        assert (root / "clip/content").read_bytes() == b"clip"
        assert list(root.glob("making-*")) == []
        assert [r.folder for r in assets._unseen(assets._RECIPES, root)] == ["clip"]

    def test_recipes_of_others_stay_ready(self, root, made):
        """Whoever makes another folder in the same place must not have ours made anew, nor the other way round."""
        self.place_archives(root)
        (root / "archives/other.tgz").write_bytes(b"other")
        other = replace(assets._RECIPES[0], folder="other", packages=(package_of(b"other", filename="other.tgz"),))
        assert assets.make_ready([other], quiet=True) == [root / "other"]
        assets.prepare(quiet=True)
        assert assets.make_ready([other, assets._RECIPES[2]], quiet=True) == [root / "other", root / "moji"]
        assets.prepare(quiet=True)
        assert made == ["other", "dino", "clip", "moji"]
        assert sorted(json.loads((root / "ready.json").read_text())) == ["clip", "dino", "moji", "other"]

    def test_rubbish_of_a_killed_process_goes(self, root, made):
        self.place_archives(root)
        (root / "making-x/new").mkdir(parents=True)
        assets.prepare(quiet=True)
        assert not (root / "making-x").exists()


TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TINY_CLIP = {**convert.CLIP_CONFIG, **TINY, "intermediate_size": 48}
TINY_DINOV2 = {**convert.DINOV2_CONFIG, **TINY, "mlp_ratio": 2}


class Export:
    """An ONNX file as an exporter writes it: matrices anonymous, as (in, out), named by the nodes that read them."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}
        self.nodes: list[tuple[str, str, list[str]]] = []

    def add_matrix(self, module: str, weight: np.ndarray) -> None:
        name = f"onnx::MatMul_{100 + len(self.nodes)}"
        self.tensors[name] = weight.T
        self.nodes.append(("MatMul", f"/{module.replace('.', '/')}/MatMul", ["x", name]))

    def add_quantised(self, module: str, quantised: np.ndarray, scale: np.ndarray) -> None:
        name = f"onnx::MatMul_{100 + len(self.nodes)}"
        self.tensors[f"{name}_quantized"] = quantised.T
        self.tensors[f"{name}_scale"] = scale
        self.tensors[f"{name}_zero_point"] = np.zeros_like(scale, np.int8)
        inputs = ["x", f"{name}_quantized", "x_zero_point", f"{name}_zero_point"]
        self.nodes.append(("MatMulInteger", f"/{module.replace('.', '/')}/MatMul_quant", inputs))

    def to_bytes(self) -> bytes:
        onnx = pytest.importorskip("onnx")
        initialisers = [onnx.numpy_helper.from_array(np.ascontiguousarray(t), n) for n, t in self.tensors.items()]
        nodes = [onnx.helper.make_node(op, inputs, [f"{name}_out"], name=name) for op, name, inputs in self.nodes]
        graph = onnx.helper.make_graph(nodes, "toy", [], [], initialisers)
        return onnx.helper.make_model(graph).SerializeToString()


def hub_state(model, folder: Path) -> dict[str, torch.Tensor]:
    """Keys as transformers itself writes them to disk."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith("weight") and "embedding" not in name


def load_strictly(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.fixture
def tiny_clip(tmp_path):
    """A random CLIPVisionModel whose matrices are int8 times scale, and its quantised export."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY_CLIP)).eval()
    export = Export()
    rng = np.random.default_rng(0)
    state = hub_state(model, tmp_path / "hub")
    for name, tensor in state.items():
        exported = "vision_model." + name.removeprefix("vision_model.")  # some versions of transformers drop it
        if is_matrix(name, tensor):
            quantised = rng.integers(-127, 128, tuple(tensor.shape), np.int8)
            scale = rng.uniform(1e-3, 3e-3, tensor.shape[0]).astype(np.float32)
            tensor.copy_(torch.from_numpy(quantised * scale[:, None]))
            export.add_quantised(exported.removesuffix(".weight"), quantised, scale)
        else:
            tensor.copy_(torch.randn(tensor.shape) * 0.3)
            export.tensors[exported] = tensor.numpy()
    export.add_quantised("visual_projection", np.ones((4, 32), np.int8), np.ones(4, np.float32))
    convert.save_file(state, tmp_path / "hub/model.safetensors", metadata={"format": "pt"})
    return transformers.CLIPVisionModel.from_pretrained(tmp_path / "hub").eval(), export


@pytest.fixture
def tiny_dinov2(tmp_path):
    """A random Dinov2Model and its export with a decoder on top."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**TINY_DINOV2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    export = Export()
    for name, tensor in hub_state(model, tmp_path / "hub").items():
        if name == "embeddings.position_embeddings":
            export.tensors |= {"onnx::Concat_1": tensor[:, :1].numpy(), "onnx::Reshape_2": tensor[:, 1:].numpy()}
            export.nodes.append(("Reshape", "/backbone/embeddings/Reshape_1", ["onnx::Reshape_2", "shape"]))
            export.nodes.append(("Concat", "/backbone/embeddings/Concat_6", ["onnx::Concat_1", "resampled"]))
        elif is_matrix(name, tensor):
            export.add_matrix("backbone." + name.removesuffix(".weight"), tensor.numpy())
        elif name != "embeddings.mask_token":
            export.tensors[f"backbone.{name}"] = tensor.numpy()
    export.tensors["decoder.final_conv.bias"] = np.zeros(1, np.float32)
    # Attention multiplies activations with each other: such a node names no matrix.
    export.nodes.append(("MatMul", "/backbone/encoder/layer.0/attention/attention/MatMul", ["q", "k"]))
    return model, export


class TestConvert:
    def test_clip_equals_the_original(self, tiny_clip, tmp_path):
        model, export = tiny_clip
        convert.convert_clip(export.to_bytes(), tmp_path, TINY_CLIP)
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            got = load_strictly(type(model), tmp_path)(pixels)
            expected = model(pixels)
        assert torch.allclose(got.last_hidden_state, expected.last_hidden_state, atol=1e-5)
        assert torch.allclose(got.pooler_output, expected.pooler_output, atol=1e-5)

    def test_dinov2_equals_the_original(self, tiny_dinov2, tmp_path):
        model, export = tiny_dinov2
        convert.convert_dinov2(export.to_bytes(), tmp_path, TINY_DINOV2)
        loaded = load_strictly(type(model), tmp_path)
        for side in (32, 48):  # 48 resamples the positions
            pixels = torch.randn(2, 3, side, side)
            with torch.no_grad():
                assert torch.equal(loaded(pixels).last_hidden_state, model(pixels).last_hidden_state)
        assert loaded.embeddings.mask_token.count_nonzero() == 0

    def test_leftover_tensor(self, tiny_dinov2, tmp_path):
        _, export = tiny_dinov2
        export.tensors["backbone.encoder.layer.2.norm1.weight"] = np.ones(32, np.float32)
        with pytest.raises(RuntimeError, match=r"missing \[\], left over \['encoder.layer.2.norm1.weight'\]"):
            convert.convert_dinov2(export.to_bytes(), tmp_path, TINY_DINOV2)
        assert not (tmp_path / "model.safetensors").exists()

    def test_missing_tensor(self, tiny_clip, tmp_path):
        _, export = tiny_clip
        del export.tensors["vision_model.encoder.layers.1.mlp.fc1.bias"]
        with pytest.raises(
            RuntimeError, match=r"missing \['vision_model.encoder.layers.1.mlp.fc1.bias'\], left over \[\]"
        ):
            convert.convert_clip(export.to_bytes(), tmp_path, TINY_CLIP)

    def test_missing_positions(self, tiny_dinov2, tmp_path):
        _, export = tiny_dinov2
        export.nodes = [node for node in export.nodes if node[0] != "Concat"]
        export.nodes.append(("Add", "/elsewhere", ["onnx::Concat_1"]))
        with pytest.raises(RuntimeError, match=r"missing \['embeddings.position_embeddings'\]"):
            convert.convert_dinov2(export.to_bytes(), tmp_path, TINY_DINOV2)

    def test_misshapen_tensor(self, tiny_clip, tmp_path):
        _, export = tiny_clip
        with pytest.raises(RuntimeError, match=r"position_embedding.weight': \(\(17, 32\), \(65, 32\)\)"):
            convert.convert_clip(export.to_bytes(), tmp_path, {**TINY_CLIP, "image_size": 64})

    def test_asymmetric_quantisation(self, tiny_clip, tmp_path):
        _, export = tiny_clip
        name = next(n for n in export.tensors if n.endswith("zero_point"))
        export.tensors[name][3] = 2
        with pytest.raises(RuntimeError, match="zero points up to 2; expected symmetric int8"):
            convert.convert_clip(export.to_bytes(), tmp_path, TINY_CLIP)

    def test_onnx_missing(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "onnx", None)
        with pytest.raises(ImportError, match=r"vfm-stitch-tree\[demo\]"):
            convert.convert_clip(b"", tmp_path)


def png(colour: tuple[int, ...], size: tuple[int, int] = (4, 4), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, kind)
    return buffer.getvalue()


def tgz(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def entry(code: str, subcategory: str, category: str = "Objects") -> dict[str, str]:
    return {"image": f"{code}.png", "name": code.upper(), "category": category, "subcategory": subcategory, "x": "y"}


class TestEmoji:
    def test_extract(self, tmp_path):
        entries = [entry("2764-fe0f", "heart"), entry("1f600", "face"), entry("1f3fb", "tone", "Component")]
        entries += [entry("1f601", "face"), entry("../evil", "face")]
        listing = json.dumps(entries).encode()
        codes = ["2764-fe0f", "1f600", "1f3fb", "../evil", "1f44d-1f3fb"]
        google = {"package/emoji.json": listing} | {f"package/img/google/64/{c}.png": png((0,) * 4) for c in codes}
        google["package/img/google/64/1f601.png"] = png((0,) * 4)
        google["package/img/google/sheets/1f600.png"] = b"a sheet"
        twitter = {f"package/img/twitter/64/{c}.png": png((9,) * 4) for c in codes}
        fluent = {f"package/assets/{c}.webp": png((200,) * 4, kind="WEBP") for c in codes}
        archives = [tgz(tmp_path / n, f) for n, f in (("g", google), ("t", twitter), ("f", fluent))]
        target = tmp_path / "emoji"
        target.mkdir()
        emoji.extract(*archives, target)
        assert [vars(e) for e in emoji.load(target)] == [
            {"code": "1f600", "name": "1F600", "category": "Objects", "subcategory": "face"},
            {"code": "2764-fe0f", "name": "2764-FE0F", "category": "Objects", "subcategory": "heart"},
        ]
        files = sorted(str(p.relative_to(target)) for p in target.rglob("*.*"))
        assert files == sorted(
            ["emoji.json", *(f"{s}/{c}.{e}" for s, e in emoji.STYLES.items() for c in ("1f600", "2764-fe0f"))]
        )
        assert (target / "noto/1f600.png").read_bytes() == google["package/img/google/64/1f600.png"]
        found = emoji.pictures(target, ("fluent", "noto"))
        assert [(p.emoji.code, p.style) for p in found] == [
            (code, style) for code in ("1f600", "2764-fe0f") for style in ("fluent", "noto")
        ]
        assert all(p.path.is_file() for p in found)

    def test_nothing_in_common(self, tmp_path):
        google = tgz(tmp_path / "g", {"package/emoji.json": json.dumps([entry("1f600", "face")]).encode()})
        (tmp_path / "emoji").mkdir()
        with pytest.raises(RuntimeError, match="No emoji exists in all three"):
            emoji.extract(google, google, google, tmp_path / "emoji")

    def test_open_picture(self, tmp_path):
        (tmp_path / "p.png").write_bytes(png((200, 100, 0, 51), (4, 6)))  # 51 / 255 = 0.2
        picture = emoji.Picture(emoji.Emoji("1", "n", "c", "s"), "noto", tmp_path / "p.png")
        image = emoji.open_picture(picture, background=(100, 50, 50))
        assert (image.mode, image.size) == ("RGB", (6, 6))
        assert image.getpixel((3, 3)) == (120, 60, 40)
        assert image.getpixel((0, 3)) == (100, 50, 50)  # padded, not stretched
        assert emoji.open_picture(picture, size=12).size == (12, 12)
        assert emoji.open_picture(picture).getpixel((0, 0)) == (255, 255, 255)

    def test_subcategory_task(self, tmp_path):
        counts = {"z": 3, "b": 2, "a": 2, "c": 2, "d": 1}
        entries = [emoji.Emoji(f"{s}{i}", "n", "Objects", s) for s, n in counts.items() for i in range(n)]
        entries += [emoji.Emoji(f"f{i}", "n", "Flags", "country-flag") for i in range(9)]
        (tmp_path / "emoji.json").write_text(json.dumps([vars(e) for e in entries]))
        task = emoji.subcategory_task(tmp_path, classes=3)
        assert {(e.subcategory, label) for e, label in task} == {("a", 0), ("b", 1), ("z", 2)}
        assert len(task) == 7
        with pytest.raises(ValueError, match="expected 2 to 5"):
            emoji.subcategory_task(tmp_path, classes=6)

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="prepare"):
            emoji.load(tmp_path)
        with pytest.raises(ValueError, match=r"\['apple'\].*noto"):
            emoji.pictures(tmp_path, ("noto", "apple"))


@pytest.mark.assets
class TestRealAssets:
    @pytest.fixture(scope="class")
    def ready(self):
        return assets.prepare(quiet=True)

    def test_second_call_is_fast(self, ready):
        start = time.perf_counter()
        assert assets.prepare(quiet=True) == ready
        assert time.perf_counter() - start < 1
        assert not (assets.home() / "archives").exists()

    @pytest.mark.parametrize(
        ("folder", "kind", "parameters", "tokens", "width"),
        [
            ("dinov2", "Dinov2Model", 22_056_576, 257, 384),
            ("clip", "CLIPVisionModel", 85_799_424, 197, 768),
        ],
    )
    def test_transformers_loads_it(self, ready, folder, kind, parameters, tokens, width):
        transformers = pytest.importorskip("transformers")
        path = getattr(ready, folder)
        model = load_strictly(getattr(transformers, kind), path)
        assert sum(p.numel() for p in model.parameters()) == parameters
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape == (1, tokens, width)
        preprocessor = json.loads((path / "preprocessor_config.json").read_text())
        mean = {"dinov2": [0.485, 0.456, 0.406], "clip": [0.48145466, 0.4578275, 0.40821073]}
        assert preprocessor["image_mean"] == mean[folder]

    @pytest.mark.slow
    def test_clip_sees_what_is_drawn(self, ready):
        """The same emoji in another style is the nearest far more often than chance: the weights are CLIP's."""
        transformers = pytest.importorskip("transformers")
        model = load_strictly(transformers.CLIPVisionModel, ready.clip)
        chosen = [e.code for e in emoji.load(ready.emoji) if e.category in ("Animals & Nature", "Food & Drink")][::20]
        mean, std = (torch.tensor(convert.CLIP_PREPROCESSOR[key])[:, None, None] for key in ("image_mean", "image_std"))
        features = []
        for style in ("noto", "fluent"):
            shown = [p for p in emoji.pictures(ready.emoji, (style,)) if p.emoji.code in chosen]
            images = np.stack([np.asarray(emoji.open_picture(p, size=224)) for p in shown])
            pixels = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
            with torch.no_grad():
                features.append(torch.nn.functional.normalize(model(pixels).pooler_output, dim=-1))
        nearest = (features[0] @ features[1].T).argmax(1)
        accuracy = (nearest == torch.arange(len(chosen))).float().mean()
        assert accuracy > 0.7, f"{accuracy:.2f} of {len(chosen)}, where chance is {1 / len(chosen):.2f}"

    def test_emoji(self, ready):
        known = emoji.load(ready.emoji)
        assert len(known) == len({e.code for e in known}) == 1852
        assert {e.category for e in known} >= {"Flags", "Food & Drink"}
        assert "Component" not in {e.category for e in known}
        assert {e.code: e.name for e in known}["1f34e"] == "RED APPLE"
        found = emoji.pictures(ready.emoji)
        assert len(found) == 3 * 1852
        for picture in found[300:303]:
            with Image.open(picture.path) as image:
                assert image.size == ((256, 256) if picture.style == "fluent" else (64, 64))
            assert emoji.open_picture(picture, size=112).size == (112, 112)

    def test_apple_is_red_in_every_style(self, ready):
        apples = [p for p in emoji.pictures(ready.emoji) if p.emoji.code == "1f34e"]
        for picture in apples:
            red, green, blue = np.asarray(emoji.open_picture(picture, size=64))[28:44, 20:44].reshape(-1, 3).mean(0)
            assert red > 1.5 * max(green, blue), picture.style

    def test_subcategory_task(self, ready):
        task = emoji.subcategory_task(ready.emoji)
        assert len(task) == 767
        assert {label for _, label in task} == set(range(20))
        assert sum(e.subcategory == "animal-mammal" for e, _ in task) == 66
