"""Result folders, JSON and atomic writes."""

import dataclasses
import enum
import getpass
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch

from vst.results.folders import Run, atomic_path, environment, read_json, write_json
from vst.results.later import later_defaults
from vst.results.locks import LOCK


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# --- environment


def test_environment_states_versions_and_device():
    facts = environment("cpu")
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["versions"]["timm"] == importlib.metadata.version("timm")
    assert facts["torch_threads"] == torch.get_num_threads()
    assert facts["device"] == "cpu"
    assert facts["device_name"] == facts["cpu"] != ""
    assert facts["cuda"] == torch.version.cuda
    assert 1 <= facts["cpu_count"] <= os.cpu_count()
    written = datetime.fromisoformat(facts["time"])
    assert written.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=1)
    json.dumps(facts, allow_nan=False)


def test_environment_lists_only_what_is_installed(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = environment("cpu")["versions"]
    assert "timm" not in versions
    assert "torch" in versions


def test_environment_imports_none_of_the_packages():
    code = (
        "import sys, vst.results.folders; before = set(sys.modules); vst.results.folders.environment('cpu'); "
        "print([m for m in ('transformers', 'accelerate', 'datasets', 'deepspeed', 'sklearn', 'onnx') "
        "if m in set(sys.modules) - before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_environment_names_no_person_host_or_path():
    def texts(value):
        if isinstance(value, dict):
            for part in value.values():
                yield from texts(part)
        else:
            yield str(value)

    private = {socket.gethostname(), getpass.getuser(), str(Path.home()), sys.prefix, str(Path.cwd())}
    for text in texts(environment()):
        assert not any(len(name) > 1 and name in text for name in private), text
        assert "/" not in text.replace("N/A", ""), text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_environment_refuses_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="cuda"):
        environment("cuda")
    assert environment()["device"] == "cpu"


# --- JSON


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    where: Path


class Side(str, enum.Enum):
    LEFT = "left"


def test_write_json_turns_everything_into_plain_json(tmp_path):
    path = tmp_path / "new" / "values.json"
    write_json(
        path,
        {
            "z": float("nan"),
            "a": [float("inf"), -float("inf"), 1.5],
            "path": Path("some") / "where",
            "point": Point(2.0, Path("p")),
            "numpy": (np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan")),
            "array": np.arange(4).reshape(2, 2),
            "torch": [torch.tensor(7), torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor([1.0, float("nan")])],
            "kinds": [torch.bfloat16, torch.device("cpu"), Side.LEFT],
            3: "é",
            "surrogate": "\udc80",
            "nothing": None,
            "flag": True,
        },
    )
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    assert text.startswith('{\n  "z": null')  # order kept, two spaces
    assert "é" in text
    expected = {
        "z": None,
        "a": [None, None, 1.5],
        "path": os.path.join("some", "where"),
        "point": {"x": 2.0, "where": "p"},
        "numpy": [0.5, 3, True, None],
        "array": [[0, 1], [2, 3]],
        "torch": [7, 0.25, [1.0, None]],
        "kinds": ["torch.bfloat16", "cpu", "left"],
        "3": "é",
        "surrogate": "\udc80",
        "nothing": None,
        "flag": True,
    }
    assert json.loads(text) == expected
    assert read_json(path) == expected
    assert isinstance(read_json(path)["numpy"][2], bool)
    assert list(tmp_path.rglob("*.tmp*")) == []


def test_write_json_refuses_what_json_cannot_hold_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "values.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match=r"deep, 1.*object"):
        write_json(path, {"deep": [0, object()]})
    with pytest.raises(ValueError, match="two keys"):
        write_json(path, {1: "a", "1": "b"})
    assert contents(tmp_path) == {"values.json": b'{\n  "old": 1\n}\n'}


@pytest.mark.parametrize("damaged", [b"", b'{"a": 1', b"\xff\xfe\x00bad", b"not json"])
def test_read_json_of_a_damaged_file(tmp_path, damaged):
    path = tmp_path / "values.json"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"values\.json is no valid JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_read_json_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


# --- atomic_path


def test_atomic_path_replaces_only_at_the_end(tmp_path):
    path = tmp_path / "table.npz"
    path.write_bytes(b"old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary != path
        np.savez(temporary, a=np.arange(3))  # appends .npz to any name without it
        assert path.read_bytes() == b"old"
    with np.load(path) as table:
        assert table["a"].tolist() == [0, 1, 2]
    assert list(contents(tmp_path)) == ["table.npz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_crash_inside_atomic_path_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("half of")
        raise error
    assert contents(tmp_path) == {"a.txt": b"old"}


def test_a_killed_process_inside_atomic_path_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, sys; from vst.results.folders import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half of'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert path.read_text() == "old"


def test_atomic_path_to_which_nothing_was_written(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="Nothing was written"), atomic_path(path):
        pass
    assert path.read_text() == "old"


# --- Run

CONFIG = {"tree": {"depth": 4, "stitch": "linear"}, "lr": 1e-3, "splits": (2, 4)}


def test_a_new_run_and_its_result(tmp_path):
    run = Run(tmp_path / "runs" / "a", CONFIG)
    assert run.path("plot.png") == tmp_path / "runs" / "a" / "plot.png"
    assert read_json(run.path("run.json")) == {
        "tree": {"depth": 4, "stitch": "linear"},
        "lr": 1e-3,
        "splits": [2, 4],
    }
    assert read_json(run.path("environment.json"))["versions"]["torch"] == importlib.metadata.version("torch")
    run.finish({"accuracy": np.float32(0.5)})
    results = read_json(run.path("results.json"))
    assert list(results) == ["config", "environment", "results"]
    assert results["config"] == read_json(run.path("run.json"))
    assert results["environment"] == read_json(run.path("environment.json"))
    assert results["results"] == {"accuracy": 0.5}


def test_an_empty_folder_becomes_a_run_whatever_the_flags(tmp_path):
    for name, flags in (("a", {}), ("b", {"resume": True}), ("c", {"overwrite": True})):
        (tmp_path / name).mkdir()
        assert Run(tmp_path / name, CONFIG, **flags).rows() == []
        assert Run(tmp_path / f"{name}-missing", CONFIG, **flags).path("run.json").exists()


def test_a_start_that_was_killed_before_the_config_can_be_repeated(tmp_path):
    write_json(tmp_path / "environment.json", {"python": "0"})
    Run(tmp_path, CONFIG)
    assert read_json(tmp_path / "environment.json")["python"] != "0"


def test_rows_keep_the_order_of_adding_across_a_resume(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    for key in ("z", "m", "a"):
        assert not run.has(key)
        run.add({"key": key, "error": float("nan")}, key)
        assert run.has(key)
    later = Run(tmp_path / "run", dict(CONFIG), resume=True)
    assert later.has("m")
    later.add({"key": "b", "error": 1}, "b")
    later.add({"key": "m", "error": 2}, "m")
    rows = Run(tmp_path / "run", CONFIG, resume=True).rows()
    assert [row["key"] for row in rows] == ["z", "m", "a", "b"]
    assert [row["error"] for row in rows] == [None, 2, None, 1]
    assert run.rows() == rows


def test_more_rows_than_one_digit_stay_in_order(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    for number in range(12):
        run.add({"n": number}, f"split={number}")
    assert [row["n"] for row in run.rows()] == list(range(12))


def test_a_row_that_was_half_written_does_not_count(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    run.add({"n": 0}, "a")
    (tmp_path / "run" / "rows" / ".b.0123abcd.tmp.json").write_text('{"ordinal": 1, "ke')
    assert run.rows() == [{"n": 0}]
    assert not run.has("b")


@pytest.mark.parametrize("key", ["", ".", "..", "../up", "a/b", ".hidden", "a b", "a\n", "x" * 201])
def test_a_key_that_is_no_file_name(tmp_path, key):
    run = Run(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="key"):
        run.add({}, key)
    with pytest.raises(ValueError, match="key"):
        run.has(key)


def test_an_existing_run_needs_a_flag(tmp_path):
    Run(tmp_path / "run", CONFIG).add({"n": 0}, "a")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"resume.*overwrite"):
        Run(tmp_path / "run", CONFIG)
    with pytest.raises(ValueError, match="one"):
        Run(tmp_path / "run", CONFIG, resume=True, overwrite=True)
    assert contents(tmp_path) == before


def test_resume_with_another_config_lists_what_differs(tmp_path):
    Run(tmp_path / "run", {"tree": {"depth": 4, "stitch": "linear"}, "lr": 1.0, "old": None, "nan": float("nan")})
    before = contents(tmp_path)
    changed = {"tree": {"depth": 8, "stitch": "linear"}, "lr": 1, "new": "x", "nan": float("nan")}
    with pytest.raises(ValueError, match=r"tree\.depth \(4 in the run, 8 now\)") as caught:
        Run(tmp_path / "run", changed, resume=True)
    message = str(caught.value)
    assert "old (null in the run, not set now)" in message
    assert 'new (not set in the run, "x" now)' in message
    assert "stitch" not in message
    assert "lr" not in message
    assert "nan" not in message
    assert contents(tmp_path) == before


def test_a_folder_from_before_a_field_stands_for_its_default(tmp_path):
    """Of demos too, whose runs hold a fit's options."""
    from llava_integration.demo.config import LlavaDemoConfig
    from vst.demo.config import DemoConfig
    from vst.fit.config import FitConfig

    for i, config in enumerate((DemoConfig(fit=FitConfig()), LlavaDemoConfig())):
        folder = tmp_path / str(i)
        Run(folder, config).close()
        told = json.loads((folder / "run.json").read_text())
        for name in ("tune", "hints", "beyond", "augment", "picture_mb"):
            del told["fit"][name]
        told.pop("recipes", None)
        (folder / "run.json").write_text(json.dumps(told))
        Run(folder, config, resume=True).close()
        for changed in ({"hints": 1}, {"tune": {"tails": "norms"}}):
            with pytest.raises(ValueError, match=r"differs in fit\.(hints|tune\.tails)"):
                Run(folder, dataclasses.replace(config, fit=dataclasses.replace(config.fit, **changed)), resume=True)
        (folder / "run.json").write_text(json.dumps({**told, "fit": {**told["fit"], "hints": 2}}))
        with pytest.raises(ValueError, match=r"differs in fit\.hints \(2 in the run, 0 now\)"):
            Run(folder, config, resume=True)
    assert later_defaults(FitConfig(hints=3))["hints"] == 0


def test_resume_keeps_what_is_there(tmp_path):
    Run(tmp_path / "run", CONFIG).add({"n": 0}, "a")
    before = contents(tmp_path)
    Run(tmp_path / "run", {**CONFIG, "splits": [2, 4]}, resume=True)  # a tuple reads back as a list
    assert contents(tmp_path) == before


def test_overwrite_clears_the_run_and_nothing_else(tmp_path):
    run = Run(tmp_path / "run", CONFIG)
    run.add({"n": 0}, "a")
    run.finish({})
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "rows" / "notes.txt").write_text("mine too")
    again = Run(tmp_path / "run", {"other": 1}, overwrite=True)
    assert again.rows() == []
    assert not again.has("a")
    assert set(contents(tmp_path / "run")) == {"run.json", "environment.json", "notes.txt", "rows/notes.txt"}
    assert read_json(again.path("run.json")) == {"other": 1}
    again.add({"n": 1}, "b")
    assert again.rows() == [{"n": 1}]


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["config.json", "model.safetensors"], ["environment.json", "rows.csv"]]
)
@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path, names, flag):
    for name in names:
        (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="no run"):
        Run(tmp_path, CONFIG, **{flag: True})
    with pytest.raises(FileExistsError):
        Run(tmp_path, CONFIG)
    assert contents(tmp_path) == before


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        Run(tmp_path / "run", CONFIG, overwrite=True)
