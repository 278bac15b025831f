"""From a question with its pictures to tokens, and from several of them to one batch, padded from the left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_integration.answer.ask import beginning
from llava_integration.models.chat import encode


@dataclass(frozen=True)
class Prompt:
    """What the model gets for one request.

    Attributes:
        ids: tokens; each picture is as many image tokens as the tower gives.
        text: what they spell, each picture being one image token.
        pixels: ``[pictures, 3, S, S]``, in the order of the image tokens.
        labels: as ``ids`` for a prompt with its answer, -100 outside the answer; None for a prompt to go on from.
    """

    ids: list[int]
    text: str
    pixels: Tensor
    labels: list[int] | None = None


class Prompter:
    """Writes prompts as training did: pictures first, the chat template around, a beginning of sequence where due.

    Args:
        processor: the model's ``LlavaProcessor``.
        image_tokens: tokens of a picture.
        blank: put zeros, that is the trunk's mean colour, in place of every picture.
    """

    def __init__(self, processor: Any, image_tokens: int, blank: bool = False) -> None:
        if processor.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token, but batches are padded; set its pad_token.")
        self.processor, self.image_tokens, self.blank = processor, image_tokens, blank

    def question(self, context: str, pictures: Sequence[Any]) -> Prompt:
        """A question to be answered.

        Args:
            context: its text. Image tokens in it say where the pictures stand; without any, they come first.
            pictures: PIL pictures, of any number.

        Raises:
            ValueError: the text has image tokens, but not one a picture; something is no picture.
        """
        tokenizer = self.processor.tokenizer
        message = {"role": "user", "content": self._content(context, pictures)}
        text = self.processor.apply_chat_template([message], add_generation_prompt=True)
        token = self.processor.image_token
        whole = text.replace(token, token * self.image_tokens)
        ids = beginning(tokenizer, text) + list(tokenizer(whole, add_special_tokens=False)["input_ids"])
        return Prompt(ids, text, self._pixels(pictures))

    def answered(self, context: str, pictures: Sequence[Any], answer: str) -> Prompt:
        """A question with an answer, which is labelled with the end of its turn, as in training.

        Args:
            context, pictures: as of :meth:`question`.
            answer: white space around it is the template's business and taken off.
        """
        messages = [
            {"role": "user", "content": self._content(context, pictures)},
            {"role": "assistant", "content": answer.strip()},
        ]
        found = encode(messages, self.processor.tokenizer, image_tokens=self.image_tokens)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=False)
        return Prompt(found.input_ids, text, self._pixels(pictures), found.labels)

    def _content(self, context: str, pictures: Sequence[Any]) -> str:
        token = self.processor.image_token
        named = context.count(token)
        if named not in (0, len(pictures)):
            raise ValueError(
                f"A question has {len(pictures)} pictures and {named} times {token} in its text ({context[:80]!r}); "
                "expected one for each picture, or none."
            )
        return context if named else f"{token}\n" * len(pictures) + context

    def _pixels(self, pictures: Sequence[Any]) -> Tensor:
        processor = self.processor.image_processor
        side = processor.size["height"]
        if not pictures:
            return torch.zeros(0, 3, side, side)
        if odd := next((p for p in pictures if not isinstance(p, Image.Image)), None):
            raise ValueError(
                f"A request brings a {type(odd).__name__} to look at; expected pictures (PIL): this model takes no "
                "videos and no sound."
            )
        if self.blank:
            return torch.zeros(len(pictures), 3, side, side)
        return processor(images=list(pictures), return_tensors="pt")["pixel_values"]


def pad(prompts: Sequence[Prompt], pad_id: int) -> dict[str, Tensor]:
    """One batch of prompts, their ends aligned.

    Args:
        prompts: at least one.
        pad_id: token to fill up with.

    Returns:
        ``input_ids`` and ``attention_mask`` ``[B, L]``, and ``pixel_values`` ``[pictures of all, 3, S, S]`` where there
        are any; with labels also ``labels`` ``[B, L]`` and ``position_ids`` ``[B, L]``, which ``generate`` makes by
        itself.
    """
    width = max(len(prompt.ids) for prompt in prompts)

    def filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
        return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])

    batch = {
        "input_ids": filled([prompt.ids for prompt in prompts], pad_id),
        "attention_mask": filled([[1] * len(prompt.ids) for prompt in prompts], 0),
    }
    pixels = torch.cat([prompt.pixels for prompt in prompts])
    if len(pixels):
        batch["pixel_values"] = pixels
    labels = [prompt.labels for prompt in prompts if prompt.labels is not None]
    if labels:
        batch["labels"] = filled(labels, -100)
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch
