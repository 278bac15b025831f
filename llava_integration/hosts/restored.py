"""What a checkpoint has restored of a tower, and whether it is what was saved.

Hosts restore weights in two ways. ``load_state_dict``, and the loader of transformers that calls its parts, run hooks:
the tensors that they bring are noted by name. The loader that saves memory replaces parameters one by one, behind
every hook, and fills those that the checkpoint lacks with rubbish; so a tower carries a *stamp* along in its state:
integers that say which tensors were saved with it and what the checksums of its stitches, and of samples of all else,
were in each floating type that they can be loaded in. A stamp that fits can only come from a checkpoint that holds
the tower.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from vst.tree.stitches import Stitch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EMPTY = torch.zeros(1 + 2 * len(DTYPES), dtype=torch.int64)
SAMPLE = 64  # values of a tensor: rubbish, or freshly drawn weights, differ in all of them
STAMP = "stamp"


def stitches_of(tree: nn.Module) -> dict[str, Tensor]:
    """Tensors of all stitches of a tree, by name."""
    return {
        f"{name}.{key}": tensor
        for name, module in tree.named_modules()
        if isinstance(module, Stitch)
        for key, tensor in module.state_dict().items()
    }


def samples_of(tree: nn.Module) -> dict[str, Tensor]:
    """A few values of every floating tensor of a tree, by name."""
    flat = {n: t.detach().flatten() for n, t in tree.state_dict().items() if t.is_floating_point() and t.numel()}
    return {n: t[:: max(1, t.numel() // SAMPLE)] for n, t in flat.items()}


def checksum(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> int:
    """62 bits of a hash of named tensors, as they are after a cast to ``dtype``."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().to("cpu", dtype).contiguous()
        digest.update(f"{name} {list(value.shape)}".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return int.from_bytes(digest.digest(), "big") >> 2


def names_sum(tree: nn.Module) -> int:
    """62 bits of a hash of the names and shapes of a tree's state; never 0."""
    text = repr(sorted((name, tuple(t.shape)) for name, t in tree.state_dict().items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2 | 1


def shown(number: int) -> str:
    """A checksum as it stands in the log."""
    return f"{number:016x}"[-12:]


def make_stamp(tree: nn.Module, names: int) -> Tensor:
    """The stamp of a tree that holds its weights: ``[7]``, int64: names, stitches by type, samples by type."""
    parts = (stitches_of(tree), samples_of(tree))
    return torch.tensor([names, *(checksum(part, dtype) for part in parts for dtype in DTYPES)], dtype=torch.int64)


def compare(stamp: list[int], tree: nn.Module) -> str | None:
    """Which part of a tree is not what was stamped, or None. What no whole tree was stamped for is not compared."""
    kinds = {t.dtype for t in tree.state_dict().values() if t.is_floating_point()}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        return None
    (kind,) = kinds
    at = 1 + DTYPES.index(kind)
    for part, expected, tensors in (
        ("stitches", stamp[at], stitches_of(tree)),
        ("frozen weights", stamp[at + len(DTYPES)], samples_of(tree)),
    ):
        if expected and expected != (here := checksum(tensors, kind)):
            return f"{part} (checksum {shown(here)}, saved with {shown(expected)})"
    return None


def read_stamp(stamp: Tensor) -> list[int] | None:
    """The stamp's numbers, or None where no checkpoint brought one."""
    if stamp.is_meta or stamp.dtype != torch.int64 or not stamp.any():
        return None
    return [int(number) for number in stamp]


class Recorder:
    """Notes, by name, which tensors of a tree ``load_state_dict`` has brought, and refuses those without a place.

    Args:
        tree: to watch.
    """

    def __init__(self, tree: nn.Module) -> None:
        self.names: set[str] = set()
        for path, module in tree.named_modules():
            own = [*module._parameters, *(b for b in module._buffers if b not in module._non_persistent_buffers_set)]
            if own:
                module._register_load_state_dict_pre_hook(self._hook(path, own))

    def _hook(self, path: str, own: Iterable[str]) -> Callable[..., None]:
        def note(state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
            self.names |= {f"{path}.{key}" if path else key for key in own if prefix + key in state}

        return note


def check_places(tree: nn.Module, state: Mapping[str, Tensor], prefix: str) -> None:
    """See that a checkpoint holds nothing under a tower's prefix that would be dropped.

    Args:
        tree: the tower's.
        state: the checkpoint's tensors.
        prefix: of the tree in it.

    Raises:
        ValueError: names tensors without a place.
    """
    places = set(tree.state_dict())
    lost = sorted(
        k.removeprefix(prefix) for k in state if k.startswith(prefix) and k.removeprefix(prefix) not in places
    )
    if lost:
        raise ValueError(
            f"The checkpoint holds {len(lost)} tensors of a vision tower that this tree has no place for "
            f"({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}), and they would be dropped: set "
            "mm_vision_tower in the checkpoint's config.json to the tree, and the split, that it was trained with."
        )
