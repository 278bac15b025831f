"""LLaVA's JSON to batches: conversations about pictures, read one at a time."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from llava_integration.models.chat import IGNORED, IMAGE_TOKEN, STYLES, Encoded, NothingToLearn, encode
from llava_integration.train.media import KEY, inside, is_url, unread, unread_key, unread_tag
from llava_integration.train.records import read_records
from vst.data.images import PICTURE_MB, ImageTransform, UnreadableImage
from vst.data.pictures import ImageSet, Skipped
from vst.models.fields import check_fields, one_of

CHARACTERS, TURN = 4, 5  # of a token of English, about; tokens of a chat template around a turn
LOST = 0.05  # share of records or pictures that may be missing before a run warns
LOOKED_AT = 512  # conversations whose pictures are looked for before a run
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class DataConfig:
    """Which conversations to learn from.

    Attributes:
        files: LLaVA's JSON (a list of records) or JSONL (ending in .jsonl, one record a line).
        images: folder that the records' pictures are named in; None where there are no pictures.
        style: chat (the language model's chat template) or plain (stage 1: pictures and captions, no template).
        max_length: tokens of a conversation, those of its pictures included; what is longer is cut off at the end.
        system: system message of conversations that bring none; None leaves it to the chat template.
        limit: use only the first so many conversations; None for all.
        picture_mb: pictures that take more MiB than this to decode are passed over with their conversations; each
            worker may hold one such picture.
    """

    files: list[str]
    images: str | None = None
    style: str = "chat"
    max_length: int = 2048
    system: str | None = None
    limit: int | None = None
    picture_mb: int = PICTURE_MB

    def __post_init__(self) -> None:
        if not self.files or isinstance(self.files, str):
            raise ValueError(f"files is {self.files!r}, but must be a list of at least one JSON or JSONL file.")
        one_of(self.style, "style", STYLES)
        check_fields(self, dict.fromkeys(("max_length", "limit", "picture_mb"), (1, None)))
        if self.system is not None and self.style == "plain":
            raise ValueError("system is given, but style 'plain' writes no system message; leave it out.")


class Conversations(Dataset):
    """Conversations with their pictures as tokens, labels and pixels.

    All records are read and checked at once; pictures are opened and text is tokenised when a sample is asked for.
    What cannot be used is left out and told in ``skipped``: turns that do not alternate, empty answers, tags that do
    not match the pictures, pictures outside the folder, and pictures or other media under keys and tags that are not
    read. As LLaVA does, a first turn of the assistant is dropped, and the tag of a single picture goes to the front of
    its turn.

    Args:
        config: which.
        tokenizer: see :func:`llava_integration.models.chat.encode`.
        transform: the trunk's preparation of a picture.
        image_tokens: tokens of a picture.

    Raises:
        FileNotFoundError: a file or the folder of pictures is missing.
        ValueError: a file is damaged, or no conversation can be used.
    """

    def __init__(self, config: DataConfig, tokenizer: Any, transform: ImageTransform, image_tokens: int):
        if config.images is not None and not Path(config.images).is_dir():
            raise FileNotFoundError(f"There is no folder of pictures {config.images}; give one, or none (images).")
        self.config, self.tokenizer, self.transform, self.image_tokens = config, tokenizer, transform, image_tokens
        self._records, self._skipped = _Records(), dict[str, str]()
        self._shapes: dict[tuple[str, ...], int] = {}
        self._lengths = array("L")
        self._pictured = 0
        for name, record in read_records(config.files):
            try:
                conversation = _conversation(record, config)
                self._records.append({"name": name, **conversation})
            except _Unusable as reason:
                self._skipped[name] = str(reason)
                continue
            self._pictured += bool(conversation["images"])
            text = sum(len(m["content"]) // CHARACTERS + TURN for m in conversation["messages"])
            self._lengths.append(text + image_tokens * len(conversation["images"]))
            self._shapes.setdefault(tuple(m["role"] for m in conversation["messages"]), len(self) - 1)
            if len(self) == config.limit:
                break
        if not len(self):
            raise ValueError(
                f"No conversation of {', '.join(config.files)} can be used ({_most_common(self._skipped.values())}); "
                'expected records such as {"image": "a.jpg", "conversations": [{"from": "human", "value": "..."}, '
                '{"from": "gpt", "value": "..."}]}.'
            )

    @property
    def skipped(self) -> dict[str, str]:
        """Why conversations were left out when the files were read, by ``FILE:NUMBER``, counted from 1."""
        return dict(self._skipped)

    def survey(self) -> tuple[str, list[str]]:
        """Tell what a run is about to learn from, before it does; looks for the files of some pictures, opens none.

        Returns:
            How many conversations there are with and without pictures and how many were left out, and warnings: of
            many records that cannot be used, of pictures that are not there, of no picture at all.

        Raises:
            FileNotFoundError: none of the pictures that were looked for is there.
        """
        read = len(self) + len(self._skipped)
        told = f"{self._pictured} conversations with pictures, {len(self) - self._pictured} without"
        warnings = []
        if self._skipped:
            told += f"; {len(self._skipped)} of {read} records cannot be used"
        if len(self._skipped) > LOST * read:
            warnings.append(
                f"{len(self._skipped)} of {read} records cannot be used and are left out "
                f"({_most_common(self._skipped.values())})."
            )
        if not self._pictured:
            warnings.append(
                f"None of {len(self)} conversations has a picture, so nothing is learned about pictures; records name "
                f"theirs under `{KEY}`."
            )
        rows = range(0, len(self), max(1, len(self) // LOOKED_AT))
        names = [name for row in rows for name in self._records[row]["images"]]
        missing = [name for name in names if not os.path.isfile(os.path.join(self.config.images or "", name))]
        if names and len(missing) == len(names):
            raise FileNotFoundError(
                f"None of {len(names)} pictures that were looked for is there, such as {missing[0]} in "
                f"{self.config.images}: give the folder that the records' names begin in (images)."
            )
        if len(missing) > LOST * len(names):
            warnings.append(
                f"{len(missing)} of {len(names)} pictures that were looked for are missing, such as {missing[0]} in "
                f"{self.config.images}; their conversations will be replaced by others."
            )
        return told, warnings

    def pictures(self) -> Iterator[str]:
        """Names of all conversations' pictures, in order, relative to the folder of pictures."""
        for row in range(len(self)):
            yield from self._records[row]["images"]

    @property
    def lengths(self) -> list[int]:
        """About how many tokens each conversation has, without opening a picture or tokenising."""
        return self._lengths.tolist()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample; one that cannot be had is replaced by the next one, the first following the last.

        Returns:
            ``input_ids [T]`` and ``labels [T]`` (int64), ``pixel_values [k, 3, S, S]`` (float32, k pictures, maybe
            none), and ``skipped``: why samples were passed over, by name.

        Raises:
            IndexError: there is no such sample.
            ValueError: no sample can be had, or the chat template does not suit.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"Conversation {index} was asked for, but there are {len(self)}.")
        skipped: dict[str, str] = {}
        for step in range(len(self)):
            record = self._records[(index + step) % len(self)]
            try:
                pixels, encoded = self._pixels(record["images"]), self._encoded(record)
            except (UnreadableImage, NothingToLearn) as error:
                skipped[record["name"]] = str(error)
                continue
            ids, labels = torch.tensor(encoded.input_ids), torch.tensor(encoded.labels)
            return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "skipped": skipped}
        raise ValueError(
            f"None of {len(self)} conversations can be used ({_most_common(skipped.values())}); check the folder of "
            f"pictures {self.config.images} and max_length {self.config.max_length}."
        )

    def check(self, n: int = 32) -> None:
        """Make sure that there is something to learn, so that a loss of 0.0 cannot pass for success.

        Encodes the first ``n`` conversations, and one of every order of roles for the chat template's sake; opens no
        picture.

        Raises:
            ValueError: none of the first ``n`` leaves anything to learn, or the chat template does not suit.
        """
        first = range(min(n, len(self)))
        reasons = []
        for index in sorted({*first, *self._shapes.values()}):
            try:
                self._encoded(self._records[index])
            except NothingToLearn as error:
                if index in first:
                    reasons.append(str(error))
        if len(reasons) == len(first):
            raise ValueError(
                f"None of the first {len(first)} conversations teaches anything ({_most_common(reasons)}): "
                f"max_length is {self.config.max_length} and image_tokens, those of a picture, {self.image_tokens}; "
                "give a larger max_length, a tree with fewer tokens, or conversations with answers."
            )

    def _encoded(self, record: Mapping[str, Any]) -> Encoded:
        config, messages = self.config, record["messages"]
        if config.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": config.system}, *messages]
        return encode(
            messages,
            self.tokenizer,
            image_tokens=self.image_tokens,
            style=config.style,
            max_length=config.max_length,
        )

    def _pixels(self, names: Sequence[str]) -> Tensor:
        if not names:
            return torch.zeros(0, 3, self.transform.size, self.transform.size)
        paths = [os.path.join(self.config.images or "", name) for name in names]
        pictures = ImageSet(paths, {"": self.transform}, picture_mb=self.config.picture_mb)
        out = []
        for name, picture in zip(names, (pictures[i] for i in range(len(names))), strict=True):
            if isinstance(picture, Skipped):
                raise UnreadableImage(picture.reason, name)
            out.append(picture[""])
        return torch.stack(out)


@dataclass(frozen=True)
class Collate:
    """Samples to a batch, padded on the right.

    A batch without any picture gets one row more, of picture tokens alone, and one picture of zeros. Every process then
    runs tower and projector in every step; ZeRO-3 and DDP would otherwise wait for each other for ever. The loss is
    unchanged, as all labels of that row are masked, and what it adds to the gradients is zero.

    Attributes:
        pad_token_id: of the tokenizer.
        image_token_id: of ``<image>``.
        image_tokens: tokens of a picture.
        image_size: side S of a picture in pixels.
        pad_to_multiple_of: make the length a multiple of it; None for the longest sample's.
    """

    pad_token_id: int
    image_token_id: int
    image_tokens: int
    image_size: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token, but batches are padded; set its pad_token.")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of what :class:`Conversations` returned.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` (int64 ``[B, T]``), ``pixel_values [K, 3, S, S]`` of all
            rows in order (float32), and ``skipped`` of all samples.
        """
        ids, labels = ([sample[key] for sample in samples] for key in ("input_ids", "labels"))
        pixels = torch.cat([sample["pixel_values"] for sample in samples])
        if not len(pixels):
            ids.append(torch.full((self.image_tokens,), self.image_token_id))
            labels.append(torch.full((self.image_tokens,), IGNORED))
            pixels = torch.zeros(1, 3, self.image_size, self.image_size)
        return {
            "input_ids": self._padded(ids, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(row) for row in ids], 0),
            "labels": self._padded(labels, IGNORED),
            "pixel_values": pixels,
            "skipped": {name: reason for sample in samples for name, reason in sample["skipped"].items()},
        }

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        out = pad_sequence(rows, batch_first=True, padding_value=value)
        missing = -out.shape[1] % (self.pad_to_multiple_of or 1)
        return torch.nn.functional.pad(out, (0, missing), value=value)


class _Unusable(Exception):
    """Why a record cannot be used."""


class _Records:
    """Records as one block of JSON text: a fraction of the memory of objects, which worker processes share."""

    def __init__(self) -> None:
        self._text, self._ends = bytearray(), array("Q", [0])

    def append(self, record: Mapping[str, Any]) -> None:
        try:
            self._text += json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise _Unusable("holds half a character (a lone surrogate)") from error
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Any:
        return json.loads(self._text[self._ends[index] : self._ends[index + 1]])


def _conversation(record: Any, config: DataConfig) -> dict[str, Any]:
    """The record's pictures and messages; raises _Unusable."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _Unusable("is no record with a list of turns (conversations)")
    messages = [_message(turn) for turn in turns]
    head = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
    if messages and messages[0]["role"] == "assistant":
        messages.pop(0)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise _Unusable("has no answer")
    if roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise _Unusable("has turns of human and gpt that do not alternate")
    if any(not message["content"].strip() for message in messages if message["role"] == "assistant"):
        raise _Unusable("has an empty answer, from which a model learns to be silent")
    images = _images(record, config)
    if key := unread_key(record, images):
        raise _Unusable(unread(key))
    if tag := next(filter(None, (unread_tag(m["content"]) for m in head + messages if m["role"] != "assistant")), None):
        raise _Unusable(f"has the tag {tag}; a picture's place is told by {IMAGE_TOKEN}, and no other media are read")
    _place_tags(messages, len(images))
    if config.style == "plain" and (len(messages) != 2 or not images):
        raise _Unusable("is more or less than pictures and one caption, which style plain takes")
    return {"images": images, "messages": head + messages}


def _message(turn: Mapping[str, Any]) -> dict[str, str]:
    who, text = turn.get("from"), turn.get("value")
    if not isinstance(who, str) or who not in ROLES:
        raise _Unusable(f"has a turn from {who!r}, which is none of {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise _Unusable("has a turn without text (value)")
    return {"role": ROLES[who], "content": text}


def _images(record: Mapping[str, Any], config: DataConfig) -> list[str]:
    """Names of the record's pictures, in the folder."""
    given = record.get(KEY)
    names = [] if given is None or given == "" else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise _Unusable(f"has something else as {KEY} than a name or a list of names")
    if names and config.images is None:
        raise _Unusable("has a picture, but no folder of pictures (images) is given")
    if any(is_url(name) for name in names):
        raise _Unusable("names a picture by its address; only files in the folder of pictures are read")
    found = [inside(name, config.images or "") for name in names]
    if None in found:
        raise _Unusable("names a picture outside the folder of pictures")
    return [name for name in found if name is not None]


def _place_tags(messages: Sequence[dict[str, str]], images: int) -> None:
    """Put the tag of a single picture where LLaVA puts it, and check that there are as many tags as pictures."""
    users = [message for message in messages if message["role"] == "user"]
    tags = sum(message["content"].count(IMAGE_TOKEN) for message in users)
    if images == 1 and tags <= 1:
        turn = next((message for message in users if IMAGE_TOKEN in message["content"]), users[0])
        turn["content"] = f"{IMAGE_TOKEN}\n{turn['content'].replace(IMAGE_TOKEN, '').strip()}".strip()
    elif tags != images:
        raise _Unusable(f"has {tags} tags {IMAGE_TOKEN} for {images} pictures")


def _most_common(reasons: Any) -> str:
    return "; ".join(f"{count} times: {reason}" for reason, count in Counter(reasons).most_common(3)) or "no record"
