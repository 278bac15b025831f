"""Numbers that are not finite are neither kept as a training's best nor scored."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vst.data.probes import LinearHead
from vst.protocol.config import TrainConfig
from vst.protocol.measures import _predict
from vst.protocol.training import LossNotFinite, Trainer

NAN = float("nan")


def trainer(bad, rates=(0.1,)):
    """Fits one number to 3; ``bad`` says of which calls the loss is not a number."""
    module, calls = nn.Linear(1, 1, bias=False), []

    def loss(rows):
        calls.append(1)
        return (module.weight - 3).square().sum() * (NAN if bad(len(calls)) else 1.0)

    config = TrainConfig(rates=list(rates), trial_steps=1, trial_pictures=4, batch_size=2, patience=9)
    return Trainer(module, loss, [0, 1, 2, 3], [4, 5], config, epochs=3, seed=0, title="a>b", show=False)


def test_a_start_that_is_not_finite_is_told():
    with pytest.raises(LossNotFinite, match="a>b: the loss is not finite before any step"):
        trainer(lambda call: call == 1).run()


def test_the_step_is_named():
    with pytest.raises(LossNotFinite, match=r"a>b: the loss is not finite in epoch 2, by step 4, at rate 0\.1"):
        trainer(lambda call: call == 6).run()  # start, two steps, validation, two steps


def test_a_sound_training_is_as_before():
    one = trainer(lambda call: False)
    facts = one.run()
    assert facts.best == 3
    assert len(facts.history) == 4


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
def test_scores_that_are_not_finite_are_not_scored(kind):
    head = LinearHead(kind, 8, 3)
    seeded = SimpleNamespace(
        name="colours", labels=lambda rows: torch.zeros(2, *((4, 4) if kind != "classification" else ())).long()
    )
    patches = torch.randn(2, 4, 8)
    assert _predict(seeded, head, patches, [0, 1]).shape[0] == 2
    patches[1, 2, 3] = NAN
    with pytest.raises(RuntimeError, match="colours: the head's scores on test pictures are not finite"):
        _predict(seeded, head, patches, [0, 1])
