"""A small protocol: two tiny models, pictures whose class is their colour."""

import json

import numpy as np
import pytest
from PIL import Image

from vst.protocol import ProtocolConfig, TaskConfig, TrainConfig

CLASSES = {"red": (220, 40, 30), "green": (30, 200, 60), "blue": (20, 60, 230)}
TRAIN = TrainConfig(
    rates=[1e-3, 3e-3], trial_steps=1, trial_pictures=4, lfm_epochs=1, ffm_epochs=1, tlt_epochs=1, head_epochs=3,
    batch_size=8, calibration=16, patience=2,
)  # fmt: skip


def colours(root, count):
    """Pictures whose class is their colour, with noise."""
    rng = np.random.default_rng(count)
    for name, colour in CLASSES.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.normal(0, 40, (20, 20, 3))
            image = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
            image.resize((56, 56)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    colours(root / "train", 10)
    colours(root / "test", 4)
    return {"train": str(root / "train"), "test": str(root / "test")}


@pytest.fixture
def config(tiny, data):
    models = {"a": tiny("dinov2"), "b": tiny("clip", 32, seed=1)}
    task = TaskConfig("folder", dict(data), validation=6)
    return ProtocolConfig(
        models, ["a>b", "b>b"], {"colours": task}, [2], grid=4, train=TRAIN, objectives=["ridge", "ffm", "ffm+tlt"]
    )


def plain(rows):
    """Rows without what differs from run to run."""
    text = json.dumps(rows)
    return json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k != "seconds"})
