"""What a tower costs inside its language model: its share of the time to the first token, and memory."""

from __future__ import annotations

from typing import Any

import torch

from llava_integration.models.chat import IMAGE_TOKEN
from vst.measure.latency import measure
from vst.measure.memory import working_mb
from vst.tree.splits import Split


@torch.inference_mode()
def first_token(
    model: Any, processor: Any, *, split: Split | None = None, batch_size: int = 1, question: str = "What is this?",
    repeats: int = 7,
) -> dict[str, Any]:  # fmt: skip
    """Time the tower alone and the whole way to the first token, in turns.

    Args:
        model: a ``LlavaForConditionalGeneration`` on a tree, on its device.
        processor: its processor.
        split: trunk depth, or one by branch; default: the tower's own.
        batch_size: pictures, each with its question, in a call.
        question: what is asked; a longer one makes the tower's share smaller.
        repeats: counted rounds.

    Returns:
        ``tower_ms`` and ``first_token_ms`` (medians), ``tower_share`` (median of the ratio round by round) with
        ``tower_share_low`` and ``tower_share_high`` (quartiles), ``prompt_tokens``, ``parameter_mb`` (weights of all),
        ``tower_parameter_mb`` and ``peak_mb`` (weights of all, and what a call holds at the most beside them).
    """
    tower, device = model.model.vision_tower, model.device
    before = tower.split
    if split is not None:
        tower.split = split
    try:
        message = {"role": "user", "content": f"{IMAGE_TOKEN}\n{question}"}
        text = processor.apply_chat_template([message], add_generation_prompt=True)
        side = processor.image_processor.size["height"]
        pictures = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
        inputs = processor(images=list(pictures), text=[text] * batch_size, return_tensors="pt").to(device)
        pixels = inputs["pixel_values"].to(model.dtype)
        inputs["pixel_values"] = pixels
        calls = {
            "tower": lambda: tower(pixels),
            "first token": lambda: model(**inputs, logits_to_keep=1),
        }
        times = measure(calls, reference="first token", repeats=repeats, device=device)
        working = working_mb(calls["first token"], device)
    finally:
        if split is not None:
            tower.split = before
    share = times["tower"]
    return {
        "tower_ms": share.median_ms,
        "first_token_ms": times["first token"].median_ms,
        "tower_share": share.ratio,
        "tower_share_low": share.ratio_low,
        "tower_share_high": share.ratio_high,
        "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "parameter_mb": _mb(model),
        "tower_parameter_mb": _mb(tower),
        "peak_mb": _mb(model) + working,
    }


def _mb(module: torch.nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in module.parameters()) / 2**20
