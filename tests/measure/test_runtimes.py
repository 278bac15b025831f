"""One split of a tree in every way that a machine can run it: rows, tokens, what is left out, runs that go on."""

import json
import sys

import pytest
import torch

from vst import cli
from vst.measure import runtimes
from vst.measure.benchmark import RoundsConfig
from vst.measure.execution import runner
from vst.measure.runtimes import compare_runtimes, measure_runtimes
from vst.measure.tables import runtimes_notes, runtimes_rows, timings_markdown


@pytest.fixture
def tree(tree_of):
    """Whose stitches are not plain: folding changes their weights."""
    tree = tree_of("dinov2", "clip", splits=(1, 3), stitch="mlp").eval()
    for stitch in tree.stitches().values():
        for name, buffer in stitch.named_buffers():
            buffer.copy_(torch.rand(buffer.shape) + 0.5 * name.endswith("std"))
    return tree


@pytest.fixture
def quick(monkeypatch):
    """Without what has to be compiled or exported."""
    monkeypatch.setattr(runtimes, "ways", lambda device: ["eager", "folded"])


def test_ways_of_a_device():
    assert runtimes.ways("cpu") == ["eager", "folded", "compile", "onnxruntime"]
    assert runtimes.ways("cuda:1") == ["eager", "folded", "graphs", "compile", "compiled-graphs"]


def test_every_way_gives_the_same_tokens(tree, device):
    if device == "cpu":
        pytest.importorskip("onnxruntime")
    before = {name: x.clone() for name, x in tree.state_dict().items()}
    found = measure_runtimes(
        tree, 1, batch_size=3, dtypes=["float32", "bfloat16"], repeats=2, device=device, show_progress=False
    )
    rows = {(r["way"], r["dtype"]): r for r in found["rows"]}
    assert found["left_out"] == {}
    there = runtimes.ways(device)
    assert list(rows) == [(way, "float32") for way in there] + [(way, "bfloat16") for way in there if "onnx" not in way]
    for (way, dtype), row in rows.items():
        assert row["images_per_s"] == pytest.approx(3e3 / row["median_ms"])
        assert row["prepare_s"] > 0
        assert row["difference"] < (1e-4 if dtype == "float32" else 0.1)
        assert (row["difference"] == 0) == ((way, dtype) == ("eager", "float32"))
    assert rows["eager", "float32"]["ratio"] == 1
    assert all(torch.equal(x, before[name]) and x.dtype == before[name].dtype for name, x in tree.state_dict().items())


def test_other_tokens_are_told(tree, quick, monkeypatch):
    def off(tower, execution):
        call = runner(tower, execution)
        return (lambda x: 1.5 * call(x)) if tower.stitches()["clip", 1].patches.folded else call

    monkeypatch.setattr(runtimes, "runner", off)
    rows = measure_runtimes(tree, 1, repeats=1, device="cpu", show_progress=False)["rows"]
    assert [r["difference"] for r in rows] == [0, pytest.approx(0.5, abs=1e-4)]


def test_what_a_machine_lacks_is_left_out_with_its_reason(tree, monkeypatch):
    monkeypatch.setattr(runtimes, "ways", lambda device: ["eager", "compile", "onnxruntime"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    def no_compiler(tower, execution):
        if execution == "compile":
            raise RuntimeError("no C++ compiler\nwas found at '/usr/local/bin/g++'")
        return runner(tower, execution)

    monkeypatch.setattr(runtimes, "runner", no_compiler)
    found = measure_runtimes(tree, 3, repeats=1, device="cpu", show_progress=False)
    assert [r["way"] for r in found["rows"]] == ["eager"]
    assert found["left_out"]["compile, float32"] == "RuntimeError: no C++ compiler was found at '.../g++'"
    assert "onnxruntime" in found["left_out"]["onnxruntime, float32"]
    assert runtimes_notes(found).startswith("left out: compile, float32 (RuntimeError: no C++ compiler was found at")


def test_runs_are_kept_and_go_on(tree, quick, tmp_path, monkeypatch):
    config, folder = RoundsConfig([1, 2], repeats=1, device="cpu"), tmp_path / "run"
    own, measured = runtimes.measure_runtimes, []

    def stops(*args, batch_size, **options):
        measured.append(batch_size)
        if measured == [1, 2]:
            raise KeyboardInterrupt
        return own(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(runtimes, "measure_runtimes", stops)
    with pytest.raises(KeyboardInterrupt):
        compare_runtimes(tree, config, 1, folder, show_progress=False)
    found = compare_runtimes(tree, config, 1, folder, resume=True, show_progress=False)
    assert measured == [1, 2, 2]
    kept = json.loads((folder / "results.json").read_text())["results"]
    assert kept == {"runtimes": found}
    assert [one["batch_size"] for one in found] == [1, 2]
    heads, cells = runtimes_rows(found[1])
    assert heads[3] == "time / eager float32 (95 %)"
    assert all(len(line) == len(heads) for line in cells)
    assert timings_markdown(kept).count("| folded | float32 |") == 2
    with pytest.raises(FileExistsError):
        compare_runtimes(tree, config, 1, folder, show_progress=False)
    with pytest.raises(ValueError, match=r"at\.clip"):
        compare_runtimes(tree, config, 3, folder, resume=True, show_progress=False)


def test_bad_options(tree):
    for options, words in (
        ({"dtypes": ["int8"]}, "dtype is 'int8'; expected float32"),
        ({"repeats": 0}, "at least"),
        ({"batch_size": 0}, "batch_sizes"),
    ):
        with pytest.raises(ValueError, match=words):
            measure_runtimes(tree, 1, device="cpu", show_progress=False, **options)
    with pytest.raises(ValueError, match="resume and overwrite need a run folder"):
        compare_runtimes(tree, RoundsConfig(device="cpu"), resume=True)
    with pytest.raises(ValueError, match="7"):
        measure_runtimes(tree, 7, device="cpu", show_progress=False)


def test_the_command(tree, quick, tmp_path, capsys):
    tree.save_pretrained(tmp_path / "tree")
    cli.main(["runtimes", "--path", str(tmp_path / "tree"), "--split", "3", "--repeats", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "One call at split 3, interleaved: batch 1, cpu" in said
    assert "folded" in said
    cli.main(["runtimes", "--path", str(tmp_path / "tree"), "--batch_size", "[2]", "--repeats", "1", "--device", "cpu"])
    assert f"One call at split {tree.split}, interleaved: batch 2, cpu" in capsys.readouterr().out
