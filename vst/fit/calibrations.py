"""The sums that start a tree's stitches and give its losses their units, streamed over a few hundred pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from vst.fit.matching import Matcher
from vst.fit.objectives import OBJECTIVES, Compared
from vst.fit.teacher import TRUNK_PIXELS, Teacher
from vst.tree.encoder import VSTEncoder
from vst.tree.ridge import ChannelSums
from vst.tree.stitches import STITCHES, Calibration, joined


class Calibrations:
    """Streams what the closed-form starts and the loss scales need, over a few hundred pictures.

    Args:
        tree: whose stitches are to be fitted.
        objective: what they are to be trained for after the start, and where else it compares; None: nothing.
        own: stream the trunk's own features as well.
    """

    def __init__(self, tree: VSTEncoder, objective: str | Compared | None = None, *, own: bool = False) -> None:
        self.tree = tree
        self.seams = {(b.name, s): Calibration() for b in tree.config.branches for s in b.splits}
        compared = Compared(OBJECTIVES[objective]) if isinstance(objective, str) else objective
        self._features = {
            (b.name, depth): ChannelSums()
            for b in tree.config.branches
            for depth in ([] if compared is None else compared.of_branch(b))
            if depth not in b.enters
        }
        self._own = ChannelSums() if own else None

    def observe(self, teacher: Teacher, pixels: Mapping[str, Tensor]) -> None:
        """Add one batch of pictures: pixels by the names of :func:`vst.fit.teacher.transforms`."""
        config = self.tree.config
        depths = {
            b.name: {*b.enters, *(depth for name, depth in self._features if name == b.name)} for b in config.branches
        }
        self.update(teacher.taps(pixels[TRUNK_PIXELS]), teacher.targets(pixels, depths))
        if self._own is not None:
            own = teacher.target(config.trunk_name, pixels[TRUNK_PIXELS])[config.trunk_stop]
            self._own.update(self.tree.trunk.patches(own).flatten(0, 1))

    def update(self, taps: Mapping[int, Tensor], targets: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Add one batch of the trunk's tokens by depth, and every target's by its own."""
        for b in self.tree.config.branches:
            for split in b.splits:
                y = targets[b.name][b.enter(split)]
                x = joined(taps, b.reads(split))
                self.seams[b.name, split].update(self.tree.config.trunk, b.spec, x, y)
        for (name, depth), sums in self._features.items():
            sums.update(self.tree.branches[name].tail.patches(targets[name][depth]).flatten(0, 1))

    def scale(self, name: str, depth: int) -> Tensor:
        """Standard deviation ``[D]`` by channel of a target's patch tokens at a depth; by its name, or the trunk's."""
        if self._own is not None and name == self.tree.config.trunk_name:
            return self._own.std()
        b = self.tree.branches[name].config
        if depth in b.enters:
            return next(self.seams[name, s].patches.y_std() for s in b.splits if b.enter(s) == depth)
        return self._features[name, depth].std()

    def start(self, form: str | None = "ridge", *, penalty: float) -> dict[tuple[str, int], float | None]:
        """Start every stitch; returns the share of the seam's variance that each closed form explains.

        Args:
            form: one of :data:`vst.tree.ridge.CLOSED_FORMS`; None: random maps between the right statistics.
            penalty: of ridge regression, in standardised units.
        """
        return {
            key: self.tree.branches[key[0]].stitches[str(key[1])].start(calibration, form, penalty=penalty)
            for key, calibration in self.seams.items()
        }

    def set_scales(self, matcher: Matcher) -> None:
        """Give a matcher the units of its losses."""
        matcher.set_units(self.scale)


def check_closed_form(families: Iterable[str], form: str) -> None:
    """Make sure that a closed form asked for by name is had.

    Raises:
        ValueError: a family that has none.
    """
    lacking = sorted({family for family in families if not STITCHES[family].closed_form})
    if lacking:
        raise ValueError(
            f"Stitches of family {', '.join(lacking)} have no closed form, and {form!r} is nothing else: train them "
            "with ffm or lfm, or use a family that has one, such as linear."
        )
