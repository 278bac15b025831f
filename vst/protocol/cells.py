"""Which rows a grid has, in which order, and how each is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vst.fit.objectives import OBJECTIVES
from vst.models.spec import VFMSpec
from vst.protocol.chains import Chain, is_closed, name_of, needs_labels, parse_chain
from vst.protocol.config import ProtocolConfig
from vst.tree.config import relative_enter
from vst.tree.stitches import STITCHES, StitchSpec


@dataclass(frozen=True)
class Cell:
    """One stitched model on one task: a row of the results.

    Attributes:
        task, source, target: names.
        family: of the stitch, with its options where it has any.
        depth: of the source that the tree is split at. enter: of the target.
        chain: stages.
        seed: of everything random.
    """

    task: str
    source: str
    target: str
    family: str
    depth: int
    enter: int
    chain: Chain
    seed: int

    @property
    def direction(self) -> str:
        """As in keys: ``A-into-B``."""
        return f"{self.source}-into-{self.target}"

    @property
    def place(self) -> str:
        """Everything but task, chain and seed; what a random start depends on, with the seed."""
        return f"{self.direction},{in_names(self.family)},depth{self.depth:02d}"

    @property
    def key(self) -> str:
        """Of the row: names a file."""
        return f"{self.task},{self.place},{name_of(self.chain)},seed{self.seed}"

    def before(self) -> Cell:
        """The same without its last stage."""
        return replace(self, chain=self.chain[:-1])


def in_names(family: str) -> str:
    """A family as keys and files are named after it: ``mlp_skip(reads=2)`` is ``mlp_skip+reads=2``.

    No two families share a name: what a file's name may not hold is written as its code, ``%27`` for a quote.
    """
    parts = family.removesuffix(")").split("(", 1)
    sign = re.compile(r"(, )|[^\w.=-]", flags=re.ASCII)
    return "+".join(sign.sub(lambda found: "+" if found[1] else f"%{ord(found[0]):02X}", part) for part in parts)


def cells(config: ProtocolConfig, specs: Mapping[str, VFMSpec]) -> list[Cell]:
    """All rows: seed by seed, task by task, then objective by objective as they are listed.

    A family has rows for directions that it supports only, and for chains that begin with a closed form only if it has
    one (``lora`` needs equal widths and has none). The self-stitch of a model is also made where directions into it
    from a model of another depth enter it, as their control.

    Raises:
        ValueError: a depth that a model does not have, or that is too low for what a family reads; a grid without any
            row.
    """
    out, places = [], _places(config, specs)
    for seed in config.seeds:
        for task in config.tasks:
            for chain in map(parse_chain, config.objectives):
                for direction in config.directions:
                    source, target = config.ends(direction)
                    a, b = specs[source], specs[target]
                    for family in config.families:
                        if not _made(family, chain, a, b):
                            continue
                        for depth, enter in places[source, target]:
                            StitchSpec.parse(family).reads(depth)
                            out.append(Cell(task, source, target, family, depth, enter, chain, seed))
    if not out:
        raise ValueError(
            f"The grid has no row: {', '.join(config.families)} do not support these directions (lora needs equal "
            "widths), or have no closed form to begin these objectives with; add another family or objective."
        )
    return out


def _made(family: str, chain: Chain, source: VFMSpec, target: VFMSpec) -> bool:
    kind = STITCHES[StitchSpec.parse(family).family]
    return kind.supports(source, target) and (kind.closed_form or not is_closed(chain[0]))


def left_out(config: ProtocolConfig, specs: Mapping[str, VFMSpec]) -> list[str]:
    """What the grid asks for and no row is made of, as ``family objective direction``."""
    return [
        f"{family} {name_of(chain)} {direction}"
        for family in config.families
        for chain in map(parse_chain, config.objectives)
        for direction in config.directions
        if not _made(family, chain, *(specs[end] for end in config.ends(direction)))
    ]


def _places(config: ProtocolConfig, specs: Mapping[str, VFMSpec]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """Depths of the source and of the target, by direction."""
    out: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for source, target in map(config.ends, config.directions):
        out[source, target] = []
        for depth in config.depths:
            enter = relative_enter(depth, specs[source], specs[target], specs[target].depth)
            if depth >= specs[source].depth or enter >= specs[target].depth:
                raise ValueError(
                    f"Depth {depth} was asked for from {source} ({specs[source].depth} blocks) into {target} "
                    f"({specs[target].depth}), and leaves nothing of one of them: use lower depths."
                )
            out[source, target].append((depth, enter))
    for source, target in out:
        entered = {enter for (a, b), places in out.items() for _, enter in places if a != b == source}
        if source == target:
            out[source, target] = [(depth, depth) for depth in sorted({*config.depths, *entered})]
    return out


def work(cell: Cell, specs: Mapping[str, VFMSpec], config: ProtocolConfig, pictures: int) -> float:
    """Rough work of a row's last stage and its measures, in blocks of the target, for telling the time left."""
    stop, train, stage = specs[cell.target].depth, config.train, cell.chain[-1]
    blocks, objective = stop - cell.enter, OBJECTIVES[stage]
    tail = blocks * specs[cell.target].block_weights
    passes = 0
    if objective.depth(cell.enter, stop) > cell.enter:
        trial = 2 * len(train.rates) * train.trial_steps * train.batch_size * (len(train.rates) > 1)
        passes = 2 * train.epochs(stage) * pictures + trial
    probe = 0 if needs_labels((stage,)) else pictures
    return tail * (passes + probe + pictures / 2) + tail / blocks * pictures
