"""Questions about pictures, as conversations to learn from, and a trained LLaVA's answers to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from vst.data.images import UnreadableImage, in_rgb, open_image
from vst.results.progress import track

CACHED = 256  # preprocessed pictures that are kept: 350 MB at 336 x 336, and several questions often share one


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        image: file of the picture.
        question: text, without any image token.
        answer: the answer expected.
        kind: questions of one kind are scored together ("colour", "yes/no" ...).
    """

    image: Path
    question: str
    answer: str
    kind: str


def record(name: str, image: str, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """One conversation about one picture in LLaVA's format.

    Args:
        name: the record's id.
        image: the picture's path, relative to wherever the reader is told that pictures are.
        turns: questions and answers, in order; the picture comes before the first.
    """
    conversation: list[dict[str, str]] = []
    for question, answer in turns:
        start = "" if conversation else "<image>\n"
        conversation += [{"from": "human", "value": start + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": conversation}


def ask(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    blank: bool = False,
    batch_size: int = 16,
    max_new_tokens: int = 8,
    title: str = "answers",
    show: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Answer every question greedily, each in a conversation of its own.

    Args:
        model: a ``LlavaForConditionalGeneration``. It is in eval mode meanwhile.
        processor: its ``LlavaProcessor``, whose chat template takes a message's content as one string.
        questions: each about one picture.
        blank: put the trunk's mean colour in place of every picture, that is pixel values of zeros. Nothing of the
            picture is left while the prompt stays the same token by token, so whatever is still right was known
            from the question alone.
        batch_size: questions in one call of the model; longest prompts come first.
        max_new_tokens: an answer is cut there if it has not ended before.
        title, show: of the progress display.
        device: the model is moved there; None leaves it where it is.
        dtype: run under autocast to this type; None runs the model in its own.

    Returns:
        Answers in the order of the questions, without special tokens and surrounding white space.

    Raises:
        UnreadableImage: a picture cannot be read.
        ValueError: a number is out of range, a question holds an image token, or the tokenizer has no padding token.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1.")
    if not questions:
        return []
    tokenizer, image_token = processor.tokenizer, processor.image_token
    if tokenizer.pad_token_id is None:
        raise ValueError("The tokenizer has no padding token, but batches are padded; set its pad_token.")
    if odd := next((q.question for q in questions if image_token in q.question), None):
        raise ValueError(f"The question {odd!r} holds {image_token}, which is added here; take it out.")
    device = model.device if device is None else torch.device(device)
    model.to(device)

    @lru_cache(CACHED)
    def pixels(path: Path) -> Tensor:
        return processor.image_processor(images=_picture(path), return_tensors="pt")["pixel_values"][0]

    grey = torch.zeros_like(pixels(questions[0].image)) if blank else None
    image_tokens = image_token * _image_tokens(processor, questions[0].image)
    prompts = [_prompt(processor, q.question).replace(image_token, image_tokens) for q in questions]
    start = beginning(tokenizer, prompts[0])
    ids = [start + list(row) for row in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    order = sorted(range(len(questions)), key=lambda i: (-len(ids[i]), str(questions[i].image)))
    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    answers = [""] * len(questions)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    with (
        answering(model, greedy),
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        for rows in track(batches, title, len(batches), show):
            width = len(ids[rows[0]])
            # Padded by hand: that leaves the tokenizer's padding side alone and adds no special token.
            mask = torch.tensor([[0] * (width - len(ids[i])) + [1] * len(ids[i]) for i in rows])
            padded = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids[i])) + ids[i] for i in rows])
            pictures = torch.stack([pixels(questions[i].image) if grey is None else grey for i in rows])
            tokens = model.generate(
                input_ids=padded.to(device),
                attention_mask=mask.to(device),
                pixel_values=pictures.to(device, model.dtype),
            )
            said = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
            for i, answer in zip(rows, said, strict=True):
                answers[i] = answer.strip()
    return answers


def _prompt(processor: Any, question: str) -> str:
    message = {"role": "user", "content": f"{processor.image_token}\n{question}"}
    return processor.apply_chat_template([message], add_generation_prompt=True)


def beginning(tokenizer: Any, prompt: str) -> list[int]:
    """The beginning of sequence, as in training: where the tokenizer adds it and the template has not written it."""
    bos = tokenizer.bos_token
    if bos and not prompt.startswith(bos) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id]
    return []


def _image_tokens(processor: Any, path: Path) -> int:
    """How many tokens the processor makes of a picture; all have one size, so it is the same for each."""
    token = processor.image_token
    inputs = processor(text=[token], images=[_picture(path)], add_special_tokens=False, return_tensors="pt")
    return int((inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(token)).sum())


def _picture(path: Path) -> Any:
    try:
        return in_rgb(open_image(path))
    except UnreadableImage as error:
        raise UnreadableImage(error.reason, path) from error


def ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end an answer: the model's, and the tokenizer's, which ends a turn in chat templates."""
    ends = model.generation_config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}) or None


@contextmanager
def answering(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Eval mode and another generation config for a while; afterwards every module is in its own mode again.

    The model's own config is set aside as a whole, since what a call leaves open is filled in from there: a repetition
    penalty would fall on the answers that a question names.
    """
    own, modes = model.generation_config, {module: module.training for module in model.modules()}
    model.eval()
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
        for module, mode in modes.items():
            module.training = mode
