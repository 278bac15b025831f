"""The stitch tree in the hosts that people run.

With transformers 5, ``import llava_integration`` makes ``AutoConfig``, ``AutoModel``, ``AutoModelForImageTextToText``,
``AutoImageProcessor`` and ``AutoProcessor`` read saved trees and the language models built on them. With any
transformers from 4.37 on, ``llava_integration.install()`` gives the original LLaVA and its forks the tree as
``--vision_tower``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llava_integration.hosts import install, uninstall
from llava_integration.versions import auto_classes_served, check_auto_classes

if TYPE_CHECKING:
    from llava_integration.auto import (
        VSTImageProcessor,
        VSTLlavaConfig,
        VSTLlavaForConditionalGeneration,
        VSTVisionConfig,
        VSTVisionModel,
        image_tokens,
        make_processor,
    )

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

if auto_classes_served():
    import llava_integration.auto  # noqa: F401 (registers)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_auto_classes()
    from llava_integration import auto

    return getattr(auto, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
