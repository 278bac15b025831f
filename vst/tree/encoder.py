"""The stitch tree: one trunk, a stitch and a retained tail for every branch, and the split as a knob.

Shape suffixes: B batch, N patches (grid * grid), T tokens with prefix, D width of one model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vst.data.images import ImageTransform
from vst.models import checkpoints
from vst.models.fields import SEEDS, checked, known_options, shown, whole
from vst.models.inputs import check_pixels
from vst.models.placement import Lent
from vst.models.vfm import VFM
from vst.tree.branch import Branch
from vst.tree.config import VSTConfig
from vst.tree.modules import ModuleMap
from vst.tree.options import TreeArgs
from vst.tree.saving import OnDisk
from vst.tree.schedule import IN_TURN, Schedule
from vst.tree.splits import Split, as_split, several, split_label
from vst.tree.stitches import Stitch, joined

MODES = ("fused", "walk", "taps", "from_taps")
_OPTIONS = {f.name for f in fields(TreeArgs)} - {"trunk", "branches", "splits", "image_size"}


class Features(NamedTuple):
    """One branch's features: ``tokens [B, N, D]`` and the same as ``map [B, D, grid, grid]``."""

    tokens: Tensor
    map: Tensor


class VSTEncoder(OnDisk):
    """Several vision foundation models behind one trunk; make one with :meth:`from_vfms` or :meth:`from_pretrained`.

    ``tree(pixels, split=14)`` gives fused tokens ``[B, tokens, width]``; ``tree.features(pixels)`` those of each
    branch. The split is an argument of every call (and so works under DDP and torch.compile); ``tree.split`` is what
    it falls back to. Frozen but for the stitches.

    Args:
        config: the tree. Weights are not initialised to anything useful here.
    """

    # What a device map may not cut: inside a model, positions and prefix tokens would be placed apart from the stem.
    _no_split_modules: ClassVar[list[str]] = ["VFM", "Branch"]

    def __init__(self, config: VSTConfig) -> None:
        super().__init__()
        if not isinstance(config, VSTConfig):
            raise ValueError(
                f"config is {shown(config)}; expected a VSTConfig: VSTEncoder.plan(...) makes one, "
                "VSTConfig.from_dict(...) reads one."
            )
        self.config = config
        self.trunk = VFM(
            config.trunk, config.grid, stop=config.trunk_depth(), norm=config.feature_norm and config.keep_trunk
        )
        self.branches: ModuleMap[Branch] = ModuleMap(
            {
                b.name: Branch(
                    b,
                    config.trunk,
                    VFM(b.spec, config.grid, start=min(b.enters), stop=b.stop, stem=False, norm=config.feature_norm),
                )
                for b in config.branches
            }
        )
        self.fuse = config.fuser()
        self.random_seed: int | None = None  # set where the frozen weights are random, so that a fit finds their heads
        self.freeze()

    @classmethod
    def from_vfms(
        cls,
        trunk: str,
        branches: Sequence[str] | Mapping[str, str],
        splits: int | Sequence[int] | Mapping[str, int | Sequence[int]],
        image_size: int | None = None,
        *,
        pretrained: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> VSTEncoder:
        """Build a tree from whole models; only the blocks that it needs are loaded.

        Its stitches are new: fit them with :func:`vst.fit_stitches`.

        Args:
            trunk: source of the model that sees the pixels (``timm:``, ``hf:``, ``open_clip:``, a ready name, or the
                path of a Hugging Face folder).
            branches: sources of the others, or a mapping from branch names to sources.
            splits: trunk depths to hold stitches for, the same for all branches or by branch name.
            image_size: side of the tree's pictures in pixels, a multiple of the trunk's patch; default: the trunk's.
            pretrained: False gives random weights by ``seed``, for timing and tests; nothing is fetched.
            seed: of random weights and new stitches.
            options: the other fields of :class:`vst.tree.options.TreeArgs`: enters, stitch, keep_trunk, feature_layer,
                feature_norm, fusion, fusion_weights, normalise, cut, split.

        Raises:
            ValueError: unknown models, splits out of range, widths that cannot be bridged or fused, a bad image size.
            TypeError: an option that there is not.
        """
        known_options(options, _OPTIONS, "VSTEncoder.from_vfms")
        return cls.from_args(TreeArgs(trunk, branches, splits, image_size, pretrained=pretrained, seed=seed, **options))

    @classmethod
    def from_args(cls, args: TreeArgs) -> VSTEncoder:
        """:meth:`from_vfms` with its arguments as one object."""
        checked(args, TreeArgs, "args")
        return cls.from_config(args.plan(), pretrained=args.pretrained, seed=args.seed)

    @staticmethod
    def plan(
        trunk: str,
        branches: Sequence[str] | Mapping[str, str],
        splits: int | Sequence[int] | Mapping[str, int | Sequence[int]],
        image_size: int | None = None,
        **options: Any,
    ) -> VSTConfig:
        """The config of :meth:`from_vfms` with the same arguments, without building anything.

        Raises:
            ValueError, TypeError: as :meth:`from_vfms`.
        """
        known_options(options, _OPTIONS, "VSTEncoder.plan")
        return TreeArgs(trunk, branches, splits, image_size, **options).plan()

    @classmethod
    def from_config(cls, config: VSTConfig, *, pretrained: bool = True, seed: int = 0) -> VSTEncoder:
        """Build a tree by its config, frozen weights from their sources, stitches new (reproducible by ``seed``).

        Of a tuned tree's config that is a tree before it was tuned.
        """
        checked(pretrained, bool, "pretrained")
        seed = whole(seed, "seed", SEEDS)
        config = replace(config, tuned=None) if isinstance(config, VSTConfig) else config
        tree = cls.skeleton(config)
        tree.trunk = checkpoints.load_vfm(
            config.trunk,
            grid=config.grid,
            pretrained=pretrained,
            seed=seed,
            stop=config.trunk_depth(),
            norm=config.feature_norm and config.keep_trunk,
        )
        for i, b in enumerate(config.branches):
            branch = tree.branches[b.name]
            branch.tail = checkpoints.load_vfm(
                b.spec,
                grid=config.grid,
                pretrained=pretrained,
                seed=seed + i + 1,
                start=min(b.enters),
                stop=b.stop,
                stem=False,
                norm=config.feature_norm,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + i)
                branch.stitches = ModuleMap({str(s): b.stitch.build(config.trunk, b.spec, s) for s in b.splits})
        tree.random_seed = None if pretrained else seed
        return tree.freeze()

    def freeze(self) -> VSTEncoder:
        """Freeze everything but the stitches; returns self."""
        self.trunk.requires_grad_(False)
        for branch in self.branches.values():
            branch.tail.requires_grad_(False)
            branch.stitches.requires_grad_(True)
        return self

    def trunk_alone(self) -> VSTEncoder:
        """The trunk with its own tail, as a tree without branches: a tower of one model, its tensors shared with this.

        Of a tree whose trunk was tuned it keeps what the trunk took over from the branches' models, at no cost at all:
        the control that tells how much of a tree's gain lies in its trunk.

        Raises:
            ValueError: the tree does not keep its trunk's own features.
        """
        config = self.config.trunk_alone()
        tree = type(self).skeleton(config)
        own = tree.state_dict()
        tree.load_state_dict({k: v for k, v in self.state_dict().items() if k in own}, strict=True, assign=True)
        if config.tuned is not None:
            tree.changes, tree.onto = self.changes, self.onto
        tree.random_seed = self.random_seed
        return tree.freeze().train(self.training)

    def fold(self) -> VSTEncoder:
        """Fold the stitches' standardisation into their linear layers, for inference; returns self.

        The same tokens to rounding, with fewer steps a call. A tree that is to be fitted further is better left as it
        is: standardised inputs are what step sizes are made for. Fold before a cast to a dtype of few digits
        (``from_pretrained(..., fold=True)`` does).
        """
        for stitch in self.stitches().values():
            stitch.fold()
        return self

    @property
    def split(self) -> int | dict[str, int]:
        """Split used where a call names none: one for all branches, or by branch name."""
        return self.config.default_split()

    @split.setter
    def split(self, value: Split | None) -> None:
        self.config = replace(self.config, split=None if value is None else as_split(value))

    def set_fusion(
        self, fusion: str, *, weights: Sequence[float] | None = None, normalise: str | None = None
    ) -> VSTEncoder:
        """Fuse in another way from now on; returns self.

        Raises:
            ValueError: an unknown fusion, or widths and weights that do not suit it.
        """
        self.config = replace(
            self.config,
            fusion=fusion,
            fusion_weights=weights,  # type: ignore[arg-type] # any sequence becomes a tuple there
            normalise=self.config.normalise if normalise is None else normalise,
        )
        self.fuse = self.config.fuser()
        return self

    @property
    def splits(self) -> list[int]:
        """Splits that every branch holds."""
        return self.config.splits

    @property
    def image_size(self) -> int:
        """Side of the square pictures in pixels."""
        return self.config.image_size

    @property
    def width(self) -> int:
        """Width of a fused token."""
        return self.fuse.width

    @property
    def tokens(self) -> int:
        """Tokens out for one picture."""
        return self.fuse.tokens(self.config.grid**2)

    def transform(self) -> ImageTransform:
        """What turns a picture into this tree's pixels: cut, resize, the trunk's normalisation."""
        return self.config.transform()

    def branch_tokens(self, pixels: Tensor, split: Split | None = None) -> dict[str, Tensor]:
        """Every branch's patch tokens ``[B, N, D]``, by name in the order of fusion, in the dtype of ``pixels``.

        The trunk runs once, and no deeper than this call needs.
        """
        return self.walk(pixels, [split])[0]

    def sweep(self, pixels: Tensor, splits: Sequence[Split] | None = None) -> dict[Any, dict[str, Tensor]]:
        """:meth:`branch_tokens` at several splits (default: all), with one run of the trunk for all of them.

        Keys are the splits, or their labels (:func:`vst.tree.splits.split_label`) where they differ by branch.
        """
        chosen = [as_split(s) for s in (self.splits if splits is None else several(splits))]
        keys = [s if isinstance(s, int) else split_label(s) for s in chosen]
        return dict(zip(keys, self.walk(pixels, chosen), strict=True))

    def walk(
        self, pixels: Tensor, splits: Sequence[Split | None], schedule: Schedule = IN_TURN
    ) -> list[dict[str, Tensor]]:
        """:meth:`branch_tokens` at several splits, the work of each branch handed to a scheduler.

        The trunk runs once. With a schedule it does so depth by depth; where a branch leaves it, all that the branch
        does is done inside ``schedule.fork``, before the trunk goes on.

        Args:
            pixels: ``[B, 3, S, S]``.
            splits: one or more.
            schedule: what runs the branches; by default in turn.
        """
        return self(pixels, splits, mode="walk", schedule=schedule)

    def _walk(self, pixels: Tensor, splits: Sequence[Split | None], schedule: Schedule) -> list[dict[str, Tensor]]:
        check_pixels(pixels)
        choices = [self.config.resolve(split) for split in several(splits)]
        depths = sorted(self._depths(choices))
        # In turn the trunk is called once, so that what places or gathers its weights around a call does so once.
        states = self.trunk.taps(pixels, depths).items() if schedule is IN_TURN else self.trunk.walk(pixels, depths)
        found = self._branches(states, choices, schedule)
        # Where branches are on other devices than the trunk, here they come together.
        return [{n: x.to(pixels.device, pixels.dtype) for n, x in tokens.items()} for tokens in found]

    def _depths(self, choices: Sequence[Mapping[str, int]]) -> set[int]:
        """Trunk depths that branches, and the trunk's own features, are read at."""
        depths = {depth for chosen in choices for b in self.config.branches for depth in b.reads(chosen[b.name])}
        return depths | ({self.config.trunk_stop} if self.config.keep_trunk else set())

    def _branches(
        self, states: Iterable[tuple[int, Tensor]], choices: Sequence[Mapping[str, int]], schedule: Schedule
    ) -> list[dict[str, Tensor]]:
        """Every choice's patch tokens by name, from the trunk's tokens by depth as they come, ascending."""
        config = self.config
        leaving: dict[int, dict[tuple[str, int], tuple[int, ...]]] = {}
        for chosen in choices:
            for b in config.branches:
                reads = b.reads(chosen[b.name])
                leaving.setdefault(reads[-1], {})[b.name, chosen[b.name]] = reads
        seen: dict[int, Tensor] = {}  # what a stitch that reads several depths needs of those before its last
        earlier = {depth for leave in leaving.values() for reads in leave.values() for depth in reads[:-1]}
        made: dict[tuple[str, int], Tensor] = {}
        for depth, x in states:
            if depth in earlier:
                seen[depth] = x
            for (name, split), reads in leaving.get(depth, {}).items():
                branch, read = self.branches[name], joined({**seen, depth: x}, reads)
                with schedule.fork(name, read):
                    made[name, split] = branch(read, split, Lent(self.trunk))
            if config.keep_trunk and depth == config.trunk_stop:
                made[config.trunk_name, -1] = self.trunk.features(x)
        schedule.join(*made.values())
        return [{name: made[name, chosen.get(name, -1)] for name in config.names} for chosen in choices]

    def taps(self, pixels: Tensor, splits: Sequence[Split] | None = None) -> dict[int, Tensor]:
        """The trunk's tokens ``[B, T, D]`` by depth: what :meth:`from_taps` needs at some splits (default: all)."""
        splits = None if splits is None else several(splits)
        depths = self._tapped(splits)
        return dict(zip(depths, self(pixels, splits, mode="taps"), strict=True))

    def _tapped(self, splits: Sequence[Split] | None) -> list[int]:
        """Trunk depths of :meth:`taps`, ascending."""
        if splits is None:
            held = {depth for b in self.config.branches for s in b.splits for depth in b.reads(s)}
            return sorted(held | self._depths([]))
        return sorted(self._depths([self.config.resolve(s) for s in several(splits)]))

    def from_taps(self, taps: Mapping[int, Tensor], split: Split | None = None) -> dict[str, Tensor]:
        """:meth:`branch_tokens` from what :meth:`taps` gave, in its dtype, so that a trunk need not run again.

        Raises:
            ValueError: a split that is not held, or that needs a depth which was not given.
        """
        return self(taps, split, mode="from_taps")

    def _from_taps(self, taps: Mapping[int, Tensor], split: Split | None) -> dict[str, Tensor]:
        chosen, wanted = self.config.resolve(split), (self.trunk.tokens, self.config.trunk.width)
        if not isinstance(taps, Mapping):
            raise ValueError(f"taps is a {type(taps).__name__}; expected tokens by depth, as taps gives them.")
        for depth, x in taps.items():
            whole(depth, "A depth in taps")
            if not isinstance(x, Tensor) or tuple(x.shape[1:]) != wanted:
                raise ValueError(
                    f"taps[{depth}] is {list(x.shape) if isinstance(x, Tensor) else shown(x)}; expected the trunk's "
                    f"tokens [batch, {wanted[0]}, {wanted[1]}], as taps gives them."
                )
        if lacking := sorted(self._depths([chosen]) - set(taps)):
            raise ValueError(
                f"The trunk's tokens at depths {sorted(taps)} were given; this split needs {lacking} as well: name it "
                "in the call of taps."
            )
        return self._branches(sorted(taps.items()), [chosen], IN_TURN)[0]

    def features(self, pixels: Tensor, split: Split | None = None) -> dict[str, Features]:
        """Every branch's features before fusion, as tokens and as a map.

        After ``tree.eval()``, and so after a fit, they carry no gradient: NumPy takes them as they are. While a tree is
        in training (``tree.train()``, torch's default), and from :meth:`branch_tokens` always, they do.

        Args:
            pixels: ``[B, 3, S, S]`` as :meth:`transform` makes them.
            split: one for all branches, one by branch name, or None for the default.

        Raises:
            ValueError: pictures of the wrong size, a split that is not held.
        """
        side = self.config.grid
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return {
                name: Features(x, x.transpose(1, 2).unflatten(2, (side, side)))
                for name, x in self.branch_tokens(pixels, split).items()
            }

    def forward(self, pixels: Any, split: Any = None, *, mode: str = "fused", schedule: Schedule = IN_TURN) -> Any:
        """Fused tokens ``[B, tokens, width]`` of pictures ``[B, 3, S, S]``, in the dtype of ``pixels``.

        Args:
            pixels: as :meth:`transform` makes them.
            split: one for all branches, one by branch name, or None for the default.
            mode: ``fused``, or what the methods :meth:`walk`, :meth:`taps` and :meth:`from_taps` ask for under their
                names, with their arguments: they are calls of the module too, so that whoever hooks those, to place
                the tree's tensors or to gather them, sees all that is computed.
            schedule: of :meth:`walk`.

        Raises:
            ValueError: pictures of the wrong size, a split that is not held, an unknown mode.
        """
        if mode == "fused":
            return self.fuse(list(self._walk(pixels, [split], IN_TURN)[0].values()))
        if mode == "walk":
            return self._walk(pixels, split, schedule)
        if mode == "taps":
            check_pixels(pixels)
            return self.trunk(pixels, self._tapped(split))  # a tuple, in which hooks find tensors; taps names depths
        if mode == "from_taps":
            return self._from_taps(pixels, split)
        raise ValueError(f"mode is {shown(mode)}; expected {', '.join(MODES)}.")

    def stitches(self) -> dict[tuple[str, int], Stitch]:
        """All stitches, by branch name and split."""
        return {
            (name, int(split)): stitch
            for name, branch in self.branches.items()
            for split, stitch in branch.stitches.items()
        }
