"""How stitches are fitted, and what a fit reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from vst.data.images import PICTURE_MB
from vst.fit.heldout import StitchReport
from vst.fit.objectives import MATCHES, OBJECTIVES, Objective, closed_forms, fitting_objectives
from vst.fit.similarity import Agreement
from vst.fit.tuning import TuneConfig
from vst.models.fields import SEEDS, Limits, check_fields, known_options, mapping, number, one_of, shown
from vst.results.later import later

MOST_RATE = 1e30  # what a step multiplies has to fit a float32


@dataclass(frozen=True)
class FitConfig:
    """How stitches are fitted.

    Attributes:
        objective: ``ffm`` (match the target's features), ``lfm`` (match at the seam), ``ridge`` or ``procrustes``
            (the closed-form start alone), or one of your own: see :mod:`vst.fit.objectives`.
        match: units of the loss: ``channel`` (each in units of the target's own deviation), ``raw`` (all in units of
            the mean one, so that a few outliers count most), ``mix`` (the mean of these two) or ``norm`` (after the
            target's final norm).
        hints: compare at so many depths within the tail as well, evenly spread; their mean counts as much as the end.
        beyond: compare at the target's last block as well, where the features are read before it (as LLaVA does).
        augment: show a random part of each picture, mirrored half the time, another one in every epoch (see
            :mod:`vst.data.views`); targets are computed for what is shown, and so not cached.
        tune: what of the models themselves is trained with the stitches and merged at the end; see
            :class:`vst.fit.tuning.TuneConfig`.
        start: ``ridge`` or ``procrustes`` (closed forms) or ``random``.
        calibration: pictures for the closed form and the statistics.
        penalty: of the ridge regression, in standardised units.
        epochs: passes over the pictures.
        batch_size: pictures a step, over all processes together.
        lr: peak learning rate of AdamW, with linear warm-up over ``warmup`` of the steps and a cosine to zero.
        weight_decay: of AdamW, for the stitches.
        warmup: share of the steps over which the rate rises.
        heldout: pictures kept out for the report, at most a fifth; drawn by ``seed``.
        limit: use only the first so many pictures; None for all.
        seed: of the held-out draw and of the order, of random views, and of what is tuned.
        precision: ``auto`` (bf16 autocast on a GPU that has it, else fp32), ``fp32`` or ``bf16``.
        checkpointing: recompute the activations of the tails, and of a tuned trunk, in the backward pass: less memory,
            more time.
        cache: folder for the targets' features, so that later epochs do not run the targets; None for no cache.
        cache_limit_gb: refuse a larger cache.
        workers: processes that read pictures.
        picture_mb: pictures that take more MiB than this to decode are skipped; each worker may hold one such picture.
        save_every: steps between saved states.
        deepspeed: path of a DeepSpeed config (ZeRO stages 0 to 2).
    """

    objective: str = "ffm"
    match: str = "channel"
    start: str = "ridge"
    calibration: int = 256
    penalty: float = 1e-3
    epochs: int = 1
    batch_size: int = 16
    lr: float = 3e-4
    weight_decay: float = 0.0
    warmup: float = 0.03
    heldout: int = 64
    limit: int | None = None
    seed: int = 0
    precision: str = "auto"
    checkpointing: bool = False
    cache: str | None = None
    cache_limit_gb: float = 50.0
    workers: int = 0
    picture_mb: int = later(PICTURE_MB)
    save_every: int = 200
    deepspeed: str | None = None
    hints: int = later(0)
    beyond: bool = later(False)
    augment: bool = later(False)
    tune: TuneConfig = later(TuneConfig)  # noqa: RUF009 (a field)

    def __post_init__(self) -> None:
        if not isinstance(self.tune, (Mapping, TuneConfig)):
            raise ValueError(f"tune is {shown(self.tune)}; expected its fields, such as {{'trunk': 'lora'}}.")
        if isinstance(self.tune, Mapping):  # as a file of options holds it
            known_options(mapping(self.tune, "tune"), [f.name for f in fields(TuneConfig)], "tune")
            object.__setattr__(self, "tune", TuneConfig(**self.tune))
        known = {
            "objective": fitting_objectives(),
            "match": MATCHES,
            "start": [*closed_forms(), "random"],
            "precision": ("auto", "fp32", "bf16"),
        }
        for name, values in known.items():
            one_of(getattr(self, name), name, values)
        number(self.lr, "lr")
        number(self.warmup, "warmup")
        if not self.lr > 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"lr is {self.lr} and warmup {self.warmup}; expected a rate above 0, and a share from 0 to below 1."
            )
        least = ("calibration", "epochs", "batch_size", "heldout", "save_every", "limit", "picture_mb")
        limits: dict[str, Limits] = dict.fromkeys(least, (1, None))
        limits |= dict.fromkeys(("workers", "weight_decay", "penalty", "hints"), (0, None))
        check_fields(self, {**limits, "cache_limit_gb": (1e-9, None), "seed": SEEDS, "lr": (None, MOST_RATE)})
        objective = OBJECTIVES[self.objective]
        if objective.closed_form and self.start != self.objective:
            raise ValueError(
                f"objective {self.objective!r} is that start alone; it needs start={self.objective!r}, and got "
                f"{self.start!r}."
            )
        if self.match not in objective.units:
            fit = ", ".join(n for n in fitting_objectives() if self.match in OBJECTIVES[n].units)
            raise ValueError(f"match {self.match!r} goes with objective {fit} only, not with {self.objective!r}.")
        self._check_depths(objective)
        if self.augment and (self.cache is not None or objective.closed_form):
            what = "needs objective ffm or lfm" if objective.closed_form else "uses no cached targets: leave out cache"
            raise ValueError(f"augment shows another view of each picture in every epoch, and {what}.")
        for name in ("cache", "deepspeed"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is ''; expected a path, or none at all.")

    def _check_depths(self, objective: Objective) -> None:
        """What needs a tail that is run, or steps at all."""
        asked = {"hints": self.hints, "beyond": self.beyond, "tune.tails": self.tune.tails != "none"}
        if objective.closed_form:
            asked["tune.trunk"] = self.tune.trunk != "none"
        through = not objective.closed_form and objective.depth(0, 2) > 0
        if not through and (names := [name for name, value in asked.items() if value]):
            raise ValueError(
                f"{', '.join(names)} {'need' if names[1:] else 'needs'} an objective that "
                f"{'is trained' if objective.closed_form else 'compares features behind the tail'}, such as ffm; got "
                f"{self.objective!r}."
            )

    @classmethod
    def of(cls, config: FitConfig | Mapping[str, Any] | None, changes: Mapping[str, Any]) -> FitConfig:
        """A config from one, or from a mapping of its fields, with some fields changed, and of ``tune`` those given.

        Raises:
            ValueError: neither of these.
            TypeError: a field that there is not; says what was probably meant.
        """
        if isinstance(config, Mapping):
            changes, config = {**mapping(config, "config"), **changes}, None
        if config is not None and not isinstance(config, FitConfig):
            raise ValueError(f"config is {shown(config)}; expected a FitConfig, or its fields: FitConfig(epochs=2).")
        known_options(changes, [f.name for f in fields(cls)], "fit_stitches")
        config = config or cls()
        if isinstance(tune := changes.get("tune"), Mapping):
            known_options(mapping(tune, "tune"), [f.name for f in fields(TuneConfig)], "tune")
            nothing = {tune.get(part, getattr(config.tune, part)) for part in ("trunk", "tails")} == {"none"}
            changes = {**changes, "tune": replace(TuneConfig() if nothing else config.tune, **tune)}
        return replace(config, **changes)


@dataclass(frozen=True)
class FitResult:
    """What a fit did.

    Attributes:
        reports: one for every stitch, on held-out pictures.
        explained: by ``branch@split``, the share of the seam's variance that the closed-form start explains.
        history: rows of ``step``, ``lr`` and the mean loss by ``branch@split`` since the last row, with their ``mean``;
            where the trunk is held to its own features, that loss as ``own`` besides.
        skipped: reason by name of every picture that could not be read.
        steps, pictures: optimisation steps; readable pictures were drawn from so many.
        seconds: by phase, of the main process; of a resumed fit with those of the calls before it.
        cache_bytes: size of the target cache on disk when it is full; 0 without one.
        own: of a tree whose trunk is tuned and keeps its own features, their agreement with the published trunk's, on
            the held-out pictures.
    """

    reports: list[StitchReport]
    explained: dict[str, float | None]
    history: list[dict[str, float]]
    skipped: dict[str, str]
    steps: int
    pictures: int
    seconds: dict[str, float]
    cache_bytes: int = 0
    own: Agreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict, ``own`` left out where there is none."""
        return {name: value for name, value in asdict(self).items() if name != "own" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitResult:
        """Inverse of :meth:`to_dict`."""
        reports = [
            StitchReport(**{**r, "seam": Agreement(**r["seam"]), "final": Agreement(**r["final"])})
            for r in values["reports"]
        ]
        own = values.get("own")
        return cls(**{**values, "reports": reports, "own": None if own is None else Agreement(**own)})


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak rate at ``step`` of ``steps``: linear warm-up over a share of them, then a cosine to zero."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return (step + 1) / ramp
    return 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))
