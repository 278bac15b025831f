"""A language model on a tree as lmms-eval drives it: ``--model vst_llava --model_args pretrained=FOLDER,split=8``."""

from __future__ import annotations

import difflib
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from torch import Tensor
from transformers import StoppingCriteriaList

from llava_integration.answer.ask import answering, ends
from llava_integration.evaluate.lmms.generation import Decoding, Until
from llava_integration.evaluate.lmms.prompts import Prompt, Prompter, pad
from llava_integration.evaluate.lmms.record import describe, publish
from llava_integration.models.assemble import load
from llava_integration.models.processing import image_tokens
from vst.results.progress import track
from vst.tree.projector import ProjectorSpec

DTYPES = ("auto", "float32", "bfloat16", "float16")


class VSTLlava(lmms):
    """A saved model under lmms-eval; several requests at once, whatever pictures each has.

    Args:
        pretrained: folder of a trained model.
        split: trunk depth to see at, for all branches or by branch (``split='clip=14,siglip=6'``, in quotes); default:
            the model's own.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the weights: auto (as they were saved), float32, bfloat16 or float16.
        batch_size: requests in one call of the model.
        max_new_tokens: longest answer, for tasks that name none.
        blank: put the trunk's mean colour in place of every picture; what is still right was known without looking.
        max_batch_size: refused; there are no automatic batch sizes.
        show: show progress.
        unknown: refused with a hint.

    Raises:
        ValueError: an unknown option, or a value that does not suit.
        FileNotFoundError: the folder holds no model.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        split: int | str | Mapping[str, int] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_new_tokens: int = 128,
        blank: bool = False,
        max_batch_size: None = None,
        show: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(_hint(min(unknown)))
        if not pretrained:
            raise ValueError("No model is named; give --model_args pretrained=FOLDER, the folder of a trained model.")
        if max_batch_size is not None or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a number of at least 1 (there is no auto).")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
        if not isinstance(blank, bool):
            raise ValueError(f"blank is {blank!r}; expected true or false.")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens!r}; expected a number of at least 1.")
        self.device = _device(device)
        self.batch_size, self.max_new_tokens, self.show = int(batch_size), max_new_tokens, show
        model, processor = load(pretrained, None if dtype == "auto" else getattr(torch, dtype))
        if split is not None:
            _set_split(model, split)
        self._model: Any = model.to(self.device)  # type: ignore[arg-type]
        self.tokenizer = processor.tokenizer
        self.prompter = Prompter(processor, _image_tokens(model.config), blank)
        self.record = describe(
            model,
            pretrained=str(pretrained),
            device=str(self.device),
            dtype=str(model.dtype).removeprefix("torch."),
            batch_size=self.batch_size,
            max_new_tokens=max_new_tokens,
            blank=blank,
            seed=None,
            image_tokens=self.prompter.image_tokens,
        )

    @property
    def chat_template(self) -> None:
        """Asked for by lmms-eval's ``--apply_chat_template`` alone, which would write the template twice."""
        raise ValueError("vst_llava applies the model's own chat template; leave out --apply_chat_template.")

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers to requests of ``(context, generation_kwargs, doc_to_visual, doc_id, task, split)``, in order."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        answers = [""] * len(requests)
        for rows in self._batches(requests, groups.values()):
            decoding = Decoding.parse(
                requests[rows[0]].args[1],
                max_new_tokens=self.max_new_tokens,
                eos=ends(self._model, self.tokenizer),
                pad=self.tokenizer.pad_token_id,
            )
            prompts = [self._question(requests[i]) for i in rows]
            for i, answer in zip(rows, self._answers(prompts, decoding), strict=True):
                answers[i] = answer
                self.cache_hook.add_partial("generate_until", requests[i].args[:2], answer)
        self._publish(requests)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """How likely answers are: requests of ``(context, answer, doc_to_visual, doc_id, task, split)``.

        Returns:
            For each as ``text`` a pair, as of lmms-eval's LLaVA models: the mean cross entropy over the answer's tokens
            (so the smallest is the likeliest, which is how its tasks choose), and whether each token is the likeliest
            one. As in training the token that ends the turn belongs to the answer. A bare pair would not do: lmms-eval
            turns it into a string before its tasks see it.
        """
        out: dict[int, GenerationResult] = {}
        for rows in self._batches(requests, [list(range(len(requests)))]):
            prompts = [self._answered(requests[i]) for i in rows]
            for i, found in zip(rows, self._likelihoods(prompts), strict=True):
                out[i] = GenerationResult(text=found)
                self.cache_hook.add_partial("loglikelihood", requests[i].args[:2], found)
        self._publish(requests)
        return [out[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: this model answers each question in a conversation of its own."""
        raise NotImplementedError("vst_llava answers no tasks of several rounds (generate_until_multi_round).")

    def _batches(self, requests: Sequence[Any], groups: Any) -> Iterator[list[int]]:
        """Places of the requests of one call, longest questions first, so that memory runs out early or never."""
        batches = []
        for group in groups:
            order = sorted(group, key=lambda i: -len(requests[i].args[0]))
            batches += [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]
        yield from track(batches, "answers", len(batches), self.show and self.rank == 0)

    def _question(self, request: Any) -> Prompt:
        prompt = self.prompter.question(request.args[0], self._pictures(request))
        self.record["prompts"].setdefault(request.task_name, prompt.text)
        return prompt

    def _answered(self, request: Any) -> Prompt:
        answer = request.args[1]
        if not isinstance(answer, str):  # how tasks of the type loglikelihood hand it over
            answer = answer(self._document(request))
        prompt = self.prompter.answered(request.args[0], self._pictures(request), answer)
        self.record["prompts"].setdefault(request.task_name, prompt.text)
        return prompt

    def _document(self, request: Any) -> Mapping[str, Any]:
        place, task, split = request.args[3:6]
        return self.task_dict[task][split][place]

    def _pictures(self, request: Any) -> list[Any]:
        found = request.args[2](self._document(request)) if callable(request.args[2]) else None
        return [] if found is None else list(found)

    @torch.inference_mode()
    def _answers(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        batch = self._on_device(pad(prompts, self.tokenizer.pad_token_id))
        width = batch["input_ids"].shape[1]
        stops = StoppingCriteriaList([Until(self.tokenizer, decoding.until, width)] if decoding.until else [])
        with answering(self._model, decoding.config):
            tokens = self._model.generate(**batch, stopping_criteria=stops)
        said = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
        return [decoding.cut(answer) for answer in said]

    @torch.inference_mode()
    def _likelihoods(self, prompts: Sequence[Prompt]) -> list[tuple[float, bool]]:
        batch = self._on_device(pad(prompts, self.tokenizer.pad_token_id))
        labels = batch.pop("labels")
        first = int((labels != -100).any(0).nonzero()[0])
        kept = labels.shape[1] - first + 1  # the logits before the first answer and all that follow
        logits = self._model(**batch, logits_to_keep=kept).logits[:, :-1].float()
        labels = labels[:, first:]
        out = []
        for row, wanted in zip(logits, labels, strict=True):
            row, wanted = row[wanted != -100], wanted[wanted != -100]
            loss = torch.nn.functional.cross_entropy(row, wanted)
            out.append((float(loss), bool((row.argmax(-1) == wanted).all())))
        return out

    def _on_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kinds = {"pixel_values": self._model.dtype}
        return {name: tensor.to(self.device, kinds.get(name, tensor.dtype)) for name, tensor in batch.items()}

    def _publish(self, requests: Sequence[Any]) -> None:
        self.record["seed"] = torch.initial_seed()
        publish(self.record, requests)


def _hint(name: str) -> str:
    known = [n for n in inspect.signature(VSTLlava.__init__).parameters if n not in ("self", "unknown", "show")]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}."
    return f"{name} is no option of vst_llava (--model_args); {hint}"


def _device(name: str) -> torch.device:
    there = torch.cuda.is_available()
    if name in ("auto", "cuda") and there:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    kind, _, number = str(name).partition(":")
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    if kind != "cuda" or not there or not number.isdigit() or int(number) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}; expected auto, cpu, or cuda or cuda:N where that device is present.")
    return torch.device(name)


def _set_split(model: Any, split: Any) -> None:
    tree = model.config.vision_config.tree_config()
    if model.config.vision_config.full or not tree.branches:
        raise ValueError(f"split is {split!r}, but this model's tower has no stitches and no split; leave it out.")
    tree.resolve(split)
    model.model.vision_tower.split = split


def _image_tokens(config: Any) -> int:
    spec = config.projector_spec() if hasattr(config, "projector_spec") else ProjectorSpec()
    return image_tokens(config.vision_config.tree_config(), spec)
