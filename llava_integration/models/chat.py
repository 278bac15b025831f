"""From a conversation to token ids and labels: the answers alone are learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_integration.models.answers import answer_pieces

IMAGE_TOKEN = "<image>"
IGNORED = -100  # the label that cross entropy leaves out
STYLES = ("chat", "plain")
ROLES = ("system", "user", "assistant")

# Its last newline belongs to the block before it: the template that follows still stands at the start of a line, where
# Jinja treats leading white space as it would without this head.
_HEAD = """\
{%- set multimodal = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if content is defined and content is not string and content is iterable -%}
{%- set joined = namespace(text='') -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}
{%- set joined.text = joined.text + '<image>\\n' -%}
{%- elif part['type'] == 'text' -%}
{%- set joined.text = joined.text + part['text'] -%}
{%- else -%}
{{- raise_exception('a part of a message is of type ' ~ part['type'] ~ ', but must be image or text') -}}
{%- endif -%}
{%- endfor -%}
{%- set message = dict(message, content=joined.text) -%}
{%- endif -%}
{%- set multimodal.messages = multimodal.messages + [message] -%}
{%- endfor -%}
{%- set messages = multimodal.messages %}
"""

# LLaVA-1.5's prompt. Vicuna's end of sequence is </s>; a language model of another kind stops at its own.
VICUNA = """\
{%- if messages[0]['role'] == 'system' -%}
{{- messages[0]['content'] + ' ' -}}
{%- else -%}
{{- "A chat between a curious user and an artificial intelligence assistant. " -}}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + message['content'] + ' ' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'ASSISTANT: ' + message['content'] + (eos_token or '</s>') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'ASSISTANT:' -}}
{%- endif -%}
"""
# The format of Qwen and many others, for language models whose own template cannot write several turns. A turn ends
# with the tokenizer's own end of sequence, as that is where an answer stops when it is generated.
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + (eos_token or '<|im_end|>') + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA}


class NothingToLearn(ValueError):
    """A conversation that leaves no label, or not all of its picture tokens, within the length allowed."""


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Attributes:
        input_ids: tokens, each picture being ``image_tokens`` times the image token.
        labels: of the same length; -100 where nothing is learned.
        images: pictures in it.
        truncated: whether tokens at the end were cut off.
    """

    input_ids: list[int]
    labels: list[int]
    images: int
    truncated: bool


def multimodal_template(template: str) -> str:
    r"""Let a language model's chat template take messages whose content is a list of parts.

    A part ``{"type": "image"}`` becomes ``<image>\n`` and ``{"type": "text", "text": ...}`` its text. Content that is a
    string renders as before, and other keys of a message are kept. A template that was wrapped before is returned as
    it is.

    Args:
        template: Jinja text, for messages whose content is a string.
    """
    return template if template.startswith(_HEAD) else _HEAD + template


def chat_template(tokenizer: Any, given: str | None = None) -> str:
    """Find the chat template to use.

    Args:
        tokenizer: of the language model.
        given: a name among ``TEMPLATES``, the path of a ``.jinja`` file, or None for the tokenizer's own.

    Returns:
        The Jinja text; :func:`multimodal_template` fits it for pictures.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the tokenizer has no template, or ``given`` is neither a name nor a ``.jinja`` file in UTF-8.
    """
    names = f"a name ({', '.join(TEMPLATES)})"
    if given is None:
        if not tokenizer.chat_template:
            name = tokenizer.name_or_path or type(tokenizer).__name__
            raise ValueError(f"The tokenizer {name} has no chat template; give {names} or the path of a .jinja file.")
        return tokenizer.get_chat_template()
    if given in TEMPLATES:
        return TEMPLATES[given]
    if Path(given).suffix != ".jinja":
        raise ValueError(f"The chat template is {given!r}, but must be {names} or the path of a .jinja file.")
    if not Path(given).is_file():
        raise FileNotFoundError(f"There is no chat template {given}; give {names} or the path of a .jinja file.")
    try:
        return Path(given).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"The chat template {given} is not in UTF-8 ({error.reason}); save it so.") from error


def encode(
    messages: Sequence[Mapping[str, str]],
    tokenizer: Any,
    *,
    image_tokens: int,
    style: str = "chat",
    max_length: int | None = None,
) -> Encoded:
    """Turn a conversation into tokens, and into labels on its answers.

    ``chat`` renders the tokenizer's chat template and learns each answer with the end-of-turn token after it. ``plain``
    (stage 1 of LLaVA-1.5) has no template: the question is reduced to its pictures, the text is ``<image>``, the
    caption and a newline, and the last two are learned. A beginning-of-sequence token stands in front once where the
    template writes it or the tokenizer adds it.

    Args:
        messages: of ``role`` (system, user, assistant) and ``content``. ``<image>`` stands for a picture in what the
            user says; elsewhere it means nothing and is taken out.
        tokenizer: a fast one with ``<image>`` as one token.
        image_tokens: tokens of a picture.
        style: ``chat`` or ``plain``.
        max_length: cut off what is longer, at the end.

    Raises:
        NothingToLearn: the cut falls into the tokens of a picture, or nothing is left to learn.
        ValueError: the tokenizer, the template or the conversation does not suit; the message says which.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"The tokenizer is a slow one ({type(tokenizer).__name__}), which does not tell where a token lies in the "
            "text; give one that is saved as tokenizer.json."
        )
    for place, message in enumerate(messages, 1):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(
                f"Message {place} has the role {message.get('role')!r} and content of type "
                f"{type(message.get('content')).__name__}; expected one of {', '.join(ROLES)}, and text."
            )
    messages = [_pictures_of_users(message) for message in messages]
    images = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if style == "chat":
        if not messages or messages[0]["role"] == "assistant":
            raise ValueError("The conversation must begin with what the user says, or with a system message before it.")
        pieces = answer_pieces(messages, tokenizer)
    elif style == "plain":
        pieces = _plain(messages, images)
    else:
        raise ValueError(f"style is {style!r}; expected one of {', '.join(STYLES)}.")
    ids, learned = _tokens(
        [(text.replace(IMAGE_TOKEN, IMAGE_TOKEN * image_tokens), answer) for text, answer in pieces], tokenizer
    )

    image_id, expected = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), images * image_tokens
    if (found := ids.count(image_id)) != expected:
        raise ValueError(
            f"The conversation has {expected} picture tokens, but {found} after tokenising; {IMAGE_TOKEN} must be a "
            "special token of the tokenizer, and the chat template must write every message once."
        )
    length = len(ids)
    ids, learned = ids[:max_length], learned[:max_length]
    if ids.count(image_id) < expected:
        raise NothingToLearn(f"max_length {max_length} cuts into the {expected} picture tokens")
    if not any(learned):
        cut = f"within max_length {max_length} of {length} tokens" if len(ids) < length else f"in {length} tokens"
        raise NothingToLearn(f"no token of an answer is left {cut}")
    labels = [token if answer else IGNORED for token, answer in zip(ids, learned, strict=True)]
    return Encoded(ids, labels, images, truncated=len(ids) < length)


def _pictures_of_users(message: Mapping[str, str]) -> dict[str, str]:
    if message["role"] == "user" or IMAGE_TOKEN not in message["content"]:
        return dict(message)
    return {**message, "content": message["content"].replace(IMAGE_TOKEN, "").strip()}


def _plain(messages: Sequence[Mapping[str, str]], images: int) -> list[tuple[str, bool]]:
    turns = [message for message in messages if message["role"] != "system"]
    if [turn["role"] for turn in turns] != ["user", "assistant"] or not images:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise ValueError(
            f"style is 'plain', which takes pictures and a caption, but the conversation has {images} pictures and "
            f"turns of {roles}; use style 'chat'."
        )
    return [(IMAGE_TOKEN * images, False), (turns[1]["content"] + "\n", True)]


def _tokens(pieces: Sequence[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokenise the pieces as one text; a token is learned if any of its characters is."""
    text = "".join(piece for piece, _ in pieces)
    learned = b"".join(bytes([answer]) * len(piece) for piece, answer in pieces)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, flags = list(tokens["input_ids"]), [any(learned[a:b]) for a, b in _extents(tokens["offset_mapping"])]
    bos = tokenizer.bos_token
    if bos and not text.startswith(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]:
        return [tokenizer.bos_token_id, *ids], [False, *flags]
    return ids, flags


def _extents(offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Characters of each token. Byte-level tokenizers may count leading spaces out, which leaves spaces with none."""
    before = 0
    for start, end in offsets:
        yield (start if start < end else before), end
        before = end
