"""What a training leaves in its folder: the whole model, and nothing of an earlier one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlavaProcessor

from llava_integration.train.card import CARD, is_own_card, write_card
from llava_integration.train.content import PICTURES
from vst.tree.folder import weight_files

if TYPE_CHECKING:
    from llava_integration.train.trainer import MLLMTrainer

_STAGING = ".model"
# What transformers writes of a model and its processor beside the weights, whichever kind they are of.
_OF_A_MODEL = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip


def clear(folder: Path) -> None:
    """Take away what a run before left, so that nothing of it is taken for the new run's."""
    for name in ("checkpoints", _STAGING):
        shutil.rmtree(folder / name, ignore_errors=True)
    own = (path.name for pattern in _OF_A_MODEL for path in folder.glob(pattern))
    for name in (*weight_files(folder), *own):
        (folder / name).unlink()
    (folder / PICTURES).unlink(missing_ok=True)
    if is_own_card(folder / CARD):
        (folder / CARD).unlink()


def export(
    trainer: MLLMTrainer, tuner: Any, processor: LlavaProcessor, folder: Path, dtypes: Mapping[str, torch.dtype],
    language_model: str | None = None, trained: str = "",
) -> None:  # fmt: skip
    """Write the model beside the run's files, and a card; config.json, which says that there is a model, comes last.

    Args:
        trainer: that has trained it.
        tuner: LoRA's, to be folded in, or None.
        processor: of the model.
        folder: the run's.
        dtypes: by name, the type in which each tensor was built: it is saved in it, whatever it was trained in.
        language_model, trained: for the card, see :func:`llava_integration.train.card.write_card`.
    """
    engine: Any = trainer.deepspeed
    zero3 = trainer.is_deepspeed_enabled and engine.zero_optimization_stage() == 3
    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered: Any = nullcontext()
    if zero3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)
    with gathered:
        if not trainer.args.should_save:
            return
        if tuner is not None:
            tuner.merge_and_unload()
        staging = folder / _STAGING
        shutil.rmtree(staging, ignore_errors=True)
        tensors = {k: v.detach().to("cpu", dtypes[k]) for k, v in model.state_dict().items()}
        model.config.use_cache = True
        model.save_pretrained(staging, state_dict=tensors)
        # The config's one type is what the whole is loaded in. transformers takes it from the first parameter, which
        # may be a master weight; the widest of those that were written loses nothing of any.
        kinds = {v.dtype for v in tensors.values() if v.is_floating_point()}
        model.config.dtype = reduce(torch.promote_types, kinds)
        model.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        write_card(staging, language_model, trained)
    if (folder / CARD).exists() and not is_own_card(folder / CARD):
        (staging / CARD).unlink()  # a user's own stays
    files = sorted(staging.iterdir(), key=lambda p: p.name == "config.json")
    for path in files:
        os.replace(path, folder / path.name)
    staging.rmdir()
