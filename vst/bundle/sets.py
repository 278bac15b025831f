"""What can be bundled by name, and the packages that things take; nothing else of the library is imported."""

from __future__ import annotations

from dataclasses import dataclass

LIBRARY = (
    "torch>=2.4", "torchvision>=0.19", "timm>=1.0.23", "safetensors>=0.4.3", "huggingface_hub>=0.36", "numpy>=1.24",
    "pillow>=10.1", "rich>=13.8", "jsonargparse[signatures]>=4.39",
)  # fmt: skip
"""Packages that the library and its command line take."""
DEMO = ("accelerate>=0.33", "scikit-learn>=1.3", "matplotlib>=3.8")
LANGUAGE = ("transformers>=5.6", "peft>=0.12")
OPEN_CLIP = ("open_clip_torch>=3.0",)


@dataclass(frozen=True)
class RecipeSet:
    """Recipes that one thing to bundle for takes.

    Attributes:
        modules: each has a function ``recipes``; they are imported when the set is asked for, never before.
        install: what brings their packages. requirements: of what runs on the folders.
        command: what is typed once the folders are there.
    """

    modules: tuple[str, ...]
    install: str
    requirements: tuple[str, ...]
    command: str


SETS = {
    "demo": RecipeSet(("vst.demo.assets",), "demo", (*LIBRARY, *DEMO), "vst demo"),
    "protocol": RecipeSet(
        ("vst.demo.assets", "vst.demo.fashion"),
        "demo",
        (*LIBRARY, *DEMO),
        "vst protocol --config configs/stitch/protocol-offline.yaml",
    ),
    "llava-demo": RecipeSet(
        ("vst.demo.assets", "llava_integration.demo.assets"),
        "llava-demo",
        (*LIBRARY, *DEMO, *LANGUAGE),
        "python -m llava_integration demo",
    ),
}
"""What ``--for`` takes by name. What is above this library is named here and imported nowhere."""
