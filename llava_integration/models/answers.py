"""Where the answers lie in a conversation as a chat template writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

_MARKS = range(0xE000, 0xF8FF)  # characters for private use, which no template treats in a way of its own


def answer_pieces(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """Cut the rendered conversation into pieces, and tell for each whether it is learned.

    An answer begins where the template would have the model begin and ends with the token that ends its turn, both as
    they stand in the rendering of the whole conversation: some templates write an answer otherwise once others follow.

    Args:
        messages: of ``role`` and ``content``; the first is no answer.
        tokenizer: with a chat template.

    Raises:
        ValueError: the template refuses the conversation, or an answer cannot be found in what it writes.
    """
    whole = _rendered(messages, tokenizer)
    ends = tuple(tokenizer.get_added_vocab())
    pieces, done = [], 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _rendered(messages[:place], tokenizer, add_generation_prompt=True)
        upto = _rendered(messages[: place + 1], tokenizer)
        if not prompt:
            raise _unclear(place, "it asks for no answer there")
        begins = whole.startswith(prompt) and done <= len(prompt)
        if begins and whole.startswith(upto) and len(prompt) <= len(upto):
            start, end = len(prompt), len(upto)
        else:
            low, high = _content(messages, place, whole, tokenizer)
            start = len(prompt) if begins and len(prompt) <= high else low
            if not begins:
                before = _rendered(messages[:place], tokenizer)
                header = prompt[len(before) :] if prompt.startswith(before) else ""
                found = whole.rfind(header, done, low) if header else -1
                start = found + len(header) if found >= 0 else low
            end = high + len(_ending(messages[: place + 1], whole[high:], tokenizer, ends))
        if not done <= start <= end:
            raise _unclear(place, "it stands before an earlier one")
        answer = whole[start:end]
        if answer.rstrip().endswith(ends):  # a newline that only parts turns; without such a token it is the end itself
            answer = answer.rstrip()
        pieces += [(whole[done:start], False), (answer, True)]
        done = start + len(answer)
    return [*pieces, (whole[done:], False)]


def _content(messages: Sequence[Mapping[str, str]], place: int, whole: str, tokenizer: Any) -> tuple[int, int]:
    """From where to where an answer's own text stands, by what changes once a mark stands in its place."""
    mark, marked = _marked(messages, place, whole, tokenizer)
    if marked.count(mark) != 1:
        raise _unclear(place, f"it is written {marked.count(mark)} times")
    before, after = marked.split(mark)
    low, high = _alike(whole, before), len(whole) - len(after)
    if not whole.endswith(after) or low > high:
        raise _unclear(place, "what follows depends on it")
    return low, high


def _ending(messages: Sequence[Mapping[str, str]], rest: str, tokenizer: Any, tokens: Sequence[str]) -> str:
    """What of the text after an answer ends it: what also follows where it is the last message, in whole tokens."""
    mark, marked = _marked(messages, len(messages) - 1, rest, tokenizer)
    alone = marked.rpartition(mark)[2]
    if rest.startswith(alone):
        return alone
    cut = re.compile("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")")
    ending = ""
    for here, there in zip(filter(None, cut.split(rest)), filter(None, cut.split(alone)), strict=False):
        if here != there:
            break
        ending += here
    return ending


def _alike(one: str, other: str) -> int:
    """How many characters they have in common at the beginning."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _marked(messages: Sequence[Mapping[str, str]], place: int, text: str, tokenizer: Any) -> tuple[str, str]:
    """A character that is nowhere in the messages, and the rendering with it as the content of one of them."""
    used = {*text, *(character for message in messages for character in message["content"])}
    mark = next(chr(code) for code in _MARKS if chr(code) not in used)
    changed = [*messages[:place], {**messages[place], "content": mark}, *messages[place + 1 :]]
    return mark, _rendered(changed, tokenizer)


def _unclear(place: int, why: str) -> ValueError:
    return ValueError(
        f"The chat template rewrites earlier turns so that the answer in message {place + 1} cannot be told from the "
        f"rest ({why}); give another template, such as chatml (model.template)."
    )


def _rendered(messages: Sequence[Mapping[str, str]], tokenizer: Any, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except (TemplateError, TypeError) as error:  # a template may join text and nothing
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"The chat template cannot write a conversation of {roles} ({error}); change the conversation or give "
            "another template, such as chatml (model.template)."
        ) from error
