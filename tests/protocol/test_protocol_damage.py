"""Files of a protocol's run that were cut, emptied, filled with something else, edited or removed change no number."""

import os
import shutil
from dataclasses import replace

import pytest
from protocol_kit import plain

from vst.protocol import run_protocol
from vst.protocol.features import Counts

pytest_plugins = ("protocol_kit",)


def half(file):
    os.truncate(file, file.stat().st_size // 2)


def emptied(file):
    os.truncate(file, 0)


def noise(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 64
    file.write_bytes(data)


def removed(file):
    file.unlink()


@pytest.mark.parametrize("damage", [half, emptied, noise, flipped, removed])
@pytest.mark.parametrize(
    "kinds", [("features/*/rows.f16", "heads/*"), ("features/*/sums.u64", "stages/*", "predictions/*")]
)
@pytest.mark.filterwarnings("ignore:The cache", "ignore:.*does not hold what was written", "ignore:.*is damaged")
def test_a_grid_that_grows_on_damaged_files_is_the_undamaged_one(config, tmp_path, damage, kinds):
    few, more = replace(config, objectives=["ridge"]), replace(config, objectives=["ridge", "ridge+ffm"])
    run_protocol(tmp_path / "run", few, show=False)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for kind in kinds:
        files = sorted((tmp_path / "run").glob(kind))
        assert files
        for file in files:
            damage(file)
    found, whole = (run_protocol(tmp_path / name, more, show=False)["rows"] for name in ("run", "whole"))
    assert plain(found) == plain(whole)


def test_damage_is_named(config, tmp_path):
    few, more = replace(config, objectives=["ridge"]), replace(config, objectives=["ridge", "ridge+ffm"])
    run_protocol(tmp_path / "run", few, show=False)
    for file in (tmp_path / "run" / "stages").iterdir():
        half(file)
    with pytest.warns(UserWarning, match=r"stages/.*,ridge,seed0\.safetensors is damaged .*: what it held is computed"):
        run_protocol(tmp_path / "run", more, show=False)


@pytest.mark.parametrize("damage", [half, emptied, noise])
def test_a_damaged_row_is_named_with_what_to_do(config, tmp_path, damage):
    config = replace(config, objectives=["ridge"])
    whole = run_protocol(tmp_path / "run", config, show=False)
    rows = tmp_path / "run" / "rows"
    file = next(rows.glob("*a-into-b*"))
    damage(file)
    with pytest.raises(
        ValueError, match=r"a-into-b,mlp_skip,.*json .*: restore it, or delete it to have it made again"
    ) as raised:
        run_protocol(tmp_path / "run", config, show=False)
    assert str(raised.value).count(". ") == 0
    file.unlink()
    again = run_protocol(tmp_path / "run", config, show=False)
    key = lambda row: (row["kind"], row.get("source", ""), row.get("model", ""))  # noqa: E731
    assert sorted(plain(again["rows"]), key=key) == sorted(plain(whole["rows"]), key=key)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"clip": "many"}', '{"clip": null}'])
def test_counts_that_are_none_are_named(tmp_path, text):
    path = tmp_path / "pushed.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"pushed\.json .*move it away, and pictures are counted from now on\.$"):
        Counts(path)
    path.write_text('{"clip": 3}')
    counts = Counts(path)
    counts.push("clip", 2)
    assert Counts(path).pushed == {"clip": 5}
