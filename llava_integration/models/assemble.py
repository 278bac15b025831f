"""A tree and a causal language model become one LLaVA model with its processor."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llava_integration.models.chat import IMAGE_TOKEN
from llava_integration.models.llava import VSTLlavaConfig, VSTLlavaForConditionalGeneration
from llava_integration.models.preparation import warn_beside
from llava_integration.models.processing import image_tokens, make_processor, pad_left
from llava_integration.models.vision import VSTVisionConfig, VSTVisionModel
from vst.models.finite import not_finite, some
from vst.tree.baseline import FullTower
from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import check_weights
from vst.tree.projector import ProjectorSpec


def model_config(
    tree: VSTConfig, text_config: Any, image_token: int, projector: ProjectorSpec, *, full: bool = False
) -> LlavaConfig:
    """The config of the whole; LLaVA's own class where its projector is the one that is asked for."""
    common = {
        "vision_config": VSTVisionConfig.from_tree(tree, full=full),
        "text_config": text_config,
        "image_token_index": image_token,
        "image_seq_length": image_tokens(tree, projector),
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "tie_word_embeddings": bool(getattr(text_config, "tie_word_embeddings", False)),
    }
    if projector == ProjectorSpec():
        return LlavaConfig(**common)
    return VSTLlavaConfig(**common, projector=projector.to_dict())


def assemble(
    tree: VSTEncoder | FullTower,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    projector: ProjectorSpec | None = None,
    template: str | None = None,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put a tree before a language model; the projector between them is new, the rest keeps its weights.

    Args:
        tree: a tree, or its models in full.
        language_model: a causal language model of transformers; it is taken apart and must not be used alone any more.
        tokenizer: its tokenizer; ``<image>`` is added where it is missing.
        projector: default: LLaVA-1.5's, in transformers' own class.
        template: name or file of a chat template; default: the tokenizer's own.
        seed: of the projector's weights.

    Raises:
        ValueError: no chat template; a language model whose logits are not its head's product alone.
    """
    spec = ProjectorSpec() if projector is None else projector
    processor = make_processor(tree.config, tokenizer, spec, template)
    lm: Any = language_model
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for table in (lm.get_input_embeddings().weight, lm.get_output_embeddings().weight):
                table[rows:] = table[:rows].float().mean(0).to(table.dtype)
    if lm.config.tie_word_embeddings and not hasattr(lm.base_model, "embed_tokens"):
        # LLaVA ties its head to a table of that name alone; where it has another name, the head becomes a copy.
        head = lm.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        lm.config.tie_word_embeddings = False
    expected = _probe(lm)
    token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config: Any = model_config(tree.config, lm.config, token, spec, full=isinstance(tree, FullTower))
    kind = VSTLlavaForConditionalGeneration if isinstance(config, VSTLlavaConfig) else LlavaForConditionalGeneration
    with torch.device("meta"):
        model: Any = kind(config)
    model.model.vision_tower = VSTVisionModel.from_tree(tree)
    model.model.vision_tower.config = model.config.vision_config  # one object, so that a split set later is saved
    model.model.language_model = lm.base_model
    model.lm_head = lm.get_output_embeddings()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # It reads the tower's tokens as they come; what it makes of them is cast to the language model's type by LLaVA.
        model.model.multi_modal_projector = _fresh(model.model.multi_modal_projector).to(model.model.vision_tower.dtype)
    model.generation_config = _generation(lm, tokenizer)
    if config.tie_word_embeddings:
        model.tie_weights()
    difference = (_probe(model) - expected).abs().max().item()
    if not difference <= 1e-2 * expected.abs().max().item():
        raise ValueError(
            f"{type(language_model).__name__} gives other logits inside LLaVA than alone (off by {difference:.3g}): "
            "its head does more than multiply by a matrix, which LlavaForConditionalGeneration leaves out; use another "
            "language model."
        )
    return model.eval(), processor


def check_reached(source: str) -> None:
    """Ask the hub once for a language model that is not here, before transformers asks for many seconds.

    Raises:
        FileNotFoundError: it is neither a folder nor in the hub's cache, and the hub gives no answer.
    """
    if os.path.exists(os.path.expanduser(source)):
        return
    try:
        if not isinstance(try_to_load_from_cache(source, "config.json"), str):
            HfApi().model_info(source, timeout=10)
    except (HFValidationError, HfHubHTTPError):
        return  # no name on the hub, or it has answered: who loads it says what is wrong
    except Exception as error:  # whatever the client's way to the network raises
        raise FileNotFoundError(
            f"The language model {source!r} is neither a folder here nor in the cache of the hub, which cannot be "
            f"reached ({type(error).__name__}): fetch it where there is a network (hf download {source}) and give its "
            "folder (model.llm)."
        ) from error


def load_language_model(source: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from a folder (``~`` is home) or hub id; no code of it is run.

    Raises:
        FileNotFoundError: it is not there, or cannot be reached.
    """
    source = os.path.expanduser(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype), tokenizer
    except OSError as error:
        raise FileNotFoundError(
            f"The language model {source!r} cannot be read ({_first_line(error)}): give a folder that save_pretrained "
            "wrote, or a hub id that can be reached."
        ) from error


def load(folder: str | Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, LlavaProcessor]:
    """A saved model and its processor, in evaluation mode.

    Raises:
        FileNotFoundError: there is none, or a file of its weights is missing.
        ValueError: a file of its weights was cut, lacks tensors of the model, or holds numbers that are not finite.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no saved model (config.json); give the folder of a finished run.")
    check_weights(folder)
    options = {} if dtype is None else {"dtype": dtype}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    model, found = loaded
    # transformers itself makes up whatever is missing, and says so in a table.
    if odd := sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}):
        raise ValueError(f"{folder} lacks {some(odd)} of the model in its config.json: restore it, or save it again.")
    if bad := not_finite(model.state_dict()):
        raise ValueError(f"{folder} holds numbers that are not finite in {some(bad)}: restore it, or save it again.")
    processor = AutoProcessor.from_pretrained(folder)
    warn_beside(folder)
    pad_left(processor.tokenizer)  # folders of an earlier version do not say so
    return model.eval(), processor


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _fresh(projector: nn.Module) -> nn.Module:
    projector = projector.to_empty(device="cpu")
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    return projector


def _generation(language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The language model's own, with an end and a padding token whatever it forgot to say."""
    config = GenerationConfig.from_dict((language_model.generation_config or GenerationConfig()).to_dict())
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.eos_token_id is None:
        warnings.warn(
            "Neither the tokenizer (eos_token) nor the language model's generation_config says which token ends an "
            "answer, so every answer will run to its longest; set one of the two.",
            stacklevel=3,
        )
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


@torch.inference_mode()
def _probe(model: Any) -> torch.Tensor:
    """Logits of a few tokens of text."""
    device = model.get_input_embeddings().weight.device
    return model.eval()(input_ids=torch.arange(5, 13, device=device)[None]).logits.float()
