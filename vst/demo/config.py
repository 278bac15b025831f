"""What the demo runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vst.fit.config import FitConfig
from vst.fit.objectives import OBJECTIVES, fitting_objectives
from vst.fit.tuning import TuneConfig
from vst.models.fields import SEEDS, check_fields, name, shown
from vst.results.later import later
from vst.tree.stitches import StitchSpec

MODELS = {"clip": "CLIP-B/16", "dinov2": "DINOv2-S (saliency)"}
"""The demo's two encoders, as they are called in tables and pictures."""

TUNED = TuneConfig(trunk="lora", tails="lora")
"""What the demo tunes beside its stitches."""

OWN = ("pictures", "stitch")
"""What a recipe says beside fields of the fit."""


def partner(trunk: str) -> str:
    """The branch beside a trunk.

    Raises:
        ValueError: the trunk is none of the demo's encoders.
    """
    if not isinstance(trunk, str) or trunk not in MODELS:
        raise ValueError(f"trunk is {trunk!r}; expected {' or '.join(MODELS)}.")
    return next(model for model in MODELS if model != trunk)


def _repeated(values: Sequence[Any]) -> bool:
    return len(set(values)) < len(values)


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs.

    Attributes:
        trunk: clip or dinov2: the model that sees the pixels; the other one is the branch.
        splits: trunk depths, of 12.
        grid: patches a side of every model.
        stitch: family, or ``{family: ..., option: ...}``.
        objectives: what stitches are fitted to, by the name of an objective or of one of ``recipes``; the last one's
            tree is kept and shown first.
        seeds: of the division into training and test emoji, of the scenes, and of the fit.
        pictures: training pictures for the stitches, half scenes and half single emoji.
        probe_train, probe_test: pictures of each task's probe.
        heldout: test pictures for the stitches' errors, half scenes and half single emoji.
        fit: how stitches are fitted; objective and seed come from above, a closed form takes no steps, and lfm runs
            no tails. Default: in mixed units, four passes, with a tuned trunk and tails: what docs/recipe.md judges.
        recipes: by a name of yours, the fields of fit that are otherwise, ``{tuned: {tune: {trunk: lora}}}``; trees of
            a recipe stand in the tables beside the others, and its tuned trunk without a branch. ``pictures`` among
            them says how many of each kind the recipe sees, ``{pictures: {scenes: 300}}``; all without it. ``stitch``
            is the family of its own, or a mapping with options, ``{stitch: {family: mlp_skip, reads: 2}}``.
        batch_size, repeats: of the latency measurement.
    """

    trunk: str = "clip"
    splits: list[int] = field(default_factory=lambda: [2, 4, 6, 8, 10])
    grid: int = 8
    stitch: str | dict[str, Any] = "mlp_skip"
    objectives: list[str] = field(default_factory=lambda: ["ridge", "ffm"])
    seeds: list[int] = field(default_factory=lambda: [0])
    pictures: int = 256
    probe_train: int = 200
    probe_test: int = 200
    heldout: int = 64
    fit: FitConfig = field(default_factory=lambda: FitConfig(match="mix", epochs=4, save_every=10, tune=TUNED))
    batch_size: int = 8
    repeats: int = 15
    recipes: dict[str, dict[str, Any]] = later(dict)  # noqa: RUF009 (a field)

    def __post_init__(self) -> None:
        partner(self.trunk)
        check_fields(self, {"splits": (1, 12), "grid": (1, 64), "batch_size": (1, None), "seeds": SEEDS})
        known = [*fitting_objectives(), *self.recipes]
        if not set(self.objectives) <= set(known) or not self.objectives or _repeated(self.objectives):
            raise ValueError(
                f"objectives are {self.objectives}; expected one or more of {', '.join(known)}, each once."
            )
        for recipe, changes in self.recipes.items():
            name(recipe, "A recipe's name")
            if recipe in (*fitting_objectives(), "models") or "seed" in changes:
                raise ValueError(
                    f"Recipe {recipe!r} needs a name that is no objective's (nor 'models'), and no seed of its own."
                )
            self._check_pictures(recipe, changes.get("pictures", {}))
        for objective in {*self.objectives, *self.recipes}:
            self.fit_of(objective, 0)
            self.stitch_of(objective)
        for part in ("splits", "seeds"):
            values = getattr(self, part)
            if not values or _repeated(values):
                raise ValueError(f"{part} are {values}; expected one or more, each once.")
        self.stitch_of(None)
        # A probe needs several classes to learn from, of 20.
        for part, least in (("pictures", 10), ("probe_train", 40), ("probe_test", 8), ("heldout", 2), ("repeats", 1)):
            if getattr(self, part) < least:
                raise ValueError(f"{part} is {getattr(self, part)}; expected at least {least}.")
        if self.heldout > 2 * self.probe_test:
            raise ValueError(f"heldout is {self.heldout}; expected at most {2 * self.probe_test}, twice probe_test.")

    def _check_pictures(self, recipe: str, given: Any) -> None:
        there = self.kinds
        right = isinstance(given, Mapping) and set(given) <= set(there)
        right = right and all(type(n) is int and 0 <= n <= there[kind] for kind, n in given.items())
        if not right or (given and not any(given.values())):
            most = " and ".join(f"up to {count} {kind}" for kind, count in there.items())
            raise ValueError(
                f"Recipe {recipe!r} has pictures {shown(given)}; expected {most}, as {{scenes: 40}}: more of them with "
                "a larger 'pictures' of the demo."
            )

    @property
    def kinds(self) -> dict[str, int]:
        """Training pictures for the stitches by kind: ``scenes`` and ``singles``."""
        return {"scenes": self.pictures - self.pictures // 2, "singles": self.pictures // 2}

    def stitch_of(self, recipe: str | None) -> StitchSpec:
        """The stitches of one of ``objectives``; of None, those of all that have none of their own."""
        return StitchSpec.parse(self.recipes.get(recipe or "", {}).get("stitch", self.stitch))

    def pictures_of(self, recipe: str) -> dict[str, int]:
        """Pictures by kind that one of ``objectives`` is fitted to: the first so many of those drawn."""
        given = self.recipes.get(recipe, {}).get("pictures")
        return self.kinds if not given else {kind: given.get(kind, 0) for kind in self.kinds}

    def fit_of(self, recipe: str, seed: int) -> FitConfig:
        """How stitches are fitted for one of ``objectives``, by a seed.

        Raises:
            ValueError, TypeError: a recipe that is none.
        """
        changes: dict[str, Any] = {"seed": seed}
        if recipe in self.recipes:
            changes |= {k: v for k, v in self.recipes[recipe].items() if k not in OWN}
            return FitConfig.of(self.fit, changes)
        objective = OBJECTIVES[recipe]
        match = self.fit.match if self.fit.match in objective.units else "channel"
        changes |= {"objective": recipe, "match": match}
        if objective.closed_form:  # it takes no steps in which anything else could be trained
            changes |= {"start": recipe, "tune": TuneConfig(), "hints": 0, "beyond": False, "augment": False}
        elif objective.depth(0, 2) == 0:  # no tail is run
            trunk = self.fit.tune.trunk != "none"
            if any(o in self.recipes or OBJECTIVES[o].depth(0, 2) > 0 for o in self.objectives):
                changes |= {"hints": 0, "beyond": False}  # of the others
            changes["tune"] = replace(self.fit.tune, tails="none") if trunk else TuneConfig()
        return replace(self.fit, **changes)

    @property
    def branch(self) -> str:
        """The model that is not the trunk."""
        return partner(self.trunk)
