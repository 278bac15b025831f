"""The command ``vst export``."""

from __future__ import annotations

from pathlib import Path

from vst.export.programs import FORMATS, check_export, export_tree, target_folder
from vst.models.fields import dtype_of
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import read_config
from vst.tree.splits import split_label


def export(
    path: str,
    out: str = "runs/export",
    split: str | int | dict[str, int] | None = None,
    format: str = "onnx",
    dtype: str = "float32",
    by_branch: bool = False,
    fold: bool = True,
    overwrite: bool = False,
) -> None:
    """Write a tree at one split for other runtimes (ONNX, torch.export), compared with the tree itself.

    Examples:
        vst export runs/demo/tree --split 6 --out runs/demo/onnx
        vst export runs/demo/tree --split 6 --format torch-export --out runs/demo/program
        vst export runs/demo/tree --by_branch true --out runs/demo/branches

    Args:
        path: folder or hub id of a saved tree.
        out: folder to write: tree.onnx or tree.pt2, preprocessor_config.json, export.json. Input: pixels
            [batch, 3, S, S], any number of pictures a call; output: tokens [batch, tokens, width].
        split: which, one for all branches or one by branch name; default: the tree's own.
        format: onnx (needs the packages onnx and onnxscript, and onnxruntime for the comparison) or torch-export.
        dtype: of weights and pixels: float32, float16, or (torch-export alone) bfloat16.
        by_branch: an output of patch tokens for each branch, by its name, in place of the fused one.
        fold: fold the stitches' standardisation into their linear layers: the same tokens with fewer steps.
        overwrite: replace the export in out.
    """
    check_export(format, dtype_of(dtype), by_branch, fold, overwrite)
    target_folder(out, overwrite)
    chosen = read_config(path)[1].resolve(split)
    tree = VSTEncoder.from_pretrained(path, splits={name: [at] for name, at in chosen.items()}, dtype=dtype)
    parity = export_tree(tree, out, split=chosen, format=format, by_branch=by_branch, fold=fold, overwrite=overwrite)
    label = split_label(chosen if len(set(chosen.values())) > 1 else next(iter(chosen.values())))
    print(f"split {label}: {Path(out) / FORMATS[format]}\n{parity}")
