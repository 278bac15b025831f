"""What a checkpoint has restored of a tower.

Hosts restore weights in two ways. ``load_state_dict``, and the loader of transformers that calls its parts, run hooks:
the tensors that they bring are noted by name. The loader that saves memory replaces parameters one by one, behind
every hook, and fills those that the checkpoint lacks with rubbish. So a tower carries a stamp along
(:mod:`llava_integration.hosts.stamp`): one that fits can only come from a checkpoint that holds the tower. What was
trained may also come alone and without it, as LLaVA saves it beside LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from llava_integration.hosts.stamp import BYTES, STAMP, agree, compare, names_sum, write_stamp

ALIKE = 0.9  # cosine of two matrices: training leaves it near 1, drawn numbers have 0
SAMPLE = 4096  # values of a matrix that are looked at


class Recorder:
    """Notes which tensors of a tree ``load_state_dict`` has brought since the tower was last whole.

    Args:
        tree: to watch.

    Attributes:
        names: of the tensors.
        stamped: whether the stamp came with them.
    """

    def __init__(self, tree: nn.Module) -> None:
        self.names: set[str] = set()
        self.stamped = False
        self.watch(tree)

    def __bool__(self) -> bool:
        return bool(self.names) or self.stamped

    def clear(self) -> None:
        """Begin anew."""
        self.names, self.stamped = set(), False

    def watch(self, tree: nn.Module) -> None:
        """Note what is brought into this tree from now on."""
        for path, module in tree.named_modules():
            own = [*module._parameters, *(b for b in module._buffers if b not in module._non_persistent_buffers_set)]
            if own:
                # No closure: a copy of the tower has to note what is brought into the copy.
                module._register_load_state_dict_pre_hook(partial(self._note, path, own))

    def _note(self, path: str, own: Iterable[str], state: Mapping[str, Tensor], prefix: str, *rest: object) -> None:
        self.names |= {f"{path}.{key}" if path else key for key in own if prefix + key in state}


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
            f"({_some(lost)}), and they would be dropped: set mm_vision_tower in the checkpoint's config.json to the "
            "tree, and the split, that it was trained with."
        )


def complete_stamp(state: dict[str, Tensor], prefix: str) -> bool:
    """Whether a checkpoint's state holds a stamp; one of before it was saved as bytes too is given empty ones."""
    if prefix + STAMP in state and prefix + BYTES not in state:
        state[prefix + BYTES] = torch.zeros_like(write_stamp([0] * state[prefix + STAMP].numel())[BYTES])
    return prefix + STAMP in state


def check_stamp(name: str, tree: nn.Module, numbers: Sequence[int], came: Set[str] | None) -> None:
    """See that a tower is the one that was stamped, whole and unchanged.

    Args:
        name: of the tower.
        tree: the tower's.
        numbers: of the stamp.
        came: names of the tensors that were brought with it, or None where nobody could note them.

    Raises:
        ValueError: another tree's, a part of it, or a changed one.
    """
    here = set(tree.state_dict())
    lost = sorted(here - came) if came is not None else []
    divided = not any(numbers[1:])  # stamped under ZeRO-3: older ones hold the names of divided tensors
    if not agree(numbers[0], names_sum(tree)) and not (divided and came is not None and not lost):
        raise ValueError(
            f"The checkpoint was saved with the vision tower of another tree than {name}: set mm_vision_tower in its "
            "config.json to the tree, and the split, that it was trained with."
        )
    if lost:
        raise ValueError(
            f"The checkpoint lacks {len(lost)} of the {len(here)} tensors of the vision tower {name} that it was saved "
            f"with ({_some(lost)}): load it as the host saved it."
        )
    if (part := compare(numbers, tree)) is not None:
        raise ValueError(
            f"After the reload {name} has other {part}: something was dropped or changed on the way; load the "
            "checkpoint with LLaVA's own load_pretrained_model, and read is_loaded before a cast."
        )


def check_alone(name: str, came: Set[str], trained: Set[str]) -> None:
    """See that tensors which came without a stamp are what may be saved alone: trained ones.

    Raises:
        ValueError: they are more than that.
    """
    if rest := sorted(came - trained):
        raise ValueError(without_stamp(name, f"{len(came)} tensors ({_some(rest)})"))


def check_unstamped(name: str, old: nn.Module, tree: nn.Module, kept: Set[str]) -> None:
    """See that what the tree's folder is about to replace is not a tower that a checkpoint has restored.

    Args:
        name: of the tower.
        old: the tree with what the host left in it: a checkpoint's tensors, or drawn numbers.
        tree: from its folder.
        kept: names that are not replaced.

    Raises:
        ValueError: the matrices are the tower's own, as they are in the folder or trained on from there.
    """
    known, alike = dict(tree.named_parameters()), []
    for path, module in old.named_modules():
        if isinstance(module, nn.Linear) and f"{path}.weight" not in kept and not module.weight.is_meta:
            pair = (module.weight, known[f"{path}.weight"])
            one, other = (t.detach().flatten()[:SAMPLE].to("cpu", torch.float32) for t in pair)
            alike.append(bool(torch.cosine_similarity(one, other, dim=0) > ALIKE))
    if sum(alike) * 2 > len(alike):
        raise ValueError(without_stamp(name, "tensors"))


def without_stamp(name: str, what: str) -> str:
    """Why a tower that came without its stamp is not taken."""
    return (
        f"The checkpoint holds {what} of the vision tower {name} without the stamp that was saved with them "
        f"(vision_tower.{STAMP}, {BYTES}), or with one that a cast has destroyed, so nobody can tell whether they are "
        "whole: load it as the host saved it, or convert it again with all its tensors."
    )


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
