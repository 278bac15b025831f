"""The command line as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands_kit import parsed_config

from vst import cli
from vst.parsing import parse, run

ROOT = Path(__file__).parents[1]


def test_inspect_prints_specs_grid_cost_and_memory(tree_of, tmp_path, capsys):
    tree = tree_of("dinov2", "clip", splits=[1, 3])
    cli.main(["inspect", str(tree.save_pretrained(tmp_path / "tree"))])
    out = capsys.readouterr().out
    for part in (
        "grid 4 x 4",
        "16 tokens of width 80",
        "VST-1",
        "VST-3 (default)",
        "all in full",
        "mlp_skip",
        "float16",
    ):
        assert part in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "no/where/at-all"], "neither a folder here nor a hub repository"),
        (["latency"], "Give either --path"),
        (["inspect", "x", "--dtype", "int3"], "dtype is 'int3'"),
        (["latency", "--path", "x", "--dtype", "int3"], "dtype is 'int3'"),
        (["latency", "--path", "x", "--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_errors_are_one_sentence(args, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert message in str(stop.value)
    assert "\n" not in str(stop.value)


def test_without_a_command_the_known_ones_are_told(capsys):
    with pytest.raises(SystemExit):
        cli.main([])
    assert "{fit,inspect,export,latency" in capsys.readouterr().err


def test_a_run_s_folder_names_the_tree_inside(tree_of, tmp_path):
    tree_of("dinov2", "clip").save_stitches(tmp_path / "stitches")
    with pytest.raises(SystemExit, match=r"has no config.json.*: take .*stitches, which the run there made"):
        cli.main(["inspect", str(tmp_path)])


def test_unknown_options_are_refused(capsys):
    whole = ["--tree.trunk", "a", "--tree.branches", "[b]", "--tree.splits", "[1]", "--images", "x", "--out", "y"]
    with pytest.raises(SystemExit):
        cli.main(["fit", *whole, "--fit.epoch", "3"])
    assert "epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        *("fit", "inspect", "export", "latency", "runtimes", "throughput", "trunk", "recommend", "protocol", "demo"),
        *("bundle", "unbundle"),
    ],
)
def test_help_teaches(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert getattr(cli, name).__doc__.split("\n")[0].split(",")[0][:40] in out.replace("\n", " ")
    assert "==SUPPRESS==" not in out


def test_fit_then_latency_then_inspect(tiny, picture_folder, tmp_path, capsys):
    config = {
        "tree": {"trunk": tiny("dinov2"), "branches": [tiny("clip", 48, seed=1)], "splits": [1, 3], "image_size": 56},
        "images": str(picture_folder),
        "out": str(tmp_path / "run"),
        "fit": {"epochs": 1},
    }
    (tmp_path / "fit.yaml").write_text(json.dumps(config))
    cli.main(["fit", "--config", str(tmp_path / "fit.yaml"), "--fit.lr", "0.01"])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["config"]["fit"]["lr"] == 0.01
    assert [r["split"] for r in results["results"]["reports"]] == [1, 3]
    assert "Stitches on held-out pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="overwrite"):
        cli.main(["fit", "--config", str(tmp_path / "fit.yaml")])
    cli.main(["fit", "--config", str(tmp_path / "fit.yaml"), "--fit.lr", "0.01", "--resume"])
    cli.main(["fit", "--config", str(tmp_path / "fit.yaml"), "--overwrite", "--save_tree", "true"])
    tree = str(tmp_path / "run" / "tree")
    cli.main(["latency", "--path", tree, "--repeats", "2", "--out", str(tmp_path / "latency")])
    rows = json.loads((tmp_path / "latency" / "results.json").read_text())["results"]
    assert {r["kind"] for r in rows} == {"full", "single", "split"}
    more = ["--path", tree, "--repeats", "1", "--batch_size", "[1,2]", "--dtype", "[float32,bfloat16]"]
    capsys.readouterr()
    cli.main(["latency", *more])
    assert capsys.readouterr().out.count("Latency of one call, interleaved") == 4


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_parses(file):
    """No typo in a shipped config: it parses as options of the command that it is for."""
    assert parsed_config(file, ROOT / "configs")


@pytest.mark.parametrize("script", sorted((ROOT / "train").glob("*.py")) + sorted((ROOT / "eval").glob("*.py")))
def test_scripts_show_help(script):
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
    if script.name in ("stitch.py", "mllm.py"):  # the commands that may go on with a run of DeepSpeed
        assert "resume only folders that you trust" in " ".join(done.stdout.split())


def test_pca_maps_share_directions():
    from vst.results.feature_maps import pca_maps

    rng = np.random.default_rng(0)
    own = rng.normal(size=(3, 16, 8))
    same, other = pca_maps([own, own.copy()])
    trunk = pca_maps([own, rng.normal(size=(3, 16, 5))])[1]
    assert np.array_equal(same, other)
    assert same.shape == (3, 4, 4, 3)
    assert trunk.shape == (3, 4, 4, 3)
    assert same.min() >= 0
    assert same.max() <= 1


def test_hyphens_and_underscores_are_one_in_options_and_stay_in_what_users_name():
    words = ["protocol", "--config", str(ROOT / "configs" / "stitch" / "protocol-short.yaml")]
    values = parse(cli.COMMANDS, [*words, "--protocol.models.clip-b", "demo:clip", "--overwrite"])["protocol"]
    assert values.protocol.models["clip-b"] == "demo:clip"
    assert values.overwrite is True
    tree = ["--tree.trunk", "x", "--tree.branches", "[y]", "--tree.splits", "[1]"]
    for switch in (["--save-tree", "false"], ["--no_save_tree"], ["--no-save-tree"], ["--save_tree=false"]):
        assert parse(cli.COMMANDS, ["fit", "--images", "i", "--out", "o", *tree, *switch])["fit"].save_tree is False


@pytest.mark.parametrize("shown", ["table", "line"])
def test_who_reads_may_leave_early(shown):
    """``| head`` ends a command without a word, whether it was still printing or had done so already."""
    code = """
from vst.parsing import run
from vst.results.tables import table

def show(what: str) -> None:
    if what == "table":
        table("t", ["a", "b"], [["x" * 90, i] for i in range(3000)])
    print("a line")

run([show])
"""
    words = [sys.executable, "-c", code, "show", "--what", shown]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()  # as a head that has enough
        assert process.stderr.read() == b""
    assert process.returncode in (1, 141)  # rich ends with the former


def test_a_pipe_that_broke_elsewhere_is_told():
    def broken() -> None:
        """Fail."""
        raise BrokenPipeError("a worker's")

    with pytest.raises(SystemExit, match="BrokenPipeError: a worker's"):
        run([broken], ["broken"])


BOMB = b"a: &a [x]\n" + b"".join(b"%c: &%c [%s]\n" % (c, c, b"*%c," % (c - 1) * 9) for c in range(98, 118))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"images: a\nimages: b\n", "says images twice"),
        (b"fit: {epochs: 1, epochs: 2}\n", "says epochs twice"),
        (BOMB, "aliases"),
        (b"a: &a [*a]\n", "of what it stands in"),
        (b"x: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"images: \xe9\n", "not in UTF-8"),
    ],
)
def test_a_file_of_options_that_says_more_than_one_thing_is_refused(tmp_path, text, message):
    (tmp_path / "options.yaml").write_bytes(text)
    for words in (["--config", str(tmp_path / "options.yaml")], [f"--config={tmp_path / 'options.yaml'}"]):
        with pytest.raises(SystemExit, match=message):
            cli.main(["fit", *words])


WARNS = """
import warnings
from vst.parsing import run

def warn(loud: bool = False) -> None:
    '''Warn.

    Args:
        loud: or not.
    '''
    warnings.warn("the sky falls", stacklevel=2)

run([warn], ["warn"])
"""


@pytest.mark.parametrize(("debug", "said"), [("", "Warning: the sky falls"), ("1", "UserWarning: the sky falls")])
def test_warnings_to_users_have_no_line_of_code(debug, said):
    call = [sys.executable, "-c", WARNS]
    found = subprocess.run(call, env={**os.environ, "VST_DEBUG": debug}, capture_output=True, text=True, check=True)
    assert said in found.stderr
    assert ("parsing.py" in found.stderr) == bool(debug)
