"""A tower that compares what a checkpoint brings with what was saved, and trains what is to be trained of a tree."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from llava_integration.hosts import restored, trained
from llava_integration.hosts.partitioned import is_partitioned
from llava_integration.hosts.stamp import (
    BYTES,
    DTYPES,
    STAMP,
    empty_stamp,
    names_sum,
    read_stamp,
    shown,
    tower_numbers,
    write_stamp,
)
from vst.models.finite import not_finite, some
from vst.tree.encoder import VSTEncoder

LOG = logging.getLogger("llava_integration")
T = TypeVar("T", bound="GuardedTower")


class GuardedTower(nn.Module):
    """What stands around the tree ``vision_tower``, whatever route its weights come by and whoever frees them.

    Args:
        whole: a host that trains the tower trains all that the split in use reaches, not its stitches alone.
    """

    vision_tower: VSTEncoder
    vision_tower_name: str
    stamp: Tensor
    stamp_bytes: Tensor

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self._whole = whole
        self._loaded = self._held = self._warned = False
        self._free: set[str] = set()  # names of the parameters that wanted a gradient when it was last looked at
        self._alone = False  # whether a checkpoint came as the tower's own, not as a part of a model's
        for key, zeros in empty_stamp().items():
            self.register_buffer(key, zeros)
        self._own_stamp = self.stamp  # another tensor in its place has come behind every hook

    def watch(self) -> None:
        """Begin to note what is brought; the tree is there."""
        self._recorder = restored.Recorder(self.vision_tower)
        self._register_load_state_dict_pre_hook(self._before_load)
        self.register_load_state_dict_post_hook(_after_load)
        self.register_state_dict_pre_hook(_renew_stamp)

    @property
    def is_loaded(self) -> bool:
        """Whether every weight is there: from the tree's folder, or restored by a checkpoint.

        What a checkpoint has brought since, by whatever route, is compared with what was saved.

        Raises:
            ValueError: a checkpoint brought the tower of another tree, a part of it, or other weights than were saved.
        """
        if not self._loaded or self._recorder or self.stamp is not self._own_stamp:
            self._take()
        return self._loaded

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.vision_tower.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return next(self.vision_tower.parameters()).device

    def _take(self) -> None:
        """Look at what a checkpoint has brought, and be loaded where that is the tower."""
        tree, recorder, name = self.vision_tower, self._recorder, self.vision_tower_name
        if is_partitioned(tree) or any(t.is_meta for t in tree.state_dict().values()):
            if self._loaded:  # nothing is whole here that could be compared
                recorder.clear()
                self._own_stamp = self.stamp
            return
        numbers, came = read_stamp(self.stamp, self.stamp_bytes), set(recorder.names)
        if came and not recorder.stamped:
            restored.check_alone(name, came, trained.may_train(tree, self._whole))
            if self._loaded or came >= set(tree.state_dict()):
                self._finish(f"{len(came)} tensors from the checkpoint")
        elif recorder.stamped and numbers is None:
            raise ValueError(restored.without_stamp(name, f"{len(came)} tensors"))
        elif numbers is not None:
            restored.check_stamp(name, tree, numbers, came if recorder.stamped else None)
            self._finish(f"restored by the checkpoint, {name} left unread")

    def _finish(self, how: str) -> None:
        self._loaded = True
        self._recorder.clear()
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment] # transformers then draws no new weights for it
        if any(t.is_meta for t in self.vision_tower.state_dict().values()):
            self._loaded = False
            raise RuntimeError(
                f"{self.vision_tower_name} was to be loaded where modules are built without memory: build it with "
                "delay_load=True, and call load_model() after the model's own weights are there."
            )
        self._stamp(how)

    def _before_load(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        inner = f"{prefix}vision_tower."
        restored.check_places(self.vision_tower, state, inner)
        if not self._recorder and any(key.startswith(inner) for key in state):
            _ = self.is_loaded  # what came behind every hook is compared before it is written over
        self._recorder.stamped |= restored.complete_stamp(state, prefix)
        self._alone = not prefix

    def _apply(self, fn: Any, recurse: bool = True) -> GuardedTower:
        _ = self.is_loaded  # what a checkpoint restored is compared with what was saved before it is cast
        super()._apply(fn, recurse)
        self._own_stamp = self.stamp
        return self

    def _stamp(self, how: str) -> None:
        """Stamp the tower with what it holds now, and tell its checksum."""
        tree, name = self.vision_tower, self.vision_tower_name
        numbers = [names_sum(tree), *[0] * (2 * len(DTYPES))]  # no sums where the stitches are not whole
        if not is_partitioned(tree):
            numbers = tower_numbers(tree)
            if bad := not_finite(tree.state_dict()):
                LOG.warning(
                    "%s holds numbers that are not finite in %s, and is of no use: go back to an earlier state, and "
                    "train in bfloat16 or at a lower rate",
                    name, some(bad),
                )  # fmt: skip
            if self.dtype in DTYPES:
                kind = str(self.dtype).removeprefix("torch.")
                LOG.info("%s: stitches %s (%s), %s", name, shown(numbers[1 + DTYPES.index(self.dtype)]), kind, how)
        buffers = write_stamp(numbers)
        self.stamp, self.stamp_bytes = buffers[STAMP].to(self.device), buffers[BYTES].to(self.device)
        self._own_stamp = self.stamp

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; frozen is again what a host has freed since with all of the tower."""
        self._hold()
        return super().named_modules(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True) -> GuardedTower:
        """Train what is to be trained of a tower (see the class), or nothing."""
        self._held = self._held and requires_grad
        super().requires_grad_(requires_grad)
        self._hold()
        return self

    def _hold(self) -> None:
        if "vision_tower" in self._modules and trained.freed(self.vision_tower) != self._free:
            self._held |= trained.hold(self.vision_tower_name, self.vision_tower, self._whole)
            self._free = trained.freed(self.vision_tower)

    def trains(self) -> bool:
        """Whether anything of the tower is trained; what is known to end badly is said once."""
        self._hold()
        if self._free and not self._warned:
            self._warned = True
            trained.warn_of_training(self.vision_tower_name, self.vision_tower, self._free)
        return bool(self._free)

    def choose_again(self) -> None:
        """After another split was set: train what that one reaches, where the host trains the tower."""
        self._hold()
        if self._held and self._free:
            trained.choose(self.vision_tower, self._whole)
            self._free = trained.freed(self.vision_tower)


def _after_load(tower: GuardedTower, *rest: Any) -> None:
    """Compare at once what came with one call; parts of a model may come in several."""
    recorder = tower._recorder
    if tower._alone or (recorder.stamped and recorder.names >= set(tower.vision_tower.state_dict())):
        _ = tower.is_loaded


def _renew_stamp(tower: GuardedTower, *rest: Any) -> None:
    """Before a tower's state is read: the stamp of the weights as they are now."""
    if tower._loaded and tower.is_loaded:
        tower._stamp("read, to be saved or compared")
