"""The model card that goes with a saved tree."""

from __future__ import annotations

from vst.tree.config import VSTConfig


def model_card(config: VSTConfig, *, stitches_only: bool = False) -> str:
    """Markdown with hub metadata: what the tree is made of, each part's licence, how to load it."""
    from huggingface_hub import ModelCard, ModelCardData

    parts = {"trunk": (config.trunk, f"blocks 1 to {config.trunk_depth()}")}
    for b in config.branches:
        parts[f"branch `{b.name}`"] = (b.spec, f"blocks {min(b.enters) + 1} to {b.stop}")
    licences = sorted({spec.license for spec, _ in parts.values()})
    rows = [
        f"| {what} | `{cell(spec.source)}` | {held} of {spec.depth} | {spec.width} | {cell(spec.license)} |"
        for what, (spec, held) in parts.items()
    ]
    table = ["| branch | stitch | trunk splits | enters its own depth |", "|---|---|---|---|"]
    stitches = [
        f"| `{b.name}` | {b.stitch} | {', '.join(map(str, b.splits))} | {', '.join(map(str, b.enters))} |"
        for b in config.branches
    ]
    weights = (
        "This folder holds the stitches alone; the frozen models are loaded from the sources below."
        if stitches_only
        else "This folder is self-contained: loading needs no network."
    )
    branches = "; the branches continue from it through trained stitch layers" if config.branches else ""
    if len(config.names) > 1:
        branches += f". Fusion: {config.fusion}"
    head = ModelCardData(
        library_name="vfm-stitch-tree",
        pipeline_tag="image-feature-extraction",
        license=licences[0] if len(licences) == 1 and licences[0] != "unknown" else "other",
        tags=["vision", "model-stitching", "stitch-tree"],
    )
    text = "\n".join(
        [
            "# A stitch tree",
            "",
            f"{'One trunk' if config.branches else 'One model'} sees pictures of {config.image_size} x "
            f"{config.image_size} pixels ({config.grid} x {config.grid} patches){branches}. {weights}",
            "",
            "| part | source | kept | width | licence of the weights |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Each part stays under its own licence; read them before you pass the tree on.",
            "",
            *([] if config.tuned is None else [f"Its models are not the published ones: {config.tuned.told()}.", ""]),
            *([*table, *stitches, ""] if stitches else []),
            "```python",
            "import vst",
            'tree = vst.VSTEncoder.from_pretrained("this-folder")',
            "pixels = tree.transform()(image)[None]",
            "tokens = tree(pixels)  # tree(pixels, split=...) chooses the depth",
            "```",
            "",
        ]
    )
    return str(ModelCard(f"---\n{head.to_yaml()}\n---\n\n{text}"))


def cell(text: str) -> str:
    """Text that can break neither a table's cell nor its line, and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
