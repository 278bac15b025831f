"""tools/gpu.py: options, steps that fail, hang or are stopped, what a second call does, what lands in the results."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SAYS = """
import json, sys
from pathlib import Path
out, scratch = map(Path, sys.argv[1:])
def say(said, outcome="running"):
    (scratch / "said.json").write_text(json.dumps({"outcome": outcome, "said": said}))
(out / "ran").write_text("x" + ((out / "ran").read_text() if (out / "ran").exists() else ""))
"""
FAKE = {
    "good": SAYS + "say('all is well', 'finished')",
    "bad": SAYS + "print('a cry'); say('half of it'); sys.exit(3)",
    "mute": "raise SystemExit(5)",
    "slow": SAYS + "import subprocess, time; say('three of nine')\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "(scratch / 'child').write_text(str(child.pid)); time.sleep(600)",
    "lacking": SAYS + "say('no weights here', 'skipped')",
}


def loaded():
    spec = importlib.util.spec_from_file_location("gpu_tool", ROOT / "tools" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = loaded()
    monkeypatch.setattr(module, "LIMITS", {**dict.fromkeys(FAKE, 60), "slow": 4})
    monkeypatch.setattr(module, "GRACE", 2)
    monkeypatch.setattr(
        module, "command", lambda step, out, scratch, dry: [sys.executable, "-c", FAKE[step], str(out), str(scratch)]
    )
    return module


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def gone(pid):
    """Whether a process is over; one that nobody waited for counts as that."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_fails_or_hangs_stops_no_other(tool, tmp_path, capsys):
    assert tool.main(["--dry-run", "--out", str(tmp_path), "--steps", "bad,slow,mute,lacking,good"]) == 1
    told = summary(tmp_path)
    assert told["dry_run"] is True
    assert list(told["steps"]) == ["bad", "slow", "mute", "lacking", "good"]
    assert {step: (row["outcome"], row["said"]) for step, row in told["steps"].items()} == {
        "bad": ("failed", "half of it"),
        "slow": ("timed out", "three of nine"),
        "mute": ("failed", "it ended with status 5"),
        "lacking": ("skipped", "no weights here"),
        "good": ("finished", "all is well"),
    }
    assert told["steps"]["slow"]["seconds"] >= 4
    assert gone(int((tmp_path / "work" / "slow" / "child").read_text()))
    assert "a cry" in (tmp_path / "work" / "logs" / "bad.log").read_text()
    said = capsys.readouterr().out
    assert all(f" {word} " in said for word in ("failed", "timed out", "skipped", "finished"))
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["versions"]["torch"] == importlib.metadata.version("torch")
    assert (environment["gpu"] is None) == (not torch.cuda.is_available())


def test_what_is_finished_is_left_out_until_it_is_asked_for_again(tool, tmp_path, capsys):
    call = ["--dry-run", "--out", str(tmp_path), "--steps", "good,lacking"]
    for _ in range(2):
        assert tool.main(call) == 0
    assert "good is finished; --again runs it anew." in capsys.readouterr().out
    assert (tmp_path / "good" / "ran").read_text() == "x"
    assert (tmp_path / "lacking" / "ran").read_text() == "xx"  # what had nothing to do is asked again
    assert tool.main([*call, "--again"]) == 0
    assert (tmp_path / "lacking" / "ran").read_text() == "x"  # from the start
    assert tool.main(["--dry-run", "--out", str(tmp_path), "--steps", "bad"]) == 1
    assert set(summary(tmp_path)["steps"]) == {"good", "lacking", "bad"}


def test_a_folder_of_another_device_is_refused(tool, tmp_path):
    call = ["--dry-run", "--out", str(tmp_path), "--steps", "good"]
    assert tool.main(call) == 0
    for change in ({"device": "Some GPU"}, {"dry_run": False}):
        kept = summary(tmp_path)
        (tmp_path / "summary.json").write_text(json.dumps({**kept, **change}))
        with pytest.raises(SystemExit, match=r"summary\.json is of .*: give another folder \(--out\)"):
            tool.main(call)
        (tmp_path / "summary.json").write_text(json.dumps(kept))
    assert (tmp_path / "good" / "ran").read_text() == "x"


def test_options(tool, capsys):
    for words, sentence in (
        (["--steps", "tests"], "--steps names 'tests'; expected some of good, bad"),
        (["--steps", ","], "--steps names 'none'; expected some of"),
        (["--limit", "good"], "--limit is 'good'; expected STEP=SECONDS, such as tests=180"),
        (["--limit", "good=0"], "--limit is 'good=0'"),
        (["--limit", "good=soon"], "--limit is 'good=soon'"),
        (["--device", "tpu"], "Unrecognized arguments"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            tool.main(words)
    given = tool._read(["--limit", "good=7", "--limit", "slow=1.5", "--steps", "slow,good,slow"])
    assert given.limits == {**tool.LIMITS, "good": 7, "slow": 1.5}
    assert given.steps == ["slow", "good"]
    assert tool.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    with pytest.raises(SystemExit) as ended:
        tool.main(["--help"])
    assert ended.value.code == 0
    assert "goes on" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_without_a_gpu_one_sentence(tool, tmp_path):
    with pytest.raises(SystemExit, match=r"No CUDA device was found: .* --dry-run \(make gpu DRY=1\)\."):
        tool.main(["--out", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_leaves_the_summary(tmp_path, number):
    code = (
        "import signal, sys, importlib.util as u\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what shells start behind & ignores it
        f"spec = u.spec_from_file_location('gpu_tool', {str(ROOT / 'tools' / 'gpu.py')!r})\n"
        "tool = u.module_from_spec(spec); spec.loader.exec_module(tool)\n"
        f"tool.LIMITS = {{'slow': 60, 'good': 60}}; tool.GRACE = 2; fake = {FAKE['slow']!r}\n"
        "tool.command = lambda step, out, scratch, dry: [sys.executable, '-c', fake, str(out), str(scratch)]\n"
        f"tool.main(['--dry-run', '--out', {str(tmp_path)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = tmp_path / "work" / "slow" / "child"
    until = time.monotonic() + 120
    while not (child.is_file() and child.read_text()):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -number
    assert f"Stopped by {signal.Signals(number).name}. The same call goes on from what was saved." in said
    assert summary(tmp_path)["steps"] == {"slow": {"outcome": "stopped", "limit_s": 60, "said": ""}}
    assert gone(int(child.read_text()))


def test_two_at_once_are_refused(tool, tmp_path):
    holder = (
        "import sys\nfrom vst.results.locks import hold\nhold(sys.argv[1])\nprint('held', flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / "work")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(SystemExit, match=r"^FolderInUse: "):
            tool.main(["--dry-run", "--out", str(tmp_path), "--steps", "good"])
    finally:
        process.communicate("")


class TestSteps:
    """The real steps, each in a process of its own as the tool starts it."""

    @pytest.fixture(autouse=True)
    def _paths(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def test_tests_are_counted_as_they_come(self, tmp_path):
        """Also a file that cannot be read, and none but the marked ones."""
        (tmp_path / "tests").mkdir()
        (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['cuda: x']\ntimeout = 5\n")
        (tmp_path / "tests" / "test_some.py").write_text(
            "import pytest\npytestmark = pytest.mark.cuda\ndef test_one(): pass\n"
            "def test_two():\n    from pathlib import Path\n    assert False, f'wrong in {Path(__file__).parent}'\n"
            "@pytest.mark.skip(reason='not here')\ndef test_three(): pass\n"
        )
        (tmp_path / "tests" / "test_unreadable.py").write_text("import nothing_of_that_name  # cuda\n")
        (tmp_path / "tests" / "test_other.py").write_text("def test_four(): assert False\n")
        code = (
            "import sys\nfrom pathlib import Path\nfrom gpu_steps import tests, work\nroot = Path(sys.argv[1])\n"
            "tests.ROOT = work.ROOT = root\ntests.run(work.Work(root / 'out', root / 'scratch', True))"
        )
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        assert "Incomplete: 1 passed, 1 failed, 1 skipped, 1 files could not be read" in done.stderr, done.stdout
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
        assert [Path(name).name for name in found["files that could not be read"]] == ["test_unreadable.py"]
        failed = found["tests"]["tests/test_some.py::test_two"]
        assert failed["said"].startswith("AssertionError: wrong in ./tests")
        (tmp_path / "tests" / "test_unreadable.py").unlink()
        told = (tmp_path / "tests" / "test_some.py").read_text()
        # What passed is not run again: it would fail now. What failed is, and what was skipped.
        mended = told.replace("def test_one(): pass", "def test_one(): assert False")
        mended = mended.replace("assert False, f'wrong in {Path(__file__).parent}'", "pass")
        for text, wanted in (
            (mended, {"passed": 2, "skipped": 1}),
            (mended.partition("@pytest.mark.skip")[0], {"passed": 2}),  # nothing is left to run
        ):
            (tmp_path / "tests" / "test_some.py").write_text(text)
            done = subprocess.run(
                [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120,
                env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr
            assert json.loads((tmp_path / "out" / "results.json").read_text())["counts"] == wanted

    def test_throughput_in_miniature(self, tmp_path, monkeypatch):
        from gpu_steps import throughput
        from gpu_steps.work import Work

        monkeypatch.setattr(Work, "device", "cpu")
        work = Work(tmp_path / "out", tmp_path / "scratch", True)
        said = throughput.run(work)
        fits = json.loads((work.out / "results.json").read_text())["results"]
        first = fits["fits"][0]["fit"]["rows"][0]
        assert first["tflops_per_s"] == pytest.approx(first["gflops"] / first["median_ms"])
        assert first["mfu"] == pytest.approx(
            first["tflops_per_s"] / json.loads((work.out / "rows" / "kept.json").read_text())["row"]["matmul_tflops"]
        )
        fastest = max(row["fit"]["rows"][0]["pictures_per_s"] for row in fits["fits"])
        assert fits["cores_that_feed_it"] == fastest / fits["reading"][-1]["pictures_per_s_per_worker"]
        assert said.endswith("cores feed it")
        assert throughput.run(work) == said  # nothing is measured twice
        for path in work.out.rglob("*.*"):
            assert not any(place in path.read_text() for place in (str(ROOT), str(tmp_path))), path

    def test_a_cell_that_fails_costs_no_other_and_is_tried_again(self, tmp_path, monkeypatch):
        from gpu_steps import latency
        from gpu_steps.work import Incomplete, Work

        own, tried = latency.measure_tree, []

        def broken(*args, execution, **options):
            tried.append(execution)
            if execution == "streams" and len(tried) < 6:
                raise torch.OutOfMemoryError(f"no memory in {tmp_path}")
            return own(*args, execution=execution, **options)

        monkeypatch.setattr(latency, "measure_tree", broken)
        monkeypatch.setattr(Work, "device", "cpu")
        work = Work(tmp_path / "out", tmp_path / "scratch", True)
        with pytest.raises(Incomplete, match=r"3 of 5 measured; .*pair-16tokens-batch1-streams: OutOfMemoryError: no"):
            latency.run(work)
        results = json.loads((work.out / "results.json").read_text())["results"]
        assert len(results["cells"]) == 3
        assert set(results["failed"]) == {"pair-16tokens-batch1-streams", "pair-16tokens-batch2-streams"}
        assert str(tmp_path) not in json.dumps(results)
        assert latency.run(work).startswith("5 of 5 measured")
        results = json.loads((work.out / "results.json").read_text())["results"]
        best, rows = max(results["matmul_tflops"]), [row for cell in results["cells"] for row in cell["towers"]]
        assert len(results["matmul_tflops"]) == 4  # before and after, in both calls
        assert {"VST-6", "VST-14", "VST-22", "all in full"} <= {row["name"] for row in rows}
        for row in rows:
            assert row["tflops_per_s"] == pytest.approx(row["gflops"] * row["images_per_s"] / 1e3)
            assert row["mfu"] == pytest.approx(row["tflops_per_s"] / best)
        assert tried[5:] == ["streams", "streams"]  # what was measured is not measured again

    def test_goals(self):
        """By numbers that can be worked out by hand: each goal once reached and once missed."""
        from gpu_steps.goals import judged, lines

        def cell(tree, tokens, batch, execution, **rows):
            full = {"name": "all in full", "ratio": 1.0, "flops_ratio": 1.0}
            named = [{"name": name.replace("_", "-"), **row} for name, row in rows.items()]
            return {"tree": tree, "tokens": tokens, "batch": batch, "execution": execution, "towers": [full, *named]}

        over = cell("pair", 256, 32, "eager", VST_6={"ratio": 0.9, "flops_ratio": 0.874}, VST_14={"ratio": 0.72,
            "flops_ratio": 0.7}, dinov2={"ratio": 2.0, "flops_ratio": 0.5})  # fmt: skip
        fast = cell("four", 256, 32, "graphs", VST_14={"ratio": 0.44, "flops_ratio": 0.55})
        fast["towers"].append({"name": "all in full, graphs", "ratio": 0.75, "flops_ratio": 1.0})  # 0.44 / 0.75 / 0.55
        large = [cell("pair", 576, 128, way, VST_14={"mfu": mfu}) for way, mfu in (("eager", 0.4), ("compile", 0.6))]
        # 1200 GFLOP at 60 % of 800 TFLOP/s take 2.5 ms
        single = [
            cell("pair", 576, 1, way, VST_14={"gflops": 1200.0, "median_ms": ms})
            for way, ms in (("eager", 1.0), ("graphs", 3.0), ("compiled-graphs", 4.0))
        ]
        four = [cell("four", 256, 1, "graphs", VST_14={"trunk_ratio": ratio}) for ratio in (1.2, 1.4)]
        goals = judged([over, fast, *large, *single, *four], 800.0)
        assert [round(goal["found"], 4) for goal in goals] == [*(0.0297, 0.0286, 0.0667, 0.4, 0.6, 1.2, 1.6, 1.2, 1.4)]
        assert [goal["reached"] for goal in goals] == [True, True, False, False, True, True, False, True, False]
        assert lines(goals)[4] == [
            "MFU of VST-14: pair, 576 tokens, batch 128, compile",
            "0.600",
            "at least 0.55",
            "yes",
        ]
        assert judged([cell("pair", 16, 1, "eager", VST_14={"gflops": 1.0, "median_ms": 1.0})], 1.0) == []

    def test_the_telling_cells_come_first(self):
        from gpu_steps.latency import Cell, cells

        found = cells(False, "cuda")
        assert len(found) == len(set(found)) == 2 * 2 * 4 * 4
        assert set(found[:8]) == {
            Cell("pair", grid, batch, way) for grid in (16, 24) for batch in (1, 32) for way in ("eager", "graphs")
        }

    def test_options_without_the_command_lines_parser(self):
        from gpu_steps.evidence import demo_config, protocol_config, recipes_config
        from gpu_steps.options import made, options

        from vst import cli
        from vst.demo.config import DemoConfig
        from vst.parsing import parse

        for name, kind, ours in (
            ("demo/evidence.yaml", "demo", made(DemoConfig, options("demo/evidence.yaml", "demo"))),
            ("demo/recipes.yaml", "demo", made(DemoConfig, options("demo/recipes.yaml", "demo"))),
            ("stitch/protocol-gpu.yaml", "protocol", protocol_config(False)),
        ):
            parsed = parse(cli.COMMANDS, [kind, "--config", str(ROOT / "configs" / name)]).as_dict()
            assert parsed[kind][kind] == ours
        assert demo_config(False).grid == protocol_config(False).grid == 14
        assert demo_config(True).grid == recipes_config(True).grid == protocol_config(True).grid == 4
        full = recipes_config(False)
        assert (full.grid, full.pictures, full.objectives[-1]) == (14, 2400, "both")
        assert full.fit_of("both", 1).tune.trunk == "lora"
        with pytest.raises(ValueError, match="DemoConfig has no option 'splitz'; its options: trunk, splits"):
            made(DemoConfig, {"splitz": [1]})

    def test_assets_that_are_missing_skip_a_step(self, tmp_path, monkeypatch):
        from gpu_steps import evidence, mllm
        from gpu_steps.work import Skipped, Work

        monkeypatch.setenv("VST_HOME", str(tmp_path / "nothing"))
        for step in (evidence, mllm):
            with pytest.raises(Skipped, match=r"assets are not there .*clip-vit-base-patch16"):
                step.run(Work(tmp_path / "out", tmp_path / "scratch", True))
        assert not (tmp_path / "nothing").exists()

    def test_only_what_can_be_published_is_kept(self, tmp_path):
        from gpu_steps.work import keep

        run = tmp_path / "scratch" / "runs" / "demo"
        (run / "rows").mkdir(parents=True)
        (run / "tree").mkdir()
        (run / "rows" / "one.json").write_text(json.dumps({"image": str(Path.home() / "pictures" / "1.png")}))
        (run / "rows" / ".half.json").write_text("{")
        (run / "curve.png").write_bytes(b"\x89PNG")
        for name in ("tree/model.safetensors", "index.html"):
            (run / name).write_text("large")
        keep(tmp_path / "scratch", tmp_path / "out")
        kept = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
        assert kept == {"demo/rows/one.json", "demo/curve.png"}
        assert json.loads((tmp_path / "out" / "demo" / "rows" / "one.json").read_text()) == {
            "image": "~/pictures/1.png"
        }
