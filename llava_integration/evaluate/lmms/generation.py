"""What a benchmark asks of an answer: how long, sampled how, ended by which strings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from vst.models.fields import whole

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
        if not isinstance(until, (str, list, tuple)):
            raise ValueError(f"until is {until!r}; expected a string or a list of strings that end an answer.")
        until = (until,) if isinstance(until, str) else tuple(until)
        if odd := [stop for stop in until if not isinstance(stop, str)]:
            raise ValueError(f"until has {odd[0]!r}; expected strings that end an answer.")
        longest = _count("max_new_tokens", options.get("max_new_tokens", max_new_tokens))
        temperature = options.get("temperature")
        if temperature is not None and not (isinstance(temperature, (int, float)) and 0 <= temperature < math.inf):
            raise ValueError(f"temperature is {temperature!r}; expected a number of at least 0.")
        wanted = options.get("do_sample", bool(temperature))
        if wanted not in (None, True, False):  # 0 and 1 are among them
            raise ValueError(f"do_sample is {wanted!r}; expected true or false.")
        sample = bool(wanted) and temperature != 0
        beams = options.get("num_beams")
        chosen: dict[str, Any] = {"num_beams": 1 if beams is None else _count("num_beams", beams)}
        if options.get("repetition_penalty") is not None:
            chosen["repetition_penalty"] = options["repetition_penalty"]
        if sample:
            chosen |= {name: options[name] for name in SAMPLING if options.get(name) is not None}
        config = GenerationConfig(
            max_new_tokens=longest, do_sample=sample, use_cache=True, eos_token_id=eos, pad_token_id=pad, **chosen
        )
        return cls(config, tuple(stop for stop in until if stop))

    def cut(self, answer: str) -> str:
        """An answer up to the first of the strings that end it, without white space around."""
        for stop in self.until:
            answer = answer.partition(stop)[0]
        return answer.strip()


def _count(name: str, value: Any) -> int:
    """A count, also as the text that a command line or a YAML file may make of it."""
    digits = isinstance(value, str) and value.strip().isdecimal()
    return whole(int(value) if digits else value, name, (1, None))


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
