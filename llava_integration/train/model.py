"""Which model is trained: one put together anew, or one that an earlier stage saved."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llava_integration.models import assemble
from vst.models.fields import check_fields, one_of
from vst.tree.baseline import FullTower
from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import read_config
from vst.tree.fusion import FUSIONS
from vst.tree.options import TreeArgs
from vst.tree.projector import ProjectorSpec

_OF_A_NEW_MODEL = ("tower", "tree", "llm", "full", "fusion", "projector", "template")


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained: a new one from tower and language model, or one that an earlier stage saved.

    Attributes:
        start: folder of an earlier stage, which brings all that follows.
        llm: causal language model: folder (``~`` is home) or hub id.
        tower: folder or hub id of a saved tree.
        tree: a tree to build from its models instead: for towers without stitches.
        full: the models of the tree in full, without stitches: the baseline.
        fusion: of the tower's branches; default: as the tree was saved.
        projector: kind and, for one projector a branch, fusion.
        template: chat template: a name (chatml, vicuna) or a .jinja file; default: the language model's own.
    """

    start: str | None = None
    llm: str | None = None
    tower: str | None = None
    tree: TreeArgs | None = None
    full: bool = False
    fusion: str | None = None
    projector: ProjectorSpec = field(default_factory=ProjectorSpec)
    template: str | None = None

    def __post_init__(self) -> None:
        for name in ("start", "llm", "tower", "template"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            if value == "":
                raise ValueError(f"model.{name} is ''; expected a folder or name, or none at all.")
        check_fields(self, prefix="model.")
        if self.fusion is not None:
            one_of(self.fusion, "model.fusion", FUSIONS)
        if self.start is not None:
            if given := [n for n in _OF_A_NEW_MODEL if getattr(self, n) not in (None, False, ProjectorSpec())]:
                raise ValueError(f"model.start brings its own {given[0]}: leave model.{', model.'.join(given)} out.")
        elif self.llm is None or (self.tower is None) == (self.tree is None):
            raise ValueError(
                "A new model needs model.llm and one of model.tower (a saved tree) and model.tree (one to build); or "
                "give model.start, the folder of an earlier stage."
            )

    def plan(self) -> tuple[VSTConfig, Any, ProjectorSpec, bool]:
        """Tree, language model's config, projector and ``full``, from configs alone."""
        if self.start is not None:
            config = _start_config(self.start)
            spec = config.projector_spec() if hasattr(config, "projector_spec") else ProjectorSpec()
            vision: Any = config.vision_config
            return vision.tree_config(), config.text_config, spec, vision.full
        tree = self.tree.plan() if self.tower is None else _tower_config(self.tower)  # type: ignore[union-attr]
        if self.fusion is not None:
            with torch.device("meta"):
                tree = VSTEncoder(tree).set_fusion(self.fusion).config
        assemble.check_reached(str(self.llm))
        try:
            text = AutoConfig.from_pretrained(os.path.expanduser(str(self.llm)))
        except OSError as error:
            raise FileNotFoundError(
                f"The language model {self.llm!r} cannot be read: give a folder that save_pretrained wrote, or a hub "
                "id that can be reached."
            ) from error
        return tree, text, self.projector, self.full

    def build(self, dtype: torch.dtype, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
        """The model, weights in ``dtype``, with its processor."""
        if self.start is not None:
            return assemble.load(self.start, dtype)  # type: ignore[return-value]
        tree: Any
        if self.full:
            tree = FullTower.from_config(self.plan()[0])
        else:
            tree = VSTEncoder.from_pretrained(self.tower) if self.tower is not None else VSTEncoder.from_args(self.tree)  # type: ignore[arg-type]
            if self.fusion is not None:
                tree.set_fusion(self.fusion)
        lm, tokenizer = assemble.load_language_model(self.llm, dtype)  # type: ignore[arg-type]
        model, processor = assemble.assemble(
            tree.to(dtype), lm, tokenizer, projector=self.projector, template=self.template, seed=seed
        )
        model.to(dtype=dtype)  # type: ignore[call-arg]
        return model, processor


def _tower_config(tower: str) -> VSTConfig:
    try:
        return read_config(tower)[1]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no tree {tower!r} (model.tower), neither in a folder here nor on the hub: fit it first (vst fit "
            "--out RUN leaves it in RUN/tree), give another one, or the models that one is built from (model.tree)."
        ) from error


def _start_config(folder: str) -> LlavaConfig:
    try:
        if not Path(folder).is_dir():  # else it may be taken for a name on the hub
            raise FileNotFoundError(folder)
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder} holds no model that an earlier stage left (model.start): run that stage first, or give the "
            "folder of a finished one."
        ) from error
    if not isinstance(config, LlavaConfig) or not hasattr(config.vision_config, "tree_config"):
        raise ValueError(
            f"{folder} holds a {config.model_type} model, expected a language model on a tree (model.start)."
        )
    return config
