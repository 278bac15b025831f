"""What a tree is, without its weights: the one configuration that library, saved folders and hosts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vst.data.images import CUTS, ImageTransform
from vst.models.fields import check_fields, mapping, name, one_of, shown, whole
from vst.models.spec import MOST_DEPTH, MOST_GRID, VFMSpec
from vst.tree.changes import Tuned
from vst.tree.fusion import FUSIONS, NORMALISE, Fusion
from vst.tree.modules import ModuleMap
from vst.tree.splits import Split, as_split, as_splits, split_label
from vst.tree.stitches import StitchSpec

MODEL_TYPE = "vst"
MOST_BLOCKS, MOST_WEIGHTS, MOST_ANGLES = 4096, 2 * 10**11, 2**26  # what a config can ask memory for


@dataclass(frozen=True)
class BranchConfig:
    """One branch: a model whose blocks ``enter`` to ``stop - 1`` are kept, fed through a stitch at each split.

    Attributes:
        name: key of the branch in features, errors and saved tensors; an identifier, and no word of torch's ModuleDict.
        spec: of the model.
        splits: trunk depths at which it can leave the trunk, ascending.
        enters: its own depth that it is entered at, one for each split.
        stop: its own depth whose output is the branch's features.
        stitch: family and options.
    """

    name: str
    spec: VFMSpec
    splits: tuple[int, ...]
    enters: tuple[int, ...]
    stop: int
    stitch: StitchSpec = field(default_factory=StitchSpec)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier() or len(self.name) > 100:
            raise ValueError(
                f"Branch name {shown(self.name)} is not an identifier; use letters, digits and underscores."
            )
        if hasattr(ModuleMap, self.name) or self.name == "training":
            raise ValueError(
                f"Branch name {self.name!r} is a word of torch's modules; name the branch otherwise, {self.name}_1."
            )
        limits = {"splits": (0, MOST_DEPTH), "enters": (0, MOST_DEPTH), "stop": (0, MOST_DEPTH)}
        check_fields(self, limits, prefix=f"Branch {self.name!r}: ")
        if self.stop > self.spec.depth:
            raise ValueError(
                f"Branch {self.name!r}: stop is {self.stop}; expected at most {self.spec.depth}, the blocks of "
                f"{self.spec.source}."
            )
        if not self.splits or list(self.splits) != sorted(set(self.splits)):
            raise ValueError(f"Branch {self.name!r}: splits {list(self.splits)} must be ascending and not empty.")
        if len(self.enters) != len(self.splits):
            raise ValueError(f"Branch {self.name!r}: {len(self.splits)} splits need as many enters, got {self.enters}.")
        if any(not 0 <= e <= self.stop for e in self.enters):
            raise ValueError(
                f"Branch {self.name!r}: enters {list(self.enters)} must lie in 0..{self.stop}, the depth its features "
                "are read at."
            )

    def enter(self, split: int) -> int:
        """The branch's own depth for a trunk split.

        Raises:
            ValueError: a split that this branch does not hold.
        """
        return self.enters[self.splits.index(self.held(split))]

    def held(self, split: int) -> int:
        """A split that this branch holds, as the config says it.

        While torch.compile traces, the number of a call is a symbol, and the config's own a constant.

        Raises:
            ValueError: a split that this branch does not hold.
        """
        for own in self.splits:
            if own == split:
                return own
        raise ValueError(
            f"Branch {self.name!r} holds no stitch at split {split}; it holds {list(self.splits)}: choose one of "
            "these, or build and fit the tree with that split."
        )

    def reads(self, split: int) -> tuple[int, ...]:
        """The trunk depths whose outputs the stitch reads for a split, ascending.

        Raises:
            ValueError: a split that this branch does not hold.
        """
        return self.stitch.reads(self.held(split))


@dataclass(frozen=True, kw_only=True)
class TreeOptions:
    """What is read of a tree's models, and how it becomes one sequence of tokens.

    Attributes:
        keep_trunk: whether the trunk's own tail is a branch (the first one).
        feature_layer: which hidden state is read of every model, counted as ``hidden_states`` of LLaVA: 0 is the
            stem's output, -1 the last block's, -2 (default) the last but one's.
        feature_norm: whether the model's final norm is applied to what is read.
        fusion: how branches become one sequence: channel, additive, interleave or sequence.
        fusion_weights: of additive alone, one a branch.
        normalise: what is done to each branch before fusion: layer or none.
        cut: how a picture becomes square: crop, squash or pad.
        split: default split, one for all branches or by branch name; None is the deepest split that every branch holds
            (the cheapest).
    """

    keep_trunk: bool = True
    feature_layer: int = -2
    feature_norm: bool = False
    fusion: str = "channel"
    fusion_weights: tuple[float, ...] | None = None
    normalise: str = "layer"
    cut: str = "crop"
    split: int | dict[str, int] | None = None

    def check_options(self) -> None:
        """Check what is said here by itself, whatever the models; what is plainly meant is put in its place.

        Raises:
            ValueError: an unknown word, or a value of another type.
        """
        for word, known in (("fusion", FUSIONS), ("normalise", NORMALISE), ("cut", CUTS)):
            one_of(getattr(self, word), word, sorted(known))
        own = {f.name for f in fields(TreeOptions)}
        check_fields(self, but={"split", *(f.name for f in fields(self) if f.name not in own)})
        if self.split is not None:
            as_split(self.split)


@dataclass(frozen=True)
class VSTConfig(TreeOptions):
    """A stitch tree.

    Attributes:
        trunk: the model that sees the pixels.
        branches: the others.
        grid: patches a side; the tree's pictures are ``grid * trunk.patch`` pixels a side.
        trunk_name: the trunk's key in features.
        tuned: what of the models was trained besides the stitches and merged; None: nothing, they are the sources'.

    The rest are :class:`TreeOptions`.
    """

    trunk: VFMSpec
    branches: tuple[BranchConfig, ...]
    grid: int
    trunk_name: str = "trunk"
    tuned: Tuned | None = None

    def __post_init__(self) -> None:
        self.check_options()
        check_fields(self, {"grid": (1, MOST_GRID)}, but={f.name for f in fields(TreeOptions)})
        name(self.trunk_name, "trunk_name")
        self._check_size()
        if not self.branches and not self.keep_trunk:
            raise ValueError("A tree without branches and without its trunk's tail gives no features: keep one.")
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"Branch names must differ; got {names}.")
        for branch in self.branches:
            low, high = min(branch.splits), max(branch.splits)
            if low < 1 or high > self.trunk.depth or min(branch.stitch.reads(low)) < 0:
                raise ValueError(
                    f"Branch {branch.name!r}: splits {list(branch.splits)} must lie in 1..{self.trunk.depth}, the "
                    f"blocks of the trunk {self.trunk.source}."
                )
            if branch.stop != feature_depth(branch.spec, self.feature_layer):
                raise ValueError(f"Branch {branch.name!r} stops at {branch.stop}, not at layer {self.feature_layer}.")
        if self.split is not None:
            split, chosen = as_split(self.split), self.resolve(self.split)
            object.__setattr__(self, "split", split if isinstance(split, int) else chosen)
        self.fuser()

    def _check_size(self) -> None:
        """Refuse what no machine builds, before anything is built."""
        blocks = self.held_blocks()
        if len(self.branches) > MOST_BLOCKS or sum(n for _, n in blocks) > MOST_BLOCKS:
            raise ValueError(f"This tree holds {sum(n for _, n in blocks)} blocks; expected at most {MOST_BLOCKS}.")
        if self.least_weights() > MOST_WEIGHTS:
            raise ValueError(
                f"This tree holds {self.least_weights():.1e} weights; expected at most {MOST_WEIGHTS:.0e}."
            )
        for spec, _ in blocks:
            if spec.position == "rotary" and self.grid**2 * (spec.width // spec.heads) > MOST_ANGLES:
                raise ValueError(
                    f"{spec.source}: a grid of {self.grid} with heads of width {spec.width // spec.heads} needs more "
                    f"than {MOST_ANGLES} angles; use a smaller grid."
                )

    def held_blocks(self) -> list[tuple[VFMSpec, int]]:
        """The models whose blocks are held, the trunk first, and how many of each."""
        tails = [(b.spec, b.stop - min(b.enters)) for b in self.branches]
        return [(self.trunk, self.trunk_depth()), *tails]

    def least_weights(self) -> int:
        """Numbers that a saved tree of this config holds at the least: the matrices of its blocks, and positions."""
        table = self.grid**2 * self.trunk.width if self.trunk.position == "learned" else 0
        return table + sum(spec.block_weights * count for spec, count in self.held_blocks())

    @property
    def names(self) -> list[str]:
        """Keys of the features, in the order of fusion."""
        return ([self.trunk_name] if self.keep_trunk else []) + [b.name for b in self.branches]

    @property
    def specs(self) -> dict[str, VFMSpec]:
        """Spec of every model whose features come out, by name."""
        own = {self.trunk_name: self.trunk} if self.keep_trunk else {}
        return own | {b.name: b.spec for b in self.branches}

    @property
    def trunk_stop(self) -> int:
        """Trunk depth that its own features are read at."""
        return feature_depth(self.trunk, self.feature_layer)

    @property
    def image_size(self) -> int:
        """Side of the tree's square pictures in pixels."""
        return self.grid * self.trunk.patch

    def transform(self) -> ImageTransform:
        """What turns a picture into the tree's pixels: cut, resize, the trunk's normalisation."""
        return ImageTransform(size=self.image_size, mean=self.trunk.mean, std=self.trunk.std, cut=self.cut)

    @property
    def splits(self) -> list[int]:
        """Splits that every branch holds, ascending."""
        common = set.intersection(*(set(b.splits) for b in self.branches)) if self.branches else set()
        return sorted(common)

    def fuser(self) -> Fusion:
        """The fusion of these branches.

        Raises:
            ValueError: the widths or weights do not suit it.
        """
        widths = {name: spec.width for name, spec in self.specs.items()}
        return Fusion(self.fusion, widths, normalise=self.normalise, weights=self.fusion_weights)

    def resolve(self, split: Split | str | None) -> dict[str, int]:
        """One split for every branch, from what :func:`as_split` takes, or None for the default.

        Raises:
            ValueError: a split that is not held, a branch that does not exist.
        """
        split = self.default_split() if split is None else as_split(split)
        if isinstance(split, Mapping):
            names = [b.name for b in self.branches]
            if set(split) != set(names):
                raise ValueError(f"Splits by branch were given for {sorted(split)}; expected exactly {sorted(names)}.")
            chosen = {name: split[name] for name in names}
        else:
            chosen = {b.name: split for b in self.branches}
        return {b.name: b.held(chosen[b.name]) for b in self.branches}

    def default_split(self) -> int | dict[str, int]:
        """``split`` if set, else the deepest that every branch holds, else each branch's own deepest."""
        if self.split is not None:
            return dict(self.split) if isinstance(self.split, Mapping) else self.split
        return self.splits[-1] if self.splits else {b.name: b.splits[-1] for b in self.branches}

    def choices(self) -> dict[str, int | dict[str, int]]:
        """Splits worth a row in a table, by label, the default among them.

        Those in common, else each branch's shallowest and deepest; and the default, where it differs by branch.
        """
        if self.splits:
            out: dict[str, int | dict[str, int]] = {f"VST-{split}": split for split in self.splits}
        else:
            ends = {"shallowest": 0, "deepest": -1} if self.branches else {}
            out = {f"VST {label}": {b.name: b.splits[at] for b in self.branches} for label, at in ends.items()}
        default = self.default_split() if self.branches else None
        if isinstance(default, dict) and all(self.resolve(split) != default for split in out.values()):
            out[f"VST-{split_label(default)}"] = default
        return out

    def trunk_depth(self) -> int:
        """How many trunk blocks are held: to the deepest split, and to the trunk's own features if they are kept."""
        deepest = max((split for b in self.branches for split in b.splits), default=0)
        return max(deepest, self.trunk_stop if self.keep_trunk else 0)

    def pruned(self, splits: Any) -> VSTConfig:
        """The same tree with fewer splits, as :func:`as_splits` takes them.

        Raises:
            ValueError: a split that a branch does not hold, or names that are not the branches'.
        """
        wanted = {n: tuple(sorted(set(own))) for n, own in as_splits(splits, [b.name for b in self.branches]).items()}
        branches = tuple(
            replace(b, splits=wanted[b.name], enters=tuple(b.enter(s) for s in wanted[b.name])) for b in self.branches
        )
        chosen = {} if self.split is None else self.resolve(self.split)
        kept = bool(chosen) and all(chosen[name] in own for name, own in wanted.items())
        return replace(self, branches=branches, split=self.split if kept else None)._with_held_blocks()

    def _with_held_blocks(self) -> VSTConfig:
        """With no more blocks said to be tuned than are held."""
        if self.tuned is None or self.tuned.trunk_blocks <= self.trunk_depth():
            return self
        return replace(self, tuned=replace(self.tuned, trunk_blocks=self.trunk_depth()))

    def at(self, split: Split | str) -> VSTConfig:
        """The same tree with one split alone."""
        return self.pruned({name: [depth] for name, depth in self.resolve(split).items()})

    def trunk_alone(self) -> VSTConfig:
        """The trunk with its own tail, as a tree without branches.

        Raises:
            ValueError: the tree does not keep its trunk's own features.
        """
        if not self.keep_trunk:
            raise ValueError("This tree does not keep its trunk's own features (keep_trunk): no output is its own.")
        tuned = self.tuned if self.tuned is not None and self.tuned.trunk_blocks else None
        tuned = None if tuned is None else replace(tuned, tails="none")
        alone = replace(self, branches=(), split=None, fusion="channel", fusion_weights=None, tuned=tuned)
        return alone._with_held_blocks()

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types, with ``model_type`` first."""
        out: dict[str, Any] = {"model_type": MODEL_TYPE, "trunk": self.trunk.to_dict()}
        out["branches"] = [
            {
                "name": b.name,
                "spec": b.spec.to_dict(),
                "splits": list(b.splits),
                "enters": list(b.enters),
                "stop": b.stop,
                "stitch": b.stitch.to_dict(),
            }
            for b in self.branches
        ]
        for f in fields(self):
            if f.name not in ("trunk", "branches", "tuned"):
                value = getattr(self, f.name)
                out[f.name] = list(value) if isinstance(value, tuple) else value
        if self.tuned is not None:  # left out of others, so that they stay as they were before there was tuning
            out["tuned"] = self.tuned.to_dict()
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VSTConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: another model type, unknown or missing keys.
        """
        values = dict(mapping(values, "A tree's config"))
        if (kind := values.pop("model_type", MODEL_TYPE)) != MODEL_TYPE:
            raise ValueError(
                f"This is the config of a {shown(kind)} model, not of a stitch tree (model_type {MODEL_TYPE!r})."
            )
        _known(values, {f.name for f in fields(cls)}, "A tree's config")
        if not isinstance(given := values.get("branches", []), (list, tuple)):
            raise ValueError(f"branches is {shown(given)}; expected a list.")
        try:
            trunk, branches = VFMSpec.from_dict(values.pop("trunk")), tuple(map(_branch, values.pop("branches")))
        except KeyError as error:
            raise ValueError(f"A tree's config lacks the field {error}: is it damaged, or not a tree's?") from error
        weights = values.pop("fusion_weights", None)
        weights = tuple(weights) if isinstance(weights, list) else weights
        tuned = None if (told := values.pop("tuned", None)) is None else Tuned.from_dict(told)
        try:
            return cls(trunk=trunk, branches=branches, fusion_weights=weights, tuned=tuned, **values)
        except TypeError as error:
            raise ValueError(f"A tree's config is incomplete ({error}): is it damaged?") from error


def _branch(values: Any) -> BranchConfig:
    """A branch of :meth:`VSTConfig.to_dict`; ``KeyError`` names a field that is lacking."""
    values = mapping(values, "A branch")
    _known(values, {f.name for f in fields(BranchConfig)}, "A branch")
    return BranchConfig(
        name=values["name"],
        spec=VFMSpec.from_dict(values["spec"]),
        splits=values["splits"],
        enters=values["enters"],
        stop=values["stop"],
        stitch=StitchSpec.parse(values["stitch"]),
    )


def _known(values: Mapping[str, Any], known: set[str], what: str) -> None:
    if unknown := set(values) - known:
        raise ValueError(f"{what} has no field {shown(sorted(unknown))}; was it made by a newer version?")


def feature_depth(spec: VFMSpec, layer: int) -> int:
    """Depth whose output is hidden state ``layer`` of a model (0 the stem's, -1 the last block's).

    Raises:
        ValueError: the model has no such hidden state.
    """
    layer = whole(layer, "feature_layer")
    depth = layer if layer >= 0 else spec.depth + 1 + layer
    if not 0 <= depth <= spec.depth:
        raise ValueError(
            f"feature_layer {layer} was asked for; {spec.source} has hidden states -{spec.depth + 1} to {spec.depth}."
        )
    return depth


def relative_enter(split: int, trunk: VFMSpec, target: VFMSpec, stop: int) -> int:
    """The target's depth at the same relative depth as the trunk's ``split``, at most ``stop``."""
    return min(max(round(split * target.depth / trunk.depth), 1), stop)
