"""What a benchmark asks of an answer: how long, sampled how, ended by which strings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

SAMPLING = ("temperature", "top_p", "top_k")
OPTIONS = ("max_new_tokens", "until", "do_sample", "num_beams", "repetition_penalty", *SAMPLING)
"""Options of a task's generation_kwargs that are followed."""

IGNORED = ("image_aspect_ratio",)
"""Those for hosts that cut pictures in several ways; a tree has one."""


@dataclass(frozen=True)
class Decoding:
    """Options of a group of requests.

    Attributes:
        config: for ``generate``.
        until: strings that end an answer and are no part of it.
    """

    config: GenerationConfig
    until: tuple[str, ...]

    @classmethod
    def parse(
        cls, options: Mapping[str, Any], *, max_new_tokens: int, eos: Sequence[int] | None, pad: int | None
    ) -> Decoding:
        """Read a task's ``generation_kwargs``; greedy unless a temperature above 0 or ``do_sample`` is given.

        Args:
            options: the task's.
            max_new_tokens: where the task names none.
            eos: tokens that end an answer.
            pad: token that fills up rows that have ended.

        Raises:
            ValueError: an unknown option or a value out of range.
        """
        if unknown := set(options) - {*OPTIONS, *IGNORED}:
            raise ValueError(
                f"A task's generation_kwargs has {', '.join(sorted(unknown))}; expected {', '.join(OPTIONS)}: change "
                "the task, or give --gen_kwargs."
            )
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        if odd := [stop for stop in until if not isinstance(stop, str)]:
            raise ValueError(f"until has {odd[0]!r}; expected strings that end an answer.")
        longest = options.get("max_new_tokens", max_new_tokens)
        if longest is None or int(longest) < 1:
            raise ValueError(f"max_new_tokens is {longest}, but must be at least 1.")
        temperature = options.get("temperature")
        sample = bool(options.get("do_sample", bool(temperature))) and temperature != 0
        chosen = {"num_beams": int(options.get("num_beams") or 1)}
        if options.get("repetition_penalty") is not None:
            chosen["repetition_penalty"] = options["repetition_penalty"]
        if sample:
            chosen |= {name: options[name] for name in SAMPLING if options.get(name) is not None}
        config = GenerationConfig(
            max_new_tokens=int(longest), do_sample=sample, use_cache=True, eos_token_id=eos, pad_token_id=pad, **chosen
        )
        return cls(config, tuple(stop for stop in until if stop))

    def cut(self, answer: str) -> str:
        """An answer up to the first of the strings that end it, without white space around."""
        for stop in self.until:
            answer = answer.partition(stop)[0]
        return answer.strip()


class Until(StoppingCriteria):
    """Ends a row once its new text holds one of some strings, wherever the borders of tokens lie.

    Args:
        tokenizer: of the model.
        until: the strings.
        width: tokens of the padded prompts.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], width: int) -> None:
        self.tokenizer, self.until, self.width = tokenizer, until, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        said = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.until) for text in said], device=input_ids.device)
