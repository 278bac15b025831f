"""A tree at one split as a file that other runtimes read: ONNX, or torch's own exported program."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vst.models.fields import checked, shown
from vst.results.folders import environment, write_json
from vst.results.progress import progress
from vst.results.room import room_for
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import PREPROCESSOR, preprocessor
from vst.tree.splits import Split

FORMATS = {"onnx": "tree.onnx", "torch-export": "tree.pt2"}
FACTS = "export.json"
_TRACED = 2  # pictures that the tree is traced with; others are compared
_COMPARED = (1, 3)
_ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-6}
_ONE_FILE = 1_500_000_000  # bytes: a protocol buffer, as an ONNX file is one, holds two gigabytes


@dataclass(frozen=True)
class Parity:
    """How what was exported compares with the tree, on random pictures.

    Attributes:
        runtime: what ran it; None where it could not be run here, and ``reason`` says why.
        batches: pictures a call that were compared; the tree was traced with another number.
        error: largest over the outputs of the norm of the difference over the tree's own norm.
    """

    runtime: str | None
    batches: tuple[int, ...]
    error: float | None
    reason: str | None = None

    def __str__(self) -> str:
        if self.runtime is None:
            return f"not compared: {self.reason}"
        return f"{self.runtime} against the tree: relative difference {self.error:.1e}, batches {self.batches}"


class _AtOneSplit(nn.Module):
    def __init__(self, tree: VSTEncoder, by_branch: bool) -> None:
        super().__init__()
        self.tree, self.by_branch = tree, by_branch

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.tree.branch_tokens(pixels).values()) if self.by_branch else (self.tree(pixels),)


def export_tree(
    tree: VSTEncoder,
    folder: str | Path,
    *,
    split: Split | None = None,
    format: str = "onnx",
    by_branch: bool = False,
    fold: bool = True,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Parity:
    """Write a tree at one split, and compare what was written with it; the number of pictures a call stays free.

    Args:
        tree: on the CPU, in the dtype that is wanted; it stays as it is.
        folder: to write to: ``tree.onnx`` (input ``pixels [batch, 3, S, S]``, output ``tokens [batch, tokens, width]``;
            large ones with ``tree.onnx.data`` beside it) or ``tree.pt2`` (``torch.export.load(...).module()``), the
            picture preparation (``preprocessor_config.json``) and what was exported (``export.json``).
        split: default: the tree's own.
        format: onnx or torch-export.
        by_branch: give each branch's patch tokens ``[batch, N, D]`` by its name, in place of the fused ones.
        fold: fold the stitches' standardisation into their linear layers.
        overwrite: take the place of what was exported there.
        show_progress: a bar over tracing, writing and comparing.

    Returns:
        How both compare.

    Raises:
        ValueError: an unknown format or split, a tree on another device, or what was exported does not give the tree's
            tokens; what was in the folder is kept then.
        ImportError: a package that the format needs is not installed.
        FileExistsError: the folder holds something, and ``overwrite`` is False or it is no export.
    """
    checked(tree, VSTEncoder, "tree")
    check_export(format, _dtype(tree), by_branch, fold, overwrite)
    if (devices := {p.device.type for p in tree.parameters()}) != {"cpu"}:
        raise ValueError(f"The tree is on {', '.join(sorted(devices))}; expected on the CPU for an export: move it.")
    chosen, target = tree.config.resolve(split), target_folder(folder, overwrite)
    module = _AtOneSplit(alone_at(tree, chosen, fold), by_branch).eval()
    names = list(tree.config.names) if by_branch else ["tokens"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress("export", 3, show_progress) as bar,
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary,
    ):
        made = Path(temporary) / "made"
        made.mkdir()
        path = made / FORMATS[format]
        program = _program(module, _pixels(tree, _TRACED))
        bar.step("traced")
        with room_for(str(target)):
            _WRITERS[format](program, path, names)
        bar.step("written")
        parity = _compared(tree, chosen, path, format, by_branch)
        bar.step("compared")
        write_json(made / PREPROCESSOR, preprocessor(tree.config))
        write_json(made / FACTS, _facts(tree, chosen, format, by_branch) | {"folded": fold, "parity": vars(parity)})
        if target.exists():
            target.rename(Path(temporary) / "old")
        made.rename(target)
    return parity


def _facts(tree: VSTEncoder, chosen: dict[str, int], format: str, by_branch: bool) -> dict[str, Any]:
    config = tree.config
    each = {name: [config.grid**2, spec.width] for name, spec in config.specs.items()}
    outputs = each if by_branch else {"tokens": [tree.tokens, tree.width]}
    return {
        "format": format,
        "split": chosen,
        "dtype": str(_dtype(tree)).removeprefix("torch."),
        "input": {"pixels": ["batch", 3, tree.image_size, tree.image_size]},
        "outputs": {name: ["batch", *shape] for name, shape in outputs.items()},
        "tree": config.at(chosen).to_dict() if chosen else config.to_dict(),
        "environment": environment("cpu"),
    }


def check_export(format: str, dtype: torch.dtype, by_branch: bool, fold: bool, overwrite: bool) -> None:
    """See that options are what they may be, and that what the format needs is installed.

    Raises:
        ValueError: they are not, or torch is too old. ImportError: it is not.
    """
    for name, value in {"by_branch": by_branch, "fold": fold, "overwrite": overwrite}.items():
        checked(value, bool, name)
    if format not in FORMATS:
        raise ValueError(f"format is {shown(format)}; expected {' or '.join(FORMATS)}.")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 6):
        raise ValueError(f"An export needs torch 2.6 or later; this is {torch.__version__}: install a newer one.")
    if format == "onnx":
        if dtype == torch.bfloat16:
            raise ValueError(
                "dtype is bfloat16, in which ONNX as it is written here has no convolution: export in float32 or "
                "float16, or by the format torch-export."
            )
        _need("onnx", "onnxscript")


def target_folder(folder: str | Path, overwrite: bool) -> Path:
    """A folder that an export can be written to.

    Raises:
        FileExistsError: it holds something, and ``overwrite`` is False or that is no export.
    """
    target = Path(folder)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not target.is_dir() or not (target / FACTS).is_file():
        raise FileExistsError(f"{target} holds something that is no export: choose another folder.")
    if not overwrite:
        raise FileExistsError(
            f"{target} holds an export already: choose another folder, or pass overwrite=True (--overwrite true)."
        )
    return target


def _need(*packages: str) -> None:
    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"Exporting to ONNX needs {' and '.join(lacking)}, which this Python lacks: "
            "pip install 'vfm-stitch-tree[export]'."
        )


def alone_at(tree: VSTEncoder, chosen: dict[str, int], fold: bool) -> VSTEncoder:
    """A tree of what one split needs of another, with the same frozen weights and stitches of its own.

    Args:
        tree: which. chosen: split by branch name. fold: see :meth:`vst.tree.encoder.VSTEncoder.fold`.
    """
    own = tree.state_dict()
    part = VSTEncoder.skeleton(tree.config.at(chosen) if chosen else tree.config)
    tensors = {k: own[k].clone() if ".stitches." in k else own[k] for k in part.state_dict()}
    part.load_state_dict(tensors, strict=True, assign=True)
    part.requires_grad_(False)
    return part.fold() if fold else part


def _dtype(tree: VSTEncoder) -> torch.dtype:
    return next(tree.parameters()).dtype


def _pixels(tree: VSTEncoder, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, tree.image_size, tree.image_size, generator=generator).to(_dtype(tree))


def _program(module: nn.Module, pixels: Tensor) -> torch.export.ExportedProgram:
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    with torch.no_grad():
        program = torch.export.export(module, (pixels,), dynamic_shapes=shapes)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names the folders of this machine
    return program


def _write_onnx(program: Any, path: Path, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about its own parts
        size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
        shapes = {"pixels": {0: "batch"}}
        made = torch.onnx.export(
            program, input_names=["pixels"], output_names=names, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        assert made is not None
        made.save(str(path), external_data=size > _ONE_FILE)


def _write_program(program: Any, path: Path, names: list[str]) -> None:
    torch.export.save(program, path)


_WRITERS: dict[str, Callable[[Any, Path, list[str]], None]] = {"onnx": _write_onnx, "torch-export": _write_program}


def _compared(tree: VSTEncoder, chosen: dict[str, int], path: Path, format: str, by_branch: bool) -> Parity:
    """Run what was written beside the tree itself, as it was given."""
    if format == "onnx":
        if importlib.util.find_spec("onnxruntime") is None:
            return Parity(None, (), None, "onnxruntime is not installed")
        runtime = "onnxruntime on the CPU"
        try:
            run = onnx_runner(path)
        except Exception as error:
            told = " ".join(str(error).replace(str(path), path.name).split())[:300]
            if type(error).__name__ != "NotImplemented":  # an operator that it lacks, for a dtype or at all
                raise ValueError(f"What was exported cannot be run, so it was not kept: onnxruntime: {told}") from None
            return Parity(None, (), None, f"onnxruntime does not take it ({told})")
    else:
        runtime, run = "torch", torch.export.load(path).module()
    worst = 0.0
    for batch in _COMPARED:
        pixels = _pixels(tree, batch)
        with torch.no_grad(), _evaluated(tree):
            own = tree.branch_tokens(pixels, chosen).values() if by_branch else [tree(pixels, split=chosen)]
            for want, found in zip(own, run(pixels), strict=True):
                off = float((found.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
                worst = max(worst, off if math.isfinite(off) else math.inf)
    if not worst <= _ALLOWED[_dtype(tree)]:
        raise ValueError(
            f"The exported tree gives other tokens than the tree itself (relative difference {worst:.1e} in {runtime}, "
            f"expected at most {_ALLOWED[_dtype(tree)]:.0e}), so it was not kept: export in float32, or by the other "
            f"format ({', '.join(FORMATS)})."
        )
    return Parity(runtime, _COMPARED, worst)


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Every part in evaluation for a while, and then as it was."""
    were = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in were.items():
            part.training = training


def onnx_runner(path: Path, threads: int | None = None) -> Callable[[Tensor], list[Tensor]]:
    """A call of an exported file by onnxruntime on the CPU: pixels to its outputs.

    Args:
        path: of the file. threads: of an operator; default: onnxruntime's, a thread a core.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise ImportError("onnxruntime is not installed: pip install 'vfm-stitch-tree[export]'.") from None
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads slow what is run after it
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"pixels": pixels.numpy()})]

    return run
