"""Every field of every config that users write refuses what is no value of its type, in one sentence that names it."""

import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from llava_integration.demo.config import LlavaDemoConfig
from llava_integration.train.config import TuneConfig
from llava_integration.train.data import DataConfig
from llava_integration.train.model import ModelConfig
from vst.demo.config import DemoConfig
from vst.fit.config import FitConfig
from vst.measure.benchmark import BenchmarkConfig
from vst.protocol.config import ProtocolConfig, TaskConfig, TrainConfig
from vst.tree.options import TreeArgs
from vst.trunk.compare import TrunkConfig

NAN, INFINITE = float("nan"), float("inf")
NEVER = {
    int: [1.5, NAN, INFINITE, True, "x", b"x", [], {}, object()],
    float: [NAN, INFINITE, -INFINITE, True, "x", b"x", [], {}, object()],
    bool: [0, 1, "no", "true", NAN, [], {}],
    str: [0, True, 1.5, b"x", [], {}, object()],
    list: [0, "", b"x", {}, NAN, [object()], [NAN], [b"x"]],
    dict: [0, "x", [], NAN, {1: "x"}],
}
NEEDED: dict[type, dict[str, Any]] = {
    DataConfig: {"files": ["a.json"]},
    ModelConfig: {"llm": "x", "tower": "y"},
    TaskConfig: {"source": "emoji"},
    TreeArgs: {"trunk": "clip-b-224", "branches": ["dinov2-b"], "splits": [6]},
    ProtocolConfig: {
        "models": {"a": "clip-b-224", "b": "dinov2-b"},
        "directions": ["a>b"],
        "depths": [2],
        "objectives": ["ridge"],
        "tasks": {"t": TaskConfig("emoji-categories")},
    },
}
PLAIN = [LlavaDemoConfig, TuneConfig, DemoConfig, FitConfig, BenchmarkConfig, TrainConfig, TrunkConfig]
# Values of several forms (depths alone or as text, models by name or spec), and a list that branches give its length.
SEVERAL = {(TreeArgs, name) for name in ("trunk", "branches", "splits", "enters", "image_size", "stitch")}
SEVERAL |= {(TreeArgs, "fusion_weights")}


def kinds(hint):
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for part in get_args(hint) for kind in kinds(part)]
    return [get_origin(hint) or hint]


def fields():
    for config in [*PLAIN, *NEEDED]:
        hints = get_type_hints(config)
        for field in dataclasses.fields(config):
            allowed = [kind for kind in kinds(hints[field.name]) if kind is not type(None)]
            if len(allowed) == 1 and (config, field.name) not in SEVERAL:
                yield pytest.param(config, field.name, allowed[0], id=f"{config.__name__}.{field.name}")


@pytest.mark.parametrize(("config", "name", "kind"), fields())
def test_a_field_refuses_what_is_no_value_of_its_type(config, name, kind):
    needed = NEEDED.get(config, {})
    make = (lambda **given: TreeArgs(**given).plan()) if config is TreeArgs else config  # before anything is fetched
    if config is not TreeArgs:
        make(**needed)
    for odd in NEVER.get(kind, [0, "x", [], NAN]):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the name is looked for below)
            make(**{**needed, name: odd})
        said = str(error.value)
        assert name in said, said
        assert "\n" not in said
        assert said.endswith("."), said
