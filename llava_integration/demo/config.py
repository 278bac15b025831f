"""What the demo runs: the options of ``python -m llava_integration demo``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vst.demo.config import partner
from vst.fit.config import FitConfig
from vst.models.fields import Limits, check_fields, one_of
from vst.results.later import later
from vst.tree.stitches import DEFAULT_STITCH, StitchSpec


@dataclass(frozen=True)
class LlavaDemoConfig:
    """What the demo runs.

    Attributes:
        trunk: clip or dinov2: the model that sees the pixels; the other one is the branch.
        splits: trunk depths, of 12, that the tree holds; training draws one for each step.
        grid: patches a side.
        fit_pictures, fit: of the stitches.
        stitch: family, or ``{family: mlp_skip, reads: 2}``.
        seeds: of data, projector and order; the first one's model is what is left.
        fixed: depths that models of their own are trained at, to compare the random one with.
        easy_vqa, scenes: training pictures of each kind, with all their questions.
        start: of the projector, random or ridge (closed form, from captions).
        pretrain_steps, finetune_steps: of stage 1 (the projector, on captions) and of stage 2 (projector and language
            model, on captions and questions together: the answers of one word alone teach a small model to guess).
        pretrain_lr, finetune_lr, projector_lr: learning rates, the last the projector's in stage 2. A small model in a
            few minutes wants a larger one than LLaVA-1.5's, and a projector that starts from the closed form smaller
            ones: 1e-3 wipes its start out within ten steps.
        batch_size: conversations a step.
        precision: of the language model's training and answers: bf16 (autocast), fp32, or auto: bf16 where the device
            has arithmetic for it.
        questions: of each test set.
        depth_questions: of each test set, at every depth.
        split: depth of the scores that are shown first; default: the shallowest.
    """

    trunk: str = "clip"
    splits: list[int] = field(default_factory=lambda: [2, 6, 10])
    grid: int = 8
    fit_pictures: int = 400
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=2, save_every=10))
    seeds: list[int] = field(default_factory=lambda: [0])
    fixed: list[int] = field(default_factory=list)
    easy_vqa: int = 1000
    scenes: int = 2000
    start: str = "ridge"
    pretrain_steps: int = 20
    finetune_steps: int = 300
    pretrain_lr: float = 1e-4
    finetune_lr: float = 3e-4
    projector_lr: float = 5e-5
    batch_size: int = 4
    precision: str = "auto"
    questions: int = 500
    depth_questions: int = 200
    split: int | None = None
    stitch: str | dict[str, Any] = later(DEFAULT_STITCH)  # noqa: RUF009 (a field)

    def __post_init__(self) -> None:
        partner(self.trunk)
        StitchSpec.parse(self.stitch)
        one_of(self.start, "start", ("random", "ridge"))
        one_of(self.precision, "precision", ("auto", "bf16", "fp32"))
        limits: dict[str, Limits] = dict.fromkeys(("pretrain_lr", "finetune_lr", "projector_lr"), (1e-12, 1.0))
        counts = ("easy_vqa", "scenes", "pretrain_steps", "finetune_steps", "depth_questions")
        limits |= dict.fromkeys(counts, (0, None))
        limits |= dict.fromkeys(("batch_size", "fit_pictures", "questions"), (1, None))
        limits |= dict.fromkeys(("splits", "fixed", "split"), (1, 12))
        check_fields(self, limits | {"grid": (1, 64)})
        for name in ("splits", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} are {values}; expected one or more, each once.")

    @property
    def branch(self) -> str:
        """The model that is not the trunk."""
        return partner(self.trunk)
