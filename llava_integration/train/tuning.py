"""Which parameters of a model are trained, at which rate, and LoRA on the language model (through peft)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, LlavaForConditionalGeneration

from llava_integration.train.config import TuneConfig

PARTS = ("projector", "stitches", "llm")


def part_of(name: str) -> str | None:
    """The trainable part that a parameter belongs to, by its name; None is the frozen tower."""
    if "multi_modal_projector." in name:
        return "projector"
    if "vision_tower." in name:
        return "stitches" if ".stitches." in name else None
    return "llm"


def prepare(model: LlavaForConditionalGeneration, tune: TuneConfig) -> Any:
    """Freeze and unfreeze in place; add LoRA where it is asked for.

    Returns:
        peft's tuner (its ``merge_and_unload`` folds LoRA in), or None without LoRA.

    Raises:
        ImportError: LoRA was asked for and peft is missing.
        ValueError: nothing would be trained.
    """
    model.requires_grad_(False)
    tuner = _lora(model, tune) if tune.llm == "lora" else None
    wanted = {"projector": tune.projector, "stitches": tune.stitches, "llm": tune.llm == "full"}
    for name, p in model.named_parameters():
        part = part_of(name)
        if part is not None and wanted[part]:
            p.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing of this model would be trained: its tower has no stitches; set tune.projector.")
    return tuner


def groups(model: nn.Module, tune: TuneConfig, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer; biases and norms without decay."""
    rates, out = tune.learning_rates(), []
    for part in PARTS:
        for decayed in (True, False):
            own = [
                p
                for n, p in model.named_parameters()
                if p.requires_grad and part_of(n) == part and (p.ndim > 1) == decayed
            ]
            if own:
                rate = rates[part]
                out.append(
                    {
                        "params": own,
                        "lr": learning_rate if rate is None else rate,
                        "weight_decay": weight_decay if decayed else 0.0,
                    }
                )
    return out


def lora_parameters(text_config: Any, tune: TuneConfig) -> int:
    """How many parameters LoRA adds to a language model, from its config alone."""
    with torch.device("meta"):
        model = AutoModel.from_config(text_config)
        _adapted(model, tune)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _lora(model: LlavaForConditionalGeneration, tune: TuneConfig) -> Any:
    # The language model alone is adapted, in place: names, saving and Trainer treat the whole as a plain model.
    return _adapted(model.model.language_model, tune)


def _adapted(language_model: Any, tune: TuneConfig) -> Any:
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ImportError('LoRA needs peft: pip install "vfm-stitch-tree[llava]".') from error
    config = LoraConfig(
        r=tune.lora_rank, lora_alpha=tune.lora_alpha, lora_dropout=tune.lora_dropout, target_modules="all-linear"
    )
    return LoraModel(language_model, {"default": config}, "default")
