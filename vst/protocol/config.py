"""What the protocol runs: the axes of its grid, and the settings that every row shares."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from vst.data.images import PICTURE_MB
from vst.fit.objectives import OBJECTIVES
from vst.models.fields import SEEDS, Limits, check_fields
from vst.protocol.chains import parse_chain
from vst.tree.stitches import DEFAULT_STITCH, StitchSpec

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
CUTS = ("crop", "squash")


@dataclass(frozen=True)
class TaskConfig:
    """One task: a registered data source and how many of its pictures are used.

    Attributes:
        source: name of a registered task class, such as ``emoji`` or ``folder``.
        options: of that class.
        train: training pictures, drawn by the seed from those that are left after validation; None for all.
        validation: pictures held out of the training pictures, a fifth of them at most, for early stopping and the
            choice of rates.
        test: pictures that scores are told on, drawn by the seed; None for all.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    train: int | None = None
    validation: int = 100
    test: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, prefix="Task: ")
        for name in ("train", "validation", "test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} of a {self.source} task is {value}; expected at least 1 picture.")


@dataclass(frozen=True)
class TrainConfig:
    """How stages and heads are trained; the same rule for all.

    Every stage chooses its learning rate alike: each of ``rates`` is tried for ``trial_steps`` steps from the stage's
    start, and the one with the lowest loss of that stage on ``trial_pictures`` validation pictures is used. The best
    epoch by validation loss is kept (the start counts as epoch 0).

    Attributes:
        rates: learning rates of AdamW to choose from (peak; linear warm-up, then a cosine to zero). They are to bracket
            the best one: a row that took the lowest or the highest is marked, and no finding rests on it.
        trial_steps, trial_pictures: of the choice; a single rate is used as it is.
        lfm_epochs, ffm_epochs, tlt_epochs, head_epochs: at most so many passes over the training pictures.
        patience: stop after so many epochs without a lower validation loss.
        batch_size: pictures a step.
        weight_decay, warmup: of AdamW; share of the steps.
        calibration: training pictures for closed forms and statistics. penalty: of the ridge, in standardised units.
    """

    rates: list[float] = field(default_factory=lambda: [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
    trial_steps: int = 8
    trial_pictures: int = 64
    lfm_epochs: int = 5
    ffm_epochs: int = 1
    tlt_epochs: int = 100
    head_epochs: int = 100
    patience: int = 5
    batch_size: int = 16
    weight_decay: float = 0.01
    warmup: float = 0.05
    calibration: int = 256
    penalty: float = 1e-3

    def __post_init__(self) -> None:
        check_fields(self, {"weight_decay": (0, None), "penalty": (0, None), "warmup": (0, 1)}, prefix="train: ")
        if not self.rates or any(not rate > 0 for rate in self.rates):
            raise ValueError(f"rates are {self.rates}; expected one or more positive learning rates.")
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")

    def epochs(self, stage: str) -> int:
        """At most so many epochs of an objective, or of ``head``: as configured, else the objective's own number."""
        own = f"{stage}_epochs"
        return getattr(self, own) if hasattr(self, own) else OBJECTIVES[stage].epochs


@dataclass(frozen=True)
class ProtocolConfig:
    """A grid of stitched models. The axes (all fields up to ``seeds``) can grow from call to call in one run folder.

    Attributes:
        models: source by name: timm:, hf:, open_clip:, a ready name, or demo:clip and demo:dinov2 (fetched).
        directions: ``A>B``: blocks of A, a stitch, the later blocks of B; ``A>A`` is the self-stitch control.
        tasks: by name.
        depths: of the source; the target is entered at the same relative depth. A self-stitch is also made where a
            direction from a model of another depth enters its target.
        families: of stitches (linear, mlp, mlp_skip, lora, or any registered one), with options of theirs where they
            are to be others than by default, ``mlp_skip(reads=2)``.
        objectives: chains of stages, in the order in which they are run; see :mod:`vst.protocol.chains`.
        seeds: of pictures drawn, random starts and the order of steps.
        grid: patches a side, of every model.
        cut: how a picture becomes square: crop or squash.
        picture_mb: pictures that take more MiB than this to decode are left out.
        cka_depths: depths of the map of linear CKA between models; empty for no map.
        cka_pictures: test pictures of that map.
        train: how stages and heads are trained.
        mask_size: side in pixels that segmentation is scored at.
        precision: auto (bf16 autocast on a GPU that has it, else fp32), fp32 or bf16.
        cache: folder of features, shared between runs; None for one inside the run folder.
        cache_limit_gb: refuse to let that folder grow beyond it.
        pretrained: false gives every model random weights, to see that a grid runs before weights are fetched; its
            numbers mean nothing, and it needs a run folder of its own.
        tolerated_drop: of score, below which a stitched model counts as reliable; see :mod:`vst.protocol.findings`.
    """

    models: dict[str, str]
    directions: list[str]
    tasks: dict[str, TaskConfig]
    depths: list[int]
    families: list[str] = field(default_factory=lambda: [DEFAULT_STITCH])
    objectives: list[str] = field(default_factory=lambda: ["ridge", "lfm", "ffm", "tlt", "lfm+tlt", "ffm+tlt"])
    seeds: list[int] = field(default_factory=lambda: [0])
    grid: int = 8
    cut: str = "crop"
    picture_mb: int = PICTURE_MB
    cka_depths: list[int] = field(default_factory=list)
    cka_pictures: int = 64
    train: TrainConfig = field(default_factory=TrainConfig)
    mask_size: int = 112
    precision: str = "auto"
    cache: str | None = None
    cache_limit_gb: float = 50.0
    pretrained: bool = True
    tolerated_drop: float = 0.02

    def __post_init__(self) -> None:
        limits: dict[str, Limits] = {"cka_depths": (0, None), "cache_limit_gb": (1e-9, None), "tolerated_drop": (0, 1)}
        check_fields(self, limits | {"picture_mb": (1, None), "seeds": SEEDS})
        # Each is written in one way only, as rows and files are named by it.
        object.__setattr__(self, "families", [str(StitchSpec.parse(family)) for family in self.families])
        for name in ("models", "directions", "tasks", "depths", "families", "objectives", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {list(values)}; expected one or more, each once.")
        for name in (*self.models, *self.tasks):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} names files; use letters, digits and ._- and start with a letter or digit.")
        for objective in self.objectives:
            parse_chain(objective)
        for direction in self.directions:
            self.ends(direction)
        if self.cut not in CUTS or self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(
                f"cut is {self.cut!r} and precision {self.precision!r}; expected crop or squash; auto, fp32 or bf16."
            )
        if min(self.depths) < 1 or self.grid < 1 or self.mask_size < self.grid or self.cka_pictures < 1:
            raise ValueError(
                f"depths {self.depths}, grid {self.grid}, mask_size {self.mask_size} and cka_pictures "
                f"{self.cka_pictures} were given; expected positive numbers, and a mask_size of the grid at least."
            )

    def ends(self, direction: str) -> tuple[str, str]:
        """Source and target of a direction.

        Raises:
            ValueError: not of the form ``A>B`` with names of models.
        """
        source, arrow, target = direction.partition(">")
        if not arrow or source not in self.models or target not in self.models:
            raise ValueError(
                f"Direction {direction!r} was given; expected A>B with names among {', '.join(self.models)}."
            )
        return source, target

    def settings(self) -> dict[str, Any]:
        """What must not change within a run folder: what a row depends on beside its own place on the axes."""
        return {
            "grid": self.grid,
            "cut": self.cut,
            "mask_size": self.mask_size,
            "precision": self.precision,
            "cka_pictures": self.cka_pictures,
            "train": vars(self.train),
            # Both as runs from before there was a choice described themselves.
            **({} if self.pretrained else {"pretrained": False}),
            **({} if self.picture_mb == PICTURE_MB else {"picture_mb": self.picture_mb}),
        }
