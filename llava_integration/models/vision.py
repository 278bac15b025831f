"""The tree as a transformers vision model: what ``vision_config`` of LLaVA names and ``AutoModel`` builds.

One config and one key layout: a folder that ``VSTEncoder.save_pretrained`` wrote is what ``AutoModel`` reads, and the
other way round.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import TransformersKwargs, cached_file
from transformers.utils.generic import can_return_tuple

from llava_integration.hosts.options import no_grid
from llava_integration.models.preparation import LOOKS, looks_left, warn_beside
from vst.models.vfm import VFM
from vst.tree.baseline import FullTower
from vst.tree.config import MODEL_TYPE, VSTConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import CARD, CONFIG, PREPROCESSOR, WEIGHTS, check_seal
from vst.tree.fusion import FUSIONS
from vst.tree.splits import Split

# Said to every part of a model; what is meant for the language model alone changes nothing in a tower.
_FOR_ALL_PARTS = set(TransformersKwargs.__annotations__) - {"output_attentions"}
_WHERE = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
HUB = ("repo_id", "token", "private", "commit_message", "create_pr", "revision")
# Options of transformers' save_pretrained, with the values that ask for what is done anyway.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "variant": (None,),
    "safe_serialization": (None, True),
    "save_peft_format": (True, False),
    "save_original_format": (True, False),
    "distributed_checkpoint": (False,),
}


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
        tree = self.tree_config()
        return _NoGrid(tree.trunk.patch, tree) if FUSIONS[tree.fusion].multiplies else tree.trunk.patch

    @property
    def num_hidden_layers(self) -> int:
        """Depth of the trunk."""
        return self.tree_config().trunk.depth

    @property
    def num_image_tokens(self) -> int:
        """Tokens out for one picture."""
        config = self.tree_config()
        return config.fuser().tokens(config.grid**2)


class _NoGrid(int):
    """A patch's side, of a tree whose tokens are no grid: dividing a picture's side by it asks for that grid.

    Models that lay a picture's tokens out as a grid again (LlavaNext, LlavaOnevision) do so.
    """

    tree: VSTConfig

    def __new__(cls, side: int, tree: VSTConfig) -> _NoGrid:
        self = super().__new__(cls, side)
        self.tree = tree
        return self

    def __rfloordiv__(self, other: Any) -> Any:
        raise ValueError(no_grid(self.tree))


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
    _no_split_modules = VSTEncoder._no_split_modules

    def __init__(self, config: VSTVisionConfig) -> None:
        super().__init__(config)
        tree = config.tree_config()
        self.tree: VSTEncoder | FullTower = FullTower(tree) if config.full else VSTEncoder(tree)
        self._looks = LOOKS
        self.post_init()

    @classmethod
    def from_tree(cls, tree: VSTEncoder | FullTower) -> VSTVisionModel:
        """Wrap a tree that holds its weights."""
        with torch.device("meta"):
            model = cls(VSTVisionConfig.from_tree(tree.config, full=isinstance(tree, FullTower)))
        model.tree = tree
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> VSTVisionModel:
        """Load a saved tree as transformers does, once its seal was looked at.

        A processor beside it that prepares pictures otherwise brings a warning.

        Args:
            pretrained_model_name_or_path: folder or hub id of a tree.
            args, kwargs: transformers' own.

        Raises:
            OSError: there is no tree.
            ValueError: weights or a config that are not what was saved.
        """
        source = pretrained_model_name_or_path
        if source is not None and kwargs.get("state_dict") is None:
            where = {name: kwargs[name] for name in _WHERE if name in kwargs}
            options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False, **where}
            parts = [cached_file(source, part, **options) for part in (CONFIG, WEIGHTS)]
            if all(parts):  # else weights of another form, which have no seal, or none at all
                check_seal(Path(str(parts[0])).parent)
        read = super().from_pretrained(source, *args, **kwargs)
        warn_beside(source)
        return read

    @property
    def split(self) -> int | dict[str, int]:
        """Split of calls that name none."""
        return self.tree.config.default_split()

    @split.setter
    def split(self, value: Split | None) -> None:
        if isinstance(self.tree, VSTEncoder):
            self.tree.split = value
            self.config.split = self.tree.config.split

    @can_return_tuple
    def forward(self, pixel_values: Tensor, split: Split | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Fused tokens ``[B, tokens, width]``, in the dtype of the weights.

        ``hidden_states`` can be indexed as those of a model of the trunk's depth, and every entry is these tokens: the
        layer that is read is the tree's own (``feature_layer``). Prefix tokens are gone, so the select strategy is
        ``full``.

        Args:
            pixel_values: ``[B, 3, S, S]`` as the tree's transform makes them.
            split: None is ``self.split``.
            kwargs: what transformers says to all parts of a model (``return_dict``, ``output_hidden_states``, options
                of the language model's attention and loss).

        Raises:
            ValueError: pictures of the wrong size, a split that is not held, something that no tree gives (attentions,
                other grids).
        """
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in _FOR_ALL_PARTS:
                raise ValueError(
                    f"{name} is {value!r}, which a tree cannot serve: it gives fused tokens of pictures of one size; "
                    "leave it out."
                )
        if self._looks:
            self._looks = looks_left(self._looks, pixel_values, self.tree.config)
        tokens = self.tree(pixel_values.to(self.dtype), split=split)
        states = (tokens,) * (self.tree.config.trunk.depth + 1)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1), hidden_states=states)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super()._initialize_weights(module, *args, **kwargs)
        if module is self:  # the last that a loader calls, whatever this model is part of, once its tensors are there
            self._freeze()

    def _freeze(self) -> None:
        """Freeze the foundation models again: loaders put parameters of their own, trainable ones, in place."""
        for module in self.tree.modules():
            if isinstance(module, VFM):
                module.requires_grad_(False)

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

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what ``VSTEncoder.save_pretrained`` writes, with its key layout, over what is there.

        Args:
            save_directory: folder.
            is_main_process: False writes nothing.
            state_dict: tensors to write in place of the model's own, under the model's names.
            push_to_hub: upload the files afterwards.
            max_shard_size: of the one file that a tree is saved in, as 5000000 or "5MB"; default: no limit.
            kwargs: for the upload, ``repo_id`` (default: the folder's name), ``token``, ``private``,
                ``commit_message``, ``create_pr`` and ``revision``. Of transformers' others those that change nothing
                here.

        Raises:
            ValueError: models in full; weights beyond ``max_shard_size``; tensors that are not the model's; an option
                that cannot be served.
        """
        if isinstance(self.tree, FullTower):
            raise ValueError("Only a tree is saved alone; models in full are saved as part of a language model.")
        folder, hub = Path(save_directory), {n: kwargs.pop(n) for n in HUB if n in kwargs}
        for name, value in kwargs.items():
            if name not in _WITHOUT_EFFECT or value not in _WITHOUT_EFFECT[name]:
                raise ValueError(
                    f"save_pretrained was given {name} ({value!r}), but a tree is saved as one safetensors file of its "
                    "own names; leave it out."
                )
        if not push_to_hub and set(hub) - {"token"}:
            raise ValueError(f"{', '.join(sorted(hub))} are for an upload only; give push_to_hub=True with them.")
        tensors = self.state_dict() if state_dict is None else state_dict
        if max_shard_size is not None:
            plan = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
            if plan.is_sharded:
                raise ValueError(
                    f"max_shard_size is {max_shard_size}, but a tree is saved in one file, and this one would need "
                    f"{len(plan.filename_to_tensors)}; give a larger one."
                )
        if not is_main_process:
            return
        prefix = f"{self.base_model_prefix}."
        self.tree.save_pretrained(
            folder, overwrite=True, state_dict={n.removeprefix(prefix): t for n, t in tensors.items()}
        )
        if push_to_hub:
            api = HfApi(token=hub.pop("token", None))
            repo = api.create_repo(hub.pop("repo_id", folder.name), exist_ok=True, private=hub.pop("private", None))
            files = [CONFIG, WEIGHTS, PREPROCESSOR, CARD]
            api.upload_folder(repo_id=repo.repo_id, folder_path=folder, allow_patterns=files, **hub)


AutoConfig.register(VSTVisionConfig.model_type, VSTVisionConfig, exist_ok=True)
AutoModel.register(VSTVisionConfig, VSTVisionModel, exist_ok=True)
