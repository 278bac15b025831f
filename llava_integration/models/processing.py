"""Pictures and prompts for a language model on a tree: the trunk's preparation, the right number of image tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    BatchFeature,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.image_transforms import to_pil_image
from transformers.image_utils import ChannelDimension, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs

from llava_integration.models.chat import IMAGE_TOKEN, chat_template, multimodal_template
from llava_integration.models.preparation import warn_beside
from llava_integration.models.vision import VSTVisionConfig
from vst.data.images import ImageTransform
from vst.data.preparation import check_preparation, square_side
from vst.tree.config import VSTConfig
from vst.tree.projector import ProjectorSpec

# What processors of transformers that cut a picture into tiles need of their image processor, and this one is not.
_TILES = (
    "processors that cut a picture into tiles (LlavaNextProcessor, LlavaOnevisionProcessor) need their own image "
    "processor, with this one's size, image_mean and image_std"
)
_OF_TRANSFORMERS = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")  # what it writes


class _Options(ImagesKwargs, total=False):
    cut: str | None


class _Missing(KeyError):
    def __str__(self) -> str:
        return str(self.args[0])


class _Pixels(BatchFeature):
    """Pixel values, and a sentence for who looks for something else."""

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str) and item not in self.data:
            raise _Missing(f"A tree's image processor gives pixel_values of one size, and no {item}: {_TILES}.")
        return super().__getitem__(item)


class VSTImageProcessor(BaseImageProcessor):
    """:class:`vst.data.images.ImageTransform` as an image processor: equal to it bit for bit, kept with a model.

    Args:
        size: side of the square input in pixels, or ``{"height": S, "width": S}``.
        image_mean, image_std: of the trunk's normalisation.
        cut: crop, squash or pad.
        kwargs: other options of transformers' image processors, as far as they say what this one does.

    Raises:
        ValueError: a bad field, or an option that asks for another preparation.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (as the base class declares it)
    valid_kwargs = _Options

    def __init__(
        self,
        size: int | dict[str, int] = 224,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        cut: str = "crop",
        **kwargs: Any,
    ) -> None:
        own = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("_") or name in _OF_TRANSFORMERS}
        super().__init__(**own)
        side = square_side(size)
        if side is None:
            raise ValueError(f'size is {size!r}; expected the side of a square, or {{"height": S, "width": S}}.')
        self.size = {"height": side, "width": side}
        # What is wrong is told here and not at the first picture.
        transform = ImageTransform(size=side, mean=image_mean, std=image_std, cut=cut)  # type: ignore[arg-type]
        check_preparation(transform, kwargs)
        self.image_mean, self.image_std, self.cut = list(transform.mean), list(transform.std), cut

    @classmethod
    def from_tree(cls, config: VSTConfig) -> VSTImageProcessor:
        """The preparation that a tree's trunk wants."""
        trunk = config.trunk
        return cls(size=config.image_size, image_mean=trunk.mean, image_std=trunk.std, cut=config.cut)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every image processor of transformers; one that differs from the tree beside it brings a warning."""
        warn_beside(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @property
    def crop_size(self) -> dict[str, int]:
        """Height and width of the square input, which is :attr:`size`."""
        return dict(self.size)

    @crop_size.setter
    def crop_size(self, value: Any) -> None:
        if value is not None:  # the base class sets all that it knows of to None
            check_preparation(self.transform(), {"crop_size": value})

    def transform(self) -> ImageTransform:
        """The library's own preparation of one picture."""
        mean, std = tuple(self.image_mean), tuple(self.image_std)
        return ImageTransform(size=self.size["height"], mean=mean, std=std, cut=self.cut)  # type: ignore[arg-type]

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pictures to ``pixel_values [K, 3, S, S]``, float32.

        Args:
            images: PIL pictures of any mode, uint8 arrays or tensors (either channel order), or paths and URLs that
                transformers can fetch; one, a list, or lists of lists.
            return_tensors: ``pt`` or ``np``; None gives a list of arrays.
            input_data_format: ``channels_first`` or ``channels_last`` of arrays; default: as their shapes say.
            device: that tensors (``pt``) are handed over on; the preparation itself is the CPU's.
            kwargs: other options of transformers' image processors, as far as they say what this one does.

        Raises:
            ValueError: an option that asks for another preparation.
        """
        transform = self.transform()
        if kwargs.get("do_pad") and self.cut != "pad":
            raise ValueError(f"do_pad is True, but the tree's pictures are prepared with cut {self.cut!r}: {_TILES}.")
        # Some set attributes of an image processor in place of options.
        said = {name: value for name, value in vars(self).items() if name.startswith(("do_", "resample", "rescale"))}
        check_preparation(transform, said | kwargs)
        images = make_flat_list_of_images(self.fetch_images(images))
        pictures = (
            i if isinstance(i, Image.Image) else to_pil_image(_array(i), input_data_format=input_data_format)
            for i in images
        )
        pixels = [transform(picture) for picture in pictures]
        if return_tensors == "pt":
            return _Pixels({"pixel_values": torch.stack(pixels).to(device)})
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"device is {device}, but arrays stay on the CPU; give return_tensors 'pt' with it.")
        return _Pixels({"pixel_values": [p.numpy() for p in pixels]}, tensor_type=return_tensors)

    def to_dict(self) -> dict[str, Any]:
        """What is saved; ``crop_size`` follows from ``size``."""
        out = super().to_dict()
        out.pop("crop_size", None)
        return out


class VSTLlavaProcessor(LlavaProcessor):
    """transformers' LLaVA processor; what it would leave unread without a word is refused."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As every processor of transformers; one that differs from the tree beside it brings a warning."""
        warn_beside(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """As :class:`transformers.LlavaProcessor`, which see.

        Raises:
            ValueError: videos or sound, which a tree has no eye or ear for.
        """
        unread = {"videos": videos, "audio": audio, **{n: kwargs.get(n) for n in ("videos_kwargs", "audio_kwargs")}}
        for name, value in unread.items():
            if value is not None and not (isinstance(value, (dict, list, tuple)) and not value):
                raise ValueError(
                    f"{name} was given, but a language model on a tree reads pictures and text alone: hand over the "
                    "frames as images, with one <image> in the text for each."
                )
        return super().__call__(images=images, text=text, **kwargs)


def _array(image: Any) -> np.ndarray:
    return image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


def make_processor(
    tree: VSTConfig,
    tokenizer: PreTrainedTokenizerBase,
    projector: ProjectorSpec | None = None,
    template: str | None = None,
) -> LlavaProcessor:
    """transformers' LLaVA processor for a tree and a language model; it pads at the left, as generation needs.

    ``<image>`` is added to the tokenizer where it is missing; the model's embeddings must then have room for it.

    Args:
        tree: of the tower.
        tokenizer: of the language model; changed in place.
        projector: where it multiplies tokens, the count follows.
        template: a name or file of a chat template; default: the tokenizer's own.

    Raises:
        ValueError: the language model has no chat template and none is given, or its tokenizer neither a padding token
            nor an end of sequence, or one of them is ``<image>``.
    """
    if taken := [n for n in ("pad_token", "eos_token", "bos_token") if getattr(tokenizer, n) == IMAGE_TOKEN]:
        raise ValueError(
            f"The tokenizer's {taken[0]} is {IMAGE_TOKEN}, which stands for pictures alone: give it another, and save "
            "the tokenizer."
        )
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ValueError(
                f"The tokenizer {name} has neither a padding token nor an end of sequence (pad_token, eos_token), so "
                "no batch can be padded and no answer ends; set both and save the tokenizer."
            )
        tokenizer.pad_token = tokenizer.eos_token
    pad_left(tokenizer)
    own = multimodal_template(chat_template(tokenizer, template))
    tokenizer.chat_template = own
    return VSTLlavaProcessor(
        image_processor=VSTImageProcessor.from_tree(tree),
        tokenizer=tokenizer,
        patch_size=tree.trunk.patch,
        vision_feature_select_strategy="full",
        chat_template=own,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=image_tokens(tree, projector) - tree.grid**2,
    )


def pad_left(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad as generation needs it, also after a save: an answer goes on from the last token. Training pads by itself."""
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"  # what is in there alone is saved


def image_tokens(tree: VSTConfig, projector: ProjectorSpec | None = None) -> int:
    """Tokens that one picture takes in the language model."""
    own = tree.fuser().tokens(tree.grid**2)
    return own if projector is None else projector.tokens(own, len(tree.names))


AutoImageProcessor.register(VSTVisionConfig, image_processor_classes={"pil": VSTImageProcessor}, exist_ok=True)
