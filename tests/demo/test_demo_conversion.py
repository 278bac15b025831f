"""Encoders converted from exports give what the originals give, and whatever does not fit is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from demo_kit import load_strictly
from safetensors.torch import load_file

from vst.demo import convert

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
