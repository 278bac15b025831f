"""The model card of a language model on a tree: what it is, how it is loaded, its parts with their licences, scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llava_integration.train.model import ModelConfig
from vst.results.folders import atomic_path, begun_with
from vst.tree.card import cell

CARD = "README.md"
_TAG = "stitch-tree"


def write_card(
    folder: Path, language_model: str | None, trained: str = "", scores: Mapping[str, Mapping[str, float]] | None = None
) -> None:
    """Write README.md beside a saved model; one that is not of this kind, a user's own, is left as it is.

    Args:
        folder: with the model's config.json.
        language_model: folder or hub id that it was taken from, if that is known.
        trained: what was trained, in a few words.
        scores: shares from 0 to 1 by name (``accuracy``, ``majority``, ``blank``), by the data they were measured on.
    """
    path = folder / CARD
    if path.exists() and not is_own_card(path):
        return
    text = model_card(AutoConfig.from_pretrained(folder), language_model, trained, scores)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_own_card(path: Path) -> bool:
    """Whether a file is a card that a run wrote."""
    return path.is_file() and f"\n- {_TAG}\n" in path.read_text(encoding="utf-8", errors="replace").partition("\n# ")[0]


def language_model_of(model: ModelConfig) -> str | None:
    """The language model that a run, or the stage that it goes on from, began with; None where nothing tells."""
    if model.start is None:
        return model.llm
    seen: set[str] = set()
    start: str | None = model.start
    while start is not None and start not in seen:
        seen.add(start)
        try:
            before = (begun_with(start) or {}).get("model") or {}
            if before.get("llm"):
                return str(before["llm"])
            start = before.get("start")
        except (OSError, ValueError, AttributeError):
            return None
    return None


def model_card(
    config: Any,
    language_model: str | None,
    trained: str = "",
    scores: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Markdown with hub metadata, of a model's config; the other arguments are those of :func:`write_card`."""
    from huggingface_hub import ModelCard, ModelCardData

    tree = config.vision_config.tree_config()
    text = config.text_config
    known, licence = _named(language_model)
    rows = [
        f"| {what} | `{cell(spec.source)}` | {spec.width} | {cell(spec.license)} |"
        for what, spec in [("trunk", tree.trunk), *((f"branch `{cell(b.name)}`", b.spec) for b in tree.branches)]
    ]
    rows.append(f"| language model | `{cell(known or text.model_type)}` | {text.hidden_size} | {cell(licence)} |")
    licences = {spec.license for spec in tree.specs.values()} | {licence}
    head = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        license=next(iter(licences)) if len(licences) == 1 and licences != {"unknown"} else "other",
        base_model=known if known is not None and known == language_model and known.count("/") == 1 else None,
        tags=["vision", "llava", "model-stitching", _TAG],
    )
    split = config.vision_config.to_dict().get("split")
    depth = f", split {cell(str(split))}" if split is not None and tree.branches else ""
    lines = [
        "# A language model on a stitch tree",
        "",
        f"LLaVA with one vision tower that several vision models share: a trunk sees pictures of {tree.image_size} x "
        f"{tree.image_size} pixels, and the others continue from it through stitch layers (fusion: "
        f"{tree.fusion}{depth}). "
        f"{f'Trained: {trained}.' if trained else ''}".rstrip(),
        "",
        "```python",
        '# pip install "vfm-stitch-tree[llava]"',
        "import llava_integration  # makes transformers know the tree",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("this-folder")',
        'processor = AutoProcessor.from_pretrained("this-folder")',
        'question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is at the left?"}]}',
        "text = processor.apply_chat_template([question], add_generation_prompt=True)",
        'inputs = processor(images=image, text=text, return_tensors="pt")',
        'answer = model.generate(**inputs, max_new_tokens=20)[:, inputs["input_ids"].shape[1] :]',
        "```",
        "",
        "| part | source | width | licence of the weights |",
        "|---|---|---|---|",
        *rows,
        "",
        "Each part stays under its own licence; read them before you pass the model on.",
        "",
    ]
    if tree.tuned is not None:
        lines += [f"The vision models are not the published ones: {tree.tuned.told()}.", ""]
    if scores:
        columns = list(dict.fromkeys(name for values in scores.values() for name in values))
        lines += [f"| data | {' | '.join(map(cell, columns))} |", f"|---|{len(columns) * '---|'}"]
        for data, values in scores.items():
            cells = [f"{100 * values[name]:.1f} %" if name in values else "" for name in columns]
            lines.append(f"| {cell(data)} | {' | '.join(cells)} |")
        lines.append("")
    else:
        lines += ["No scores were measured with this training.", ""]
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _named(language_model: str | None) -> tuple[str | None, str]:
    """Name without the path of a folder, and licence as its own card tells it."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if language_model is None:
        return None, "unknown"
    folder = Path(os.path.expanduser(language_model))
    try:
        found: Any = folder / CARD if folder.is_dir() else try_to_load_from_cache(language_model, CARD)
        card = ModelCard.load(found) if found is not None and os.path.isfile(str(found)) else None
        licence = str(card.data.license or "unknown") if card is not None else "unknown"
    except (OSError, ValueError, HFValidationError):
        licence = "unknown"
    return folder.resolve().name if folder.is_dir() or folder.is_absolute() else language_model, licence
