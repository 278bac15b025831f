"""Measurements, comparisons of trunks and commands refuse what they cannot do in one sentence that names it."""

from pathlib import Path

import pytest
from messages_kit import INF, NAN, refused

from vst import cli
from vst.measure.benchmark import BenchmarkConfig, benchmark
from vst.measure.cost import activation_bytes, extra_blocks, fit_flops, full_cost, tree_cost
from vst.measure.execution import runner
from vst.measure.latency import measure_tree
from vst.measure.recommend import measured_rows, recommend
from vst.measure.throughput import measure_fit
from vst.protocol.grid import run_protocol
from vst.trunk.compare import TrunkConfig, compare_trunks

pytest_plugins = ("messages_kit",)


def test_measurements(saved, tmp_path):
    tree, config = saved[0], saved[0].config
    for call in (measure_tree, measure_fit):
        name = call.__name__
        for given in (None, "folder", config):
            refused(lambda call=call, given=given: call(given), name, "VSTEncoder")
        for value in (0, -1, NAN, INF, True, 10**30, "2", None, 1.5):
            refused(lambda call=call, value=value: call(tree, batch_size=value, repeats=1), "batch_size")
        for value in (0, -1, NAN, INF, True, "2", None, 1.5):
            refused(
                lambda call=call, value=value: call(tree, repeats=value, batch_size=1, show_progress=False), "repeats"
            )
        for device in ("tpu", "cuda:99", 99, None, 3.5, True, ""):
            refused(lambda call=call, device=device: call(tree, device=device), "device", "auto, cpu")
    refused(lambda: measure_tree(tree, dtype="int8"), "dtype", "int8")
    refused(lambda: runner("tree"), "tower", "'tree'")
    for option in ({"bf16": "no"}, {"checkpointing": 1}, {"cache": 3}, {"cache": ""}, {"objective": "x"}):
        refused(lambda option=option: measure_fit(tree, **option), *option)
    for value in (None, 3, {}, BenchmarkConfig):
        refused(lambda value=value: benchmark(tree, value), "config", "BenchmarkConfig")
    refused(lambda: benchmark(tree, BenchmarkConfig(device="cuda:99")), "device", "cuda:99")
    for flag in ("resume", "overwrite"):
        refused(lambda flag=flag: benchmark(tree, BenchmarkConfig(), **{flag: True}), flag, "run folder")
        refused(lambda flag=flag: benchmark(tree, BenchmarkConfig(), tmp_path / "x", **{flag: "no"}), f"{flag} is 'no'")
    for cost in (tree_cost, full_cost, fit_flops, extra_blocks, activation_bytes):
        refused(lambda cost=cost: cost(tree), "config", "VSTConfig")
    assert fit_flops(config, 2) == fit_flops(config, [2.0]) == fit_flops(config, [2])
    for split in (True, "x", 9, [[1]], []):
        refused(lambda split=split: fit_flops(config, split))
    for value in (None, 3, {}, "protocol.yaml"):
        refused(lambda value=value: run_protocol(tmp_path / "y", value), "config", "ProtocolConfig")
    rows = [{"name": "a", "kind": "split", "split": 1, "median_ms": 9.0, "ratio": 0.5}]
    for value in (0, -1, NAN, INF, True, "300", [1]):
        refused(lambda value=value: recommend(rows, latency_ms=value), "latency_ms")
    for value in (None, "runs/demo", 3):
        refused(lambda value=value: recommend(value, budget="2x"), "rows")
        if not isinstance(value, str):
            refused(lambda value=value: measured_rows(value), "folder")


def test_trunks_to_compare(tiny, pictures):
    models = [tiny("dinov2"), tiny("clip", 48)]
    config = TrunkConfig(splits=[1], repeats=0, pictures=8, heldout=4)

    def compared(models=models, config=config, **options):
        return compare_trunks(models, pictures[:16], config, show_progress=False, **options)["rows"]

    paths = [Path(source.partition(":")[2]) for source in models]
    assert [r["errors"] for r in compared(paths)] == [r["errors"] for r in compared()]
    for wrong in (None, 3, "clip", models[:1], [3, 4], iter(models)):
        refused(lambda wrong=wrong: compared(wrong))
    for wrong in (3, "x", {"splits": [1]}):
        refused(lambda wrong=wrong: compared(config=wrong), "config", "TrunkConfig")
    for device in ("tpu", "cuda:99", 99, None):
        refused(lambda device=device: compared(device=device), "device")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["latency", "--resume"], "need a run folder"),
        (["latency", "--overwrite"], "need a run folder"),
        (["latency", "--device", "cuda:99"], "cuda:99"),
        (["throughput", "--overwrite"], "needs a run folder"),
        (["throughput", "--pictures", "0"], "pictures is 0"),
        (["trunk", "--overwrite", "--images", "x"], "needs a run folder"),
        (["trunk", "--images", ""], "'', but"),
        (["trunk", "--compare.stitch", "xyz", "--images", "x"], "xyz"),
        (["recommend", "--results", "x", "--latency_ms", ".nan"], "x holds no results.json"),
    ],
)
def test_options_of_commands_that_would_do_nothing(saved, tiny, monkeypatch, tmp_path, words, told):
    monkeypatch.chdir(tmp_path)
    more = ["--path", str(saved[1])] if words[0] in ("latency", "throughput") else []
    more = ["--models", f"[{tiny('dinov2')},{tiny('clip', 48)}]"] if words[0] == "trunk" else more
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, *more])
    assert told in str(stop.value)
    assert "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["{class_path: os.system, init_args: {command: ls}}", "{a: 1}", "text", "[x]"])
def test_values_of_another_type_are_one_sentence_on_the_command_line(tmp_path, capsys, value):
    (tmp_path / "x.yaml").write_text(f"batch_size: {value}")
    with pytest.raises(SystemExit):
        cli.main(["latency", "--path", "nowhere", "--config", str(tmp_path / "x.yaml")])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: batch_size is ")
    assert "expected int, list[int]" in last


OWN = """
from vst.tree.stitches.base import register
from vst.tree.stitches.mapped import Linear


@register
class Own(Linear):
    family = "own_for_test"
"""


@pytest.mark.parametrize("how", ["own_for_test_module", "own_for_test_module.py", "yaml"])
def test_a_stitch_family_of_ones_own_from_the_command_line(tree_of, tmp_path, monkeypatch, capsys, how):
    import sys

    from vst.tree.stitches import STITCHES

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_for_test_module.py").write_text(OWN)
    try:
        exec(OWN, {"__name__": "own"})
        tree_of("dinov2", "clip", splits=[1, 2], stitch="own_for_test").save_pretrained(tmp_path / "tree")
        del STITCHES["own_for_test"]
        with pytest.raises(SystemExit, match="import the module that registers it"):
            cli.main(["inspect", "tree"])
        (tmp_path / "x.yaml").write_text("import: own_for_test_module")
        cli.main(["inspect", "tree", *(["--config", "x.yaml"] if how == "yaml" else ["--import", how])])
        assert "own_for_test" in capsys.readouterr().out
    finally:
        STITCHES.pop("own_for_test", None)
        sys.modules.pop("own_for_test_module", None)
