"""The tree as a transformers vision model: what ``vision_config`` of LLaVA names and ``AutoModel`` builds.

One config and one key layout: a folder that ``VSTEncoder.save_pretrained`` wrote is what ``AutoModel`` reads, and the
other way round.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vst.models.vfm import VFM
from vst.tree.baseline import FullTower
from vst.tree.config import MODEL_TYPE, Split, VSTConfig
from vst.tree.encoder import VSTEncoder


class VSTVisionConfig(PreTrainedConfig):
    """A tree's config (:class:`vst.tree.config.VSTConfig`, its fields unchanged) as transformers wants it.

    Attributes:
        full: the models of the tree in full, each with its own stem, in place of the stitched tree: the baseline that
            a tree is compared with. Its pictures are the trunk's.
    """

    model_type = MODEL_TYPE
    base_config_key = "vision_config"

    full: bool = False

    @classmethod
    def from_tree(cls, config: VSTConfig, full: bool = False) -> VSTVisionConfig:
        """Wrap a tree's config."""
        values = config.to_dict()
        values.pop("model_type")
        return cls(**values, full=full)

    def tree_config(self) -> VSTConfig:
        """The tree's own config.

        Raises:
            ValueError: fields that are missing or do not fit each other.
        """
        names = ("model_type", *(f.name for f in fields(VSTConfig)))
        return VSTConfig.from_dict({n: getattr(self, n) for n in names if hasattr(self, n)})

    @property
    def hidden_size(self) -> int:
        """Width of a fused token."""
        return self.tree_config().fuser().width

    @property
    def image_size(self) -> int:
        """Side of the square pictures in pixels."""
        return self.tree_config().image_size

    @property
    def patch_size(self) -> int:
        """Side of the trunk's patches in pixels."""
        return self.tree_config().trunk.patch

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the trunk."""
        return self.tree_config().trunk.depth

    @property
    def num_image_tokens(self) -> int:
        """Tokens out for one picture."""
        config = self.tree_config()
        return config.fuser().tokens(config.grid**2)


class VSTVisionModel(PreTrainedModel):
    """The tree (or its models in full) behind transformers' vision interface; ``self.tree`` is the real thing.

    The split of a call is ``split``, else ``self.split``, which can be set at any time; it is what LLaVA, which passes
    none, runs at.
    """

    config: VSTVisionConfig
    config_class = VSTVisionConfig
    base_model_prefix = "tree"
    main_input_name = "pixel_values"
    input_modalities = "image"
    # Attention is torch's scaled_dot_product_attention whatever is asked for: the choice belongs to the language model.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VSTVisionConfig) -> None:
        super().__init__(config)
        tree = config.tree_config()
        self.tree: VSTEncoder | FullTower = FullTower(tree) if config.full else VSTEncoder(tree)
        self.post_init()

    @classmethod
    def from_tree(cls, tree: VSTEncoder | FullTower) -> VSTVisionModel:
        """Wrap a tree that holds its weights."""
        with torch.device("meta"):
            model = cls(VSTVisionConfig.from_tree(tree.config, full=isinstance(tree, FullTower)))
        model.tree = tree
        return model

    @property
    def split(self) -> int | dict[str, int]:
        """Split of calls that name none."""
        return self.tree.config.default_split()

    @split.setter
    def split(self, value: Split | None) -> None:
        if isinstance(self.tree, VSTEncoder):
            self.tree.split = value
            self.config.split = self.tree.config.split

    def forward(self, pixel_values: Tensor, split: Split | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Fused tokens ``[B, tokens, width]``, in the dtype of the weights.

        ``hidden_states`` can be indexed as those of a model of the trunk's depth, and every entry is these tokens: the
        layer that is read is the tree's own (``feature_layer``). Prefix tokens are gone, so the select strategy is
        ``full``.

        Args:
            pixel_values: ``[B, 3, S, S]`` as the tree's transform makes them.
            split: None is ``self.split``.
            kwargs: what hosts pass to vision towers of all kinds; ignored.

        Raises:
            ValueError: pictures of the wrong size, a split that is not held.
        """
        tokens = self.tree(pixel_values.to(self.dtype), split=split)
        states = (tokens,) * (self.tree.config.trunk.depth + 1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1), hidden_states=states)

    def _init_weights(self, module: nn.Module) -> None:
        for name, p in module.named_parameters(recurse=False):
            if p.ndim > 1:
                init.normal_(p, std=0.02)
            elif "bias" in name:
                init.zeros_(p)
            else:
                init.ones_(p)
        if isinstance(module, VFM):  # what no checkpoint carries: placeholders at this point of a load
            module.renew_buffers()

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write what ``VSTEncoder.save_pretrained`` writes, with its key layout, over what is there."""
        if isinstance(self.tree, FullTower):
            raise ValueError("Only a tree is saved alone; models in full are saved as part of a language model.")
        self.tree.save_pretrained(Path(save_directory), overwrite=True)
