"""What stitches are trained for: one class an objective, with one ``@register`` line.

ridge, procrustes            closed forms at the seam: no gradient steps
lfm (layer feature matching) the stitch's output to the target's own tokens at the depth that is entered
ffm (final feature matching) the branch's features to the target's own, through the frozen tail; patch tokens only
tlt (task loss training)     stitch and a linear head together on a task's labels; in the protocol alone

The fit of a tree, the protocol, the cache of targets and the command line all read from here what they need to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vst.models.vfm import VFM
from vst.tree.config import BranchConfig
from vst.tree.ridge import CLOSED_FORMS

OBJECTIVES: dict[str, Objective] = {}
MATCHES = ("channel", "raw", "mix", "norm")


class Objective:
    """Where a stitched model is compared with its target, and how; by default patch tokens.

    Attributes:
        name: as users give it, and in the names of files.
        closed_form: it is one of :data:`vst.tree.ridge.CLOSED_FORMS`, and takes no gradient steps.
        labels: it needs a task's labels, and so exists in the protocol alone.
        prefix: whether prefix tokens are compared too.
        units: which of ``MATCHES`` suit it. ``channel``: every channel in units of the target's own standard deviation
            (a few outlier channels rule CLIP's last blocks otherwise). ``raw``: as it is, over the mean variance.
            ``mix``: the mean of these two losses. ``norm``: after the target's final norm.
        epochs: of the protocol at the most, where its config has no number of its own (``NAME_epochs``).
    """

    name: ClassVar[str]
    closed_form: ClassVar[bool] = False
    labels: ClassVar[bool] = False
    prefix: ClassVar[bool] = False
    units: ClassVar[tuple[str, ...]] = ("channel", "raw", "mix")
    epochs: ClassVar[int] = 1

    def depth(self, enter: int, stop: int) -> int:
        """The target's own depth whose output is compared, for a tail from ``enter`` to ``stop``."""
        raise NotImplementedError

    def picked(self, model: VFM, tokens: Tensor) -> Tensor:
        """Those of ``tokens [B, T, D]`` that are compared."""
        return tokens if self.prefix else model.patches(tokens)


def register(cls: type[Objective]) -> type[Objective]:
    """Make an objective known by its ``name``."""
    OBJECTIVES[cls.name] = cls()
    return cls


class ClosedForm(Objective):
    """A map at the seam, solved for."""

    closed_form = True
    units = ("channel",)  # it takes no steps in which any would count

    def depth(self, enter: int, stop: int) -> int:
        return enter


for _form in CLOSED_FORMS:
    register(type(_form.title(), (ClosedForm,), {"name": _form, "__doc__": f"The closed form {_form} alone."}))


@register
class LFM(Objective):
    """Layer feature matching: at the seam, prefix tokens as well."""

    name = "lfm"
    prefix = True
    epochs = 5

    def depth(self, enter: int, stop: int) -> int:
        return enter


@register
class FFM(Objective):
    """Final feature matching: at the end of the tail."""

    name = "ffm"
    units = MATCHES

    def depth(self, enter: int, stop: int) -> int:
        return stop


@register
class TLT(Objective):
    """Task loss training: a head on the end of the tail."""

    name = "tlt"
    labels = True
    epochs = 100

    def depth(self, enter: int, stop: int) -> int:
        return stop


@dataclass(frozen=True)
class Compared:
    """The target's own depths at which a stitched model is compared with it.

    Attributes:
        objective: which says where.
        hints: at so many depths of the tail besides, evenly between the one entered and the objective's own.
        beyond: at the model's last block besides, where the features are read before it.
    """

    objective: Objective
    hints: int = 0
    beyond: bool = False

    def depths(self, branch: BranchConfig, enter: int) -> list[int]:
        """Of one stitch: the objective's own first, the others ascending."""
        own = self.objective.depth(enter, branch.stop)
        between = {enter + round((own - enter) * i / (self.hints + 1)) for i in range(1, self.hints + 1)}
        last = {branch.spec.depth} if self.beyond else set()
        return [own, *sorted((between | last) - {own, enter})]

    def of_branch(self, branch: BranchConfig, enters: Iterable[int] | None = None) -> list[int]:
        """Of all stitches of a branch, ascending."""
        chosen = branch.enters if enters is None else enters
        return sorted({depth for enter in chosen for depth in self.depths(branch, enter)})


def units_of(match: str, std: Tensor) -> Tensor:
    """What a difference of one is in a loss, by channel ``[D]``, from the target's standard deviations ``[D]``.

    The mean squared difference in units of ``channel`` and the one in units of ``raw`` have, for ``mix``, the mean of
    the two as the one in units of their harmonic mean. After a ``norm`` nothing is scaled.
    """
    if match == "norm":
        return torch.ones_like(std)
    if match == "channel":
        return std
    whole = std.square().mean().sqrt().expand_as(std)
    return whole.clone() if match == "raw" else (2 / (std**-2 + whole**-2)).sqrt()


def fitting_objectives() -> list[str]:
    """Names of what a tree can be fitted for: all that needs no labels."""
    return [name for name, objective in OBJECTIVES.items() if not objective.labels]


def closed_forms() -> list[str]:
    """Names of the objectives that take no gradient steps."""
    return [name for name, objective in OBJECTIVES.items() if objective.closed_form]
