"""The stitch tree in the hosts that people run.

With transformers 5, ``import llava_integration`` makes ``AutoConfig``, ``AutoModel``, ``AutoModelForImageTextToText``,
``AutoImageProcessor`` and ``AutoProcessor`` read saved trees and the language models built on them. With any
transformers from 4.37 on, ``llava_integration.install()`` gives the original LLaVA and its forks the tree as
``--vision_tower``.
"""

from __future__ import annotations

from typing import Any

from llava_integration.hosts import install, uninstall
from llava_integration.hosts.versions import auto_classes_served, check_auto_classes

if auto_classes_served():  # each of these modules tells the Auto classes of what it defines
    from llava_integration.models.llava import VSTLlavaConfig, VSTLlavaForConditionalGeneration
    from llava_integration.models.processing import VSTImageProcessor, image_tokens, make_processor
    from llava_integration.models.vision import VSTVisionConfig, VSTVisionModel

__all__ = [
    "VSTImageProcessor",
    "VSTLlavaConfig",
    "VSTLlavaForConditionalGeneration",
    "VSTVisionConfig",
    "VSTVisionModel",
    "image_tokens",
    "install",
    "make_processor",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    """What is in ``__all__`` and not here needs another transformers, which the error says."""
    if name in __all__:
        check_auto_classes()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
