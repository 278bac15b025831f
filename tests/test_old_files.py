"""Files, command lines and imports of 0.1.0 before its modules went into packages; see tests/old/README.md."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands_kit import parsed_config, parsed_line
from PIL import Image
from protocol_kit import colours
from safetensors.torch import load_file

from vst import FitConfig, VSTConfig, VSTEncoder, cli, fit_stitches
from vst.protocol import ProtocolConfig, TaskConfig, TrainConfig, run_protocol
from vst.protocol.features import Models
from vst.results.folders import read_json

ROOT = Path(__file__).parents[1]
OLD = ROOT / "tests" / "old"
VST = [
    "BranchConfig", "Features", "FitConfig", "FitResult", "StitchReport", "VFM", "VFMSpec", "VSTConfig", "VSTEncoder",
    "evaluate_stitches", "fit_stitches", "load_vfm",
]  # fmt: skip
LLAVA = [
    "VSTImageProcessor", "VSTLlavaConfig", "VSTLlavaForConditionalGeneration", "VSTVisionConfig", "VSTVisionModel",
    "image_tokens", "install", "make_processor", "uninstall",
]  # fmt: skip
SCRIPTS = {"fit", "inspect", "latency", "throughput", "trunk", "recommend", "protocol", "demo"}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old files as the working folder: their sources are paths relative to it."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder, ignore=shutil.ignore_patterns("configs"))
    monkeypatch.chdir(folder)
    return folder


def pictures():
    return [Image.open(path) for path in sorted(Path("pictures").glob("*.png"))]


def stitches(folder):
    return load_file(Path(folder) / "stitches" / "stitches.safetensors")


@pytest.mark.parametrize("name", ["tree", "stitches"])
def test_a_saved_tree_gives_its_old_tokens(old, name):
    """Two branches, an mlp_skip and a lora: whole, and its stitches alone beside the models that they were made on."""
    tree, want = VSTEncoder.from_pretrained(name), load_file("tokens.safetensors")
    assert {b.stitch.family for b in tree.config.branches} == {"mlp_skip", "lora"}
    pixels = torch.stack([tree.transform()(picture) for picture in pictures()[:2]])
    torch.testing.assert_close(pixels, want["pixels"])
    for split in (1, 2):
        torch.testing.assert_close(tree(want["pixels"], split=split).detach(), want[f"{split}.fused"])
        for branch, tokens in tree.branch_tokens(want["pixels"], split).items():
            torch.testing.assert_close(tokens.detach(), want[f"{split}.{branch}"])


def test_an_old_tree_is_inspected_and_timed(old, capsys):
    cli.main(["inspect", "tree"])
    out = capsys.readouterr().out
    assert all(part in out for part in ("grid 2 x 2", "4 tokens of width 28", "VST-2 (default)", "all in full", "lora"))
    cli.main(["latency", "--path", "tree", "--repeats", "1"])
    assert "dinov2 alone" in capsys.readouterr().out


def fit_again(folder):
    """Resume a fit of the settings that its run folder tells."""
    facts = read_json(Path(folder) / "run.json")
    tree = VSTEncoder.from_config(VSTConfig.from_dict(facts["tree"]))
    return fit_stitches(
        tree, pictures(), FitConfig(**facts["fit"]), folder=folder, resume=True, show_progress=False
    ), tree


def test_a_finished_fit_is_recalled(old):
    before = stitches("fit-finished")
    result, tree = fit_again("fit-finished")
    assert json.loads(json.dumps(result.to_dict())) == read_json("fit-finished/results.json")["results"]
    state = tree.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_a_stopped_fit_goes_on_to_the_uninterrupted_one(old):
    assert list(Path("fit-stopped/state").iterdir())
    result, _ = fit_again("fit-stopped")
    want, got = stitches("fit-finished"), stitches("fit-stopped")
    assert want.keys() == got.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4)  # another machine's arithmetic
    whole = read_json("fit-finished/results.json")["results"]
    assert "calibration" not in result.seconds  # nothing of what the state holds was done again
    assert result.explained == whole["explained"]
    for row, expected in zip(result.history, whole["history"], strict=True):
        assert row == pytest.approx(expected, rel=1e-3)
    for report, expected in zip(result.to_dict()["reports"], whole["reports"], strict=True):
        for place in ("seam", "final"):
            assert report[place] == pytest.approx(expected[place], rel=1e-3)
    assert not Path("fit-stopped/state").exists()


def grid(objectives):
    """The protocol of the old run folder, as its files tell it."""
    axes, settings = read_json("protocol/axes.json"), read_json("protocol/run.json")
    tasks = {name: TaskConfig(**task) for name, task in axes["tasks"].items()}
    settings = {**settings, "train": TrainConfig(**settings["train"])}
    return ProtocolConfig(
        axes["models"], ["a>b", "b>b"], tasks, [1], objectives=objectives, cka_depths=[1, 3], **settings
    )


def test_a_protocol_is_recalled_and_grows(old, monkeypatch):
    for part, count in (("train", 6), ("test", 3)):
        colours(Path("colours") / part, count)
    before = {path.name: path.read_bytes() for path in Path("protocol/rows").iterdir()}
    rows = read_json("protocol/results.json")["results"]["rows"]
    with monkeypatch.context() as frozen:
        frozen.setattr(Models, "__getitem__", lambda self, name: pytest.fail(f"model {name!r} was run"))
        again = run_protocol("protocol", grid(["ridge", "ffm", "ffm+tlt"]), show=False)
    assert json.loads(json.dumps(again["rows"])) == rows
    assert {path.name: path.read_bytes() for path in Path("protocol/rows").iterdir()} == before
    assert Path("protocol/index.html").exists()
    more = run_protocol("protocol", grid(["ridge", "ffm", "ffm+tlt", "lfm"]), show=False)["rows"]
    assert {row["objective"] for row in more if row["kind"] == "stitched"} == {"ridge", "ffm", "ffm+tlt", "lfm"}
    kept = {name: (Path("protocol/rows") / name).read_bytes() for name in before}
    assert kept == before
    assert len(more) == len(rows) + 2


def test_an_old_demo_recommends_what_it_did(old, capsys):
    cli.main(["recommend", "--results", "demo", "--budget", "1.1x", "--task", "scenes"])
    out = capsys.readouterr().out
    assert out.startswith("split 10\n")
    assert "VST-10 takes 1.04x and scores 37.6 % +- 1.0." in out
    assert "Beyond the budget, VST-2 scores 39.5 % +- 1.2: 1.21x." in out


@pytest.mark.parametrize("file", sorted((OLD / "configs").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_old_configs_parse(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parsed_config(file, OLD / "configs")


@pytest.mark.parametrize("line", (OLD / "commands.txt").read_text().splitlines())
def test_old_command_lines_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parsed_line(line)


def test_old_names_are_importable():
    import llava_integration
    import vst

    assert set(VST) <= set(vst.__all__)
    assert all(callable(getattr(vst, name)) for name in VST)
    assert set(LLAVA) <= set(llava_integration.__all__)
    assert all(callable(getattr(llava_integration, name)) for name in LLAVA)
    import llava_integration.lmms

    assert llava_integration.lmms.evaluate is llava_integration.evaluate.lmms.evaluate


def test_old_scripts_find_their_commands(capsys, monkeypatch):
    """``from vst.cli import command, fit`` and ``command(fit)``, as scripts of one's own say it."""
    for name in sorted(SCRIPTS):
        space = {}
        exec(f"from vst.cli import command, {name} as chosen", space)
        monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
        with pytest.raises(SystemExit) as stop:
            space["command"](space["chosen"])
        assert stop.value.code == 0
        assert "--config" in capsys.readouterr().out
