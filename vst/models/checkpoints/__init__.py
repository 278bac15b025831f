"""Where weights come from: timm, Hugging Face (hub or folder) and open_clip, all turned into one layout."""

from __future__ import annotations

import os
from collections.abc import Hashable
from types import ModuleType
from typing import Any

from vst.models.checkpoints import huggingface, openclip, timm_files, timm_hub
from vst.models.checkpoints.names import known_names, resolve
from vst.models.fields import SEEDS, checked, known_options, shown, whole
from vst.models.finite import not_finite, some
from vst.models.spec import MOST_GRID, VFMSpec
from vst.models.vfm import VFM

__all__ = ["describe", "known_names", "load_vfm"]

_READERS: dict[str, ModuleType] = {"timm": timm_hub, "hf": huggingface, "open_clip": openclip}
_DESCRIBED: dict[tuple[str, str], tuple[Hashable, VFMSpec]] = {}


def describe(source: str | os.PathLike) -> VFMSpec:
    """The spec of a model, without its weights: nothing but a config file is ever fetched.

    A source is described once in a process, because timm has to build the model for it; a local folder is described
    anew when one of its config files was changed. A failure is not kept.

    Args:
        source: ``timm:NAME``, ``timm:NAME@FILE.safetensors``, ``hf:ID-or-folder`` (as transformers or timm saves it),
            ``open_clip:ARCH/TAG`` or a ready name (:func:`known_names`); a ``Path`` is a Hugging Face folder's.

    Raises:
        ValueError: an unknown source, or a model that a VFM cannot represent.
        FileNotFoundError, RuntimeError: a folder without a config, or a config that could not be fetched.
    """
    scheme, name = resolve(_text(source))
    # Of a library's own names and of hub ids nothing is looked at again: they stand for one model in a process.
    state = huggingface.folder_state(name) if scheme == "hf" else None
    if (known := _DESCRIBED.get((scheme, name))) is not None and known[0] == state:
        return known[1]
    spec: VFMSpec = _reader(scheme, name).describe(name)
    _DESCRIBED[scheme, name] = state, spec
    return spec


def _text(source: Any) -> str:
    """A source as it is written: a path is that of a Hugging Face folder."""
    if isinstance(source, os.PathLike):
        return f"hf:{os.fspath(source)}"
    if not isinstance(source, str):
        raise ValueError(
            f"{shown(source)} is no model source; expected text such as timm:NAME, hf:ID-or-folder or "
            "open_clip:ARCH/TAG, or a path."
        )
    return source


def load_vfm(
    source: str | os.PathLike | VFMSpec,
    *,
    grid: int | None = None,
    image_size: int | None = None,
    pretrained: bool = True,
    seed: int = 0,
    **parts: Any,
) -> VFM:
    """Load a model, whole or in part, at one grid; weights are fp32 whatever the file holds.

    Args:
        source: as for :func:`describe`; or a spec that is known already, whose source is then asked for weights alone,
            and for nothing where they are random.
        grid: patches a side; the default is the model's native grid.
        image_size: the same in pixels; give one or none of the two.
        pretrained: ``False`` gives random weights, and fetches a config at the most. A partial model then holds the
            same numbers as the same part of the whole model of that seed.
        seed: of the random weights.
        parts: ``start``, ``stop``, ``stem``, ``norm`` as in :class:`vst.models.vfm.VFM`; only what they ask for stays.

    Raises:
        ValueError: an unknown source, a model that a VFM cannot represent, a grid that does not fit, or a checkpoint
            whose tensors do not.
        TypeError: a part that there is not.
        FileNotFoundError, RuntimeError: weights that are not there or could not be fetched.
    """
    known_options(parts, ("start", "stop", "stem", "norm"), "load_vfm")
    checked(pretrained, bool, "pretrained")
    seed = whole(seed, "seed", SEEDS)
    spec = source if isinstance(source, VFMSpec) else describe(source)
    if grid is not None and image_size is not None:
        raise ValueError(f"{spec.source}: grid={grid} and image_size={image_size} were both given; give one of them.")
    if image_size is not None:
        grid = spec.grid(image_size)
    grid = spec.grid(spec.image_size) if grid is None else whole(grid, f"{spec.source}: grid", (1, MOST_GRID))
    if pretrained:
        scheme, name = resolve(spec.source)
        tensors = _reader(scheme, name).read(name, spec, parts)
        if bad := not_finite(tensors):  # every token would be NaN
            raise ValueError(
                f"{spec.source}: numbers are not finite in {some(bad)}; fetch the checkpoint again, or take an earlier "
                "one of its training."
            )
    else:
        tensors = VFM(spec, spec.grid(spec.image_size), **parts).reset_parameters(seed).state_dict()
    tensors = {n: t.float() for n, t in tensors.items()}
    return VFM.from_tensors(spec, tensors, grid, **parts).eval()


def _reader(scheme: str, name: str) -> ModuleType:
    return timm_files if scheme == "timm" and "@" in name else _READERS[scheme]
