"""What transformers' Auto classes read once this is imported: saved trees and the language models built on them."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaProcessor,
)

from llava_integration.models.llava import VSTLlavaConfig, VSTLlavaForConditionalGeneration
from llava_integration.models.processing import VSTImageProcessor
from llava_integration.models.vision import VSTVisionConfig, VSTVisionModel

AutoConfig.register(VSTVisionConfig.model_type, VSTVisionConfig, exist_ok=True)
AutoModel.register(VSTVisionConfig, VSTVisionModel, exist_ok=True)
AutoImageProcessor.register(VSTVisionConfig, image_processor_classes={"pil": VSTImageProcessor}, exist_ok=True)
AutoConfig.register(VSTLlavaConfig.model_type, VSTLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(VSTLlavaConfig, VSTLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VSTLlavaConfig, LlavaProcessor, exist_ok=True)
