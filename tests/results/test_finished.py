"""Files of runs that are read again and are not as they were written: one sentence, and nothing is lost."""

import json

import pytest

from vst.results.finished import as_written, read_results
from vst.results.folders import Run, read_json


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"config": {}}', "[" * 100_000])
def test_results_that_are_none(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"results\.json is (no valid JSON|nested too deeply|not what a sweep writes).*move it away"
    ) as e:
        read_results(path, "a sweep")
    assert "\n" not in str(e.value)
    path.write_text('{"results": {"a": 1}}')
    assert read_results(path, "a sweep") == {"a": 1}


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda r: r["towers"], "it lacks 'towers'"),
        (lambda r: 100 * r["score"] / 1, "unsupported operand"),
        (lambda r: r["rows"]["a"], "list indices"),
        (lambda r: next(x for x in r["rows"] if x), "a part of it is missing"),
        (lambda r: f"{r['name']:.1f}", "Unknown format code"),
    ],
)
def test_values_that_are_others(tmp_path, read, said):
    with (
        pytest.raises(ValueError, match=rf"^{tmp_path} is not what vst demo writes \(.*{said}.*\); restore"),
        as_written(tmp_path, "vst demo"),
    ):
        read({"score": None, "rows": [], "name": "a"})


@pytest.fixture
def run(tmp_path):
    """A run with one row, which no process holds."""
    run = Run(tmp_path / "run", {"a": 1})
    run.add({"score": 0.5}, "one")
    run.close()
    return run


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_a_damaged_environment_costs_no_run(run, text):
    run.path("environment.json").write_text(text)
    with pytest.warns(UserWarning, match=r"environment\.json is damaged .*written in its place"):
        again = Run(run.folder, {"a": 1}, resume=True)
    assert read_json(again.finish({"b": 2}))["environment"]["python"]
    assert again.rows() == [{"score": 0.5}]


@pytest.mark.parametrize("text", ["", "[]", '"x"', '{"a": 1'])
def test_a_damaged_config_is_named_and_nothing_is_lost(run, text):
    run.path("run.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"run\.json .*; restore it, start the run again \(overwrite\), or give another"
    ):
        Run(run.folder, {"a": 1}, resume=True)
    run.path("run.json").write_text('{"a": 1}')
    assert Run(run.folder, {"a": 1}, resume=True).rows() == [{"score": 0.5}]


@pytest.mark.parametrize("row", [[], None, "x", 3])
def test_a_row_that_is_no_object(run, row):
    run.path("rows/one.json").write_text(json.dumps({"ordinal": 0, "key": "one", "row": row}))
    with pytest.raises(ValueError, match=r"The row .*one\.json is damaged"):
        run.rows()
