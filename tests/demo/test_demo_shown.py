"""A finished demo whose results are not as they were written is named, and none of its files are touched."""

import json
from pathlib import Path

import pytest

from vst.demo.config import DemoConfig
from vst.demo.job import run_demo
from vst.results.folders import Run

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "demo" / "results.json"


def edited(change):
    stored = json.loads(PUBLISHED.read_text())
    change(stored["results"])
    return json.dumps(stored)


BAD = {
    "empty": "",
    "cut": PUBLISHED.read_text()[:5000],
    "a list": "[]",
    "another command's": json.dumps({"results": [{"name": "VST-2", "kind": "split"}]}),
    "no towers": edited(lambda r: r.pop("towers")),
    "a score that is none": edited(lambda r: r["towers"][3]["tasks"]["scenes"].update({"0": "high"})),
    "a ratio that was not finite": edited(lambda r: r["towers"][3].update(ratio=None)),
    "a tower that is none": edited(lambda r: r["towers"].append(3)),
}


@pytest.mark.parametrize("kind", BAD)
def test_it_is_named_in_one_sentence(tmp_path, kind):
    config = DemoConfig()
    Run(tmp_path / "run", config).close()
    path = tmp_path / "run" / "results.json"
    path.write_text(BAD[kind])
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    said = r"results\.json is (no valid JSON|not what vst demo writes) \(.*\); restore it,"
    with pytest.raises(ValueError, match=said) as e:
        run_demo(tmp_path / "run", config)
    assert "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != ".lock"} == before


def test_whole_ones_are_shown(tmp_path, capsys):
    Run(tmp_path / "run", DemoConfig()).close()
    (tmp_path / "run" / "results.json").write_bytes(PUBLISHED.read_bytes())
    found = run_demo(tmp_path / "run", DemoConfig())
    assert found == json.loads(PUBLISHED.read_text())["results"]
    assert "VST-10" in capsys.readouterr().out
