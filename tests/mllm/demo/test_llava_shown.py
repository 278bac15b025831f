"""Finished runs over language models whose results are not as they were written are named, whoever reads them."""

import json

import pytest
import torch

from llava_integration.demo.job import _precision
from llava_integration.evaluate.lmms.commands import evaluate
from llava_integration.evaluate.sweep import RowConfig, sweep
from vst.fit.precision import has_bf16

ROWS = {"a": RowConfig("one", "a-{seed}"), "b": RowConfig("full", "b-{seed}")}
BAD = [
    "", "[]", "{", '{"config": {}}', '{"results": []}', '{"results": {}}', '{"results": {"towers": [{}], "tasks": 3}}',
]  # fmt: skip
COMMANDS = {"sweep": lambda out: sweep(out, ROWS, resume=True), "evaluate": lambda out: evaluate("model", out)}


def finished(monkeypatch, module, folder, text):
    """A run folder that is taken as the command's own, with these results."""
    monkeypatch.setattr(f"{module}.Run._check_same_config", lambda self: None)
    folder.mkdir()
    for name, told in (("run.json", "{}"), ("environment.json", "{}"), ("results.json", text)):
        (folder / name).write_text(told)


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_results_that_are_not_as_they_were_written(tmp_path, monkeypatch, command, text):
    module = "llava_integration.evaluate.sweep" if command == "sweep" else "llava_integration.evaluate.lmms.commands"
    out = tmp_path / "out"
    finished(monkeypatch, module, out, text)
    said = r"^\S+results\.json is (no valid JSON|not what .* writes) \(.*\); restore it, or move it away"
    with pytest.raises(ValueError, match=said) as e:
        COMMANDS[command](str(out))
    assert "\n" not in str(e.value)
    assert (out / "results.json").read_text() == text


@pytest.mark.parametrize("text", ["[]", "3", '{"precision": null}'])
def test_a_config_that_is_none_does_not_end_the_choice_of_a_precision(tmp_path, text):
    """What is wrong with it is told where it is compared."""
    (tmp_path / "run.json").write_text(text)
    device = torch.device("cpu")
    assert _precision("auto", tmp_path, device) == ("bf16" if has_bf16(device) else "fp32")
    (tmp_path / "run.json").write_text(json.dumps({"precision": "fp32"}))
    assert _precision("auto", tmp_path, device) == "fp32"
