"""LLaVA with a projector of our own: one matrix, or one projector a branch. All else is transformers' LLaVA."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llava_integration.models.processing import VSTLlavaProcessor
from vst.tree.config import VSTConfig
from vst.tree.projector import Projector, ProjectorSpec


class VSTLlavaConfig(LlavaConfig):
    """transformers' LLaVA config with the projector's spec.

    Attributes:
        projector: fields of :class:`vst.tree.projector.ProjectorSpec`.
    """

    model_type = "vst_llava"

    projector: dict[str, Any] | None = None

    def projector_spec(self) -> ProjectorSpec:
        """The projector.

        Raises:
            ValueError: unknown fields or values.
        """
        return ProjectorSpec.from_dict(self.projector or {})


class VSTLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """transformers' LLaVA; only the projector is another."""

    config: VSTLlavaConfig
    config_class = VSTLlavaConfig

    def __init__(self, config: VSTLlavaConfig) -> None:
        super().__init__(config)
        spec = config.projector_spec()
        tree = config.vision_config.tree_config()  # type: ignore[union-attr]
        check_projector(tree, spec)
        text: Any = config.text_config
        self.model.multi_modal_projector = spec.build(projector_widths(tree), text.hidden_size)
        self.post_init()


def projector_widths(tree: VSTConfig) -> list[int]:
    """Widths of the branches, as far as they stand side by side in a fused token."""
    if tree.fusion == "channel":
        return [spec.width for spec in tree.specs.values()]
    return [tree.fuser().width]


def check_projector(tree: VSTConfig, spec: ProjectorSpec) -> None:
    """See that one projector a branch meets branches side by side.

    Raises:
        ValueError: the tree fuses its branches in another way.
    """
    if spec.fusion is not None and tree.fusion != "channel":
        raise ValueError(
            f"The projector fuses branches ({spec.fusion}), and so does the tree ({tree.fusion}): use fusion 'channel' "
            "for the tree, which hands the branches over side by side."
        )


def build_projector(tree: VSTConfig, spec: ProjectorSpec, width: int) -> Projector:
    """A projector with fresh weights for a tree and a language model of ``width``."""
    check_projector(tree, spec)
    return spec.build(projector_widths(tree), width)


AutoConfig.register(VSTLlavaConfig.model_type, VSTLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(VSTLlavaConfig, VSTLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VSTLlavaConfig, VSTLlavaProcessor, exist_ok=True)
