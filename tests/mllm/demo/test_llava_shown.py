"""Finished runs over language models whose results are not as they were written are named, whoever reads them."""

import pytest

from llava_integration.demo import job
from llava_integration.demo.config import LlavaDemoConfig
from llava_integration.evaluate.lmms.commands import evaluate
from llava_integration.evaluate.sweep import RowConfig, sweep
from vst.results.folders import read_json

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


class Begun(Exception):
    pass


@pytest.mark.parametrize("text", ["[]", "3", "{"])
def test_a_demo_whose_config_is_damaged_can_be_started_again(tmp_path, monkeypatch, text):
    monkeypatch.setattr(job, "_Job", lambda *_: (_ for _ in ()).throw(Begun))
    with pytest.raises(Begun):
        job.run_demo(tmp_path, LlavaDemoConfig())
    before = (tmp_path / "run.json").read_text()
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json .*; restore it, start the run again \(overwrite\), or give"):
        job.run_demo(tmp_path, LlavaDemoConfig())
    with pytest.raises(Begun):
        job.run_demo(tmp_path, LlavaDemoConfig(), resume=False, overwrite=True)
    assert (tmp_path / "run.json").read_text() == before


@pytest.mark.parametrize("here", [True, False])
def test_a_demo_goes_on_in_the_precision_it_began_with(tmp_path, monkeypatch, here):
    """Whatever device it goes on on; a new one, and one that is started again, takes what the device has."""
    taken = []

    def begin(run, config, device):
        taken.append((config.precision, read_json(run.path("run.json"))["precision"]))
        raise Begun

    def runs(has, **options):
        monkeypatch.setattr(job, "has_bf16", lambda device: has)
        with pytest.raises(Begun):
            job.run_demo(tmp_path, LlavaDemoConfig(**options.pop("config", {})), **options)
        (precision, written) = taken.pop()
        assert precision == written
        return precision

    own, other = ("bf16", "fp32") if here else ("fp32", "bf16")
    monkeypatch.setattr(job, "_Job", begin)
    assert runs(here) == own
    assert runs(not here) == own
    assert runs(not here, config={"precision": own}) == own
    with pytest.raises(ValueError, match=rf'differs in precision \("{own}" in the run, "{other}" now\)'):
        job.run_demo(tmp_path, LlavaDemoConfig(precision=other))
    assert runs(not here, resume=False, overwrite=True) == other
