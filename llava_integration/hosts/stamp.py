"""The stamp that a tower carries along in its state: what was saved with it, so that a reload can be compared.

Seven integers: a hash of the names and shapes of the tower's tensors, then checksums of its stitches, and of samples
of all else, in each floating type that they can be loaded in. They are saved twice. ``stamp`` holds the integers;
a tool that casts it to a floating type rounds them. ``stamp_bytes`` holds their bytes, which every floating type
represents exactly; checkpoints of before it was there are compared as exactly as float32 allows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from vst.tree.stitches import Stitch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZE = 1 + 2 * len(DTYPES)
WIDTH = 8  # bytes of a number
SAMPLE = 64  # values of a tensor: rubbish, or freshly drawn weights, differ in all of them
STAMP, BYTES = "stamp", "stamp_bytes"


def empty_stamp() -> dict[str, Tensor]:
    """The buffers of a tower that has nothing to be stamped yet, by name: zeros."""
    return {
        STAMP: torch.zeros(SIZE, dtype=torch.int64, device="cpu"),
        BYTES: torch.zeros(SIZE * WIDTH, dtype=torch.uint8, device="cpu"),
    }


def write_stamp(numbers: Sequence[int]) -> dict[str, Tensor]:
    """The buffers of a stamp, by name: ``stamp [7]`` int64 and ``stamp_bytes [56]`` uint8."""
    raw = b"".join(number.to_bytes(WIDTH, "big") for number in numbers)
    return {STAMP: torch.tensor(list(numbers), dtype=torch.int64), BYTES: torch.tensor(list(raw), dtype=torch.uint8)}


def read_stamp(stamp: Tensor, raw: Tensor) -> list[int] | None:
    """The numbers of a stamp's buffers, or None where no checkpoint brought any that can be read."""
    values = [] if raw.is_meta else raw.double().tolist()
    if any(values) and all(0 <= value < 256 for value in values):
        data = bytes(int(value) for value in values)
        return [int.from_bytes(data[i : i + WIDTH], "big") for i in range(0, len(data), WIDTH)]
    numbers = [] if stamp.is_meta or not stamp.isfinite().all() else [int(number) for number in stamp]
    return numbers if any(numbers) and all(0 <= number <= 1 << 62 for number in numbers) else None


def agree(one: int, other: int) -> bool:
    """Whether two numbers are the same, or one is the other after a cast to a floating type."""
    rounded = ([float(torch.tensor(n).to(kind)) for n in (one, other)] for kind in (torch.float32, torch.bfloat16))
    return one == other or any(a == b and a in (one, other) for a, b in rounded)


def tower_numbers(tree: nn.Module) -> list[int]:
    """The stamp's numbers of a tree that holds its weights: names, stitches by type, samples by type."""
    parts = (stitches_of(tree), samples_of(tree))
    return [names_sum(tree), *(checksum(part, dtype) for part in parts for dtype in DTYPES)]


def compare(numbers: Sequence[int], tree: nn.Module) -> str | None:
    """Which part of a tree is not what was stamped, or None. What no whole tree was stamped for is not compared."""
    kinds = {t.dtype for t in tree.state_dict().values() if t.is_floating_point()}
    if len(kinds) != 1 or not kinds <= set(DTYPES):
        return None
    (kind,) = kinds
    sizes = len(DTYPES)
    for part, sums, tensors in (
        ("stitches", numbers[1 : 1 + sizes], stitches_of(tree)),
        ("frozen weights", numbers[1 + sizes :], samples_of(tree)),
    ):
        expected = dict(zip(DTYPES, sums, strict=True))
        if expected[kind] and not _matches(expected, tensors, kind):
            return f"{part} (checksum {shown(checksum(tensors, kind))}, saved with {shown(expected[kind])})"
    return None


def _matches(expected: Mapping[torch.dtype, int], tensors: Mapping[str, Tensor], kind: torch.dtype) -> bool:
    """Whether tensors are those of some checksums, as they were or as tools hand them on in float32."""
    if agree(expected[kind], checksum(tensors, kind)):
        return True
    for short in (torch.float16, torch.bfloat16) if kind == torch.float32 else ():
        rounded = {name: tensor.to(short).float() for name, tensor in tensors.items()}
        if agree(expected[kind], checksum(rounded, kind)):
            return True  # saved in the short type, and given back as the float32 copy that an optimizer kept of it
        same = all(torch.equal(rounded[name], tensor) for name, tensor in tensors.items())
        if same and agree(expected[short], checksum(tensors, short)):
            return True  # cast to the short type on the way
    return False


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
    state = tree.state_dict(keep_vars=True)  # under ZeRO-3 the shape of a parameter stands beside it
    text = repr(sorted((name, tuple(getattr(t, "ds_shape", t.shape))) for name, t in state.items()))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2 | 1


def shown(number: int) -> str:
    """A checksum as it stands in the log."""
    return f"{number:016x}"[-12:]
