"""Real processes that are sent a signal outside of a training: how they end, what they say, and that they go on."""

import json
import signal
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

# One process imports everything, and forks one for each case: it runs a command and, where a function is about to
# return, gets the signal.
DRIVER = """
import importlib, json, os, signal, sys
import torch
from vst import cli
import sklearn.linear_model, matplotlib.pyplot, accelerate, vst.demo.assets

torch.set_num_threads(1)
cases, told = json.load(open(sys.argv[1])), {}
for name, (words, place, number) in cases.items():
    log = f"{sys.argv[1]}.{name}"
    child = os.fork()
    if not child:
        for ignored in (signal.SIGTERM, signal.SIGHUP):  # as under nohup
            signal.signal(ignored, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if place:
            module, _, path = place.partition(":")
            owner = importlib.import_module(module)
            *inner, attribute = path.split(".")
            for part in inner:
                owner = getattr(owner, part)
            own = getattr(owner, attribute)
            def stopped(*args, **options):
                found = own(*args, **options)
                os.kill(os.getpid(), number)
                return found
            setattr(owner, attribute, stopped)
        try:
            cli.main(words)
            code = 0
        except SystemExit as error:
            print(error.code, flush=True)
            code = 1
        sys.stdout.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told[name] = [status, open(log).read()]
print(json.dumps(told))
"""


@pytest.fixture
def told(tiny, pictures, tmp_path):
    """``told({name: (words, place, signal)})`` runs commands one after another: exit codes and what was printed."""
    for i, picture in enumerate(pictures):
        folder = tmp_path / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:03d}.png")
    models = [tiny("dinov2"), tiny("clip", 48, seed=1)]
    tree = {"trunk": models[0], "branches": models[1:], "splits": [1, 2], "image_size": 56}
    fit = {"epochs": 2, "batch_size": 8, "save_every": 2, "calibration": 16, "cache": str(tmp_path / "cache")}
    folders = {"train": str(tmp_path / "pictures"), "test": str(tmp_path / "pictures")}
    protocol = {
        "models": dict(zip(("dinov2", "clip"), models, strict=True)), "directions": ["dinov2>clip"], "depths": [2],
        "grid": 4, "objectives": ["ridge", "ffm"], "cka_depths": [2], "cka_pictures": 8,
        "tasks": {"t": {"source": "folder", "options": folders, "validation": 6, "test": 10}},
        "train": {"rates": [0.001], "ffm_epochs": 1, "head_epochs": 2, "calibration": 16},
    }  # fmt: skip
    configs = {
        "fit": {"tree": tree, "images": str(tmp_path / "pictures"), "fit": fit},
        "protocol": {"protocol": protocol},
        "trunk": {"models": models, "images": str(tmp_path / "pictures"), "compare": {"grid": 4, "repeats": 1}},
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))

    def run(cases):
        file = tmp_path / "cases.json"
        lines = {}
        for name, (words, place, number) in cases.items():
            command, out, *more = words
            line = [command, "--config", str(tmp_path / f"{command}.yaml"), "--out", str(tmp_path / out), *more]
            lines[name] = (line, place, number)
        file.write_text(json.dumps(lines))
        done = subprocess.run([sys.executable, "-c", DRIVER, str(file)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


RESUME = "The same call with --resume goes on from the last state that was saved, or begins again where none was."
CALIBRATION, REPORT = "vst.fit.loop:_Fit._calibrate", "vst.fit.loop:evaluate_stitches"
CACHES, STITCHES = "vst.fit.targets:Targets.open_caches", "vst.tree.encoder:VSTEncoder.save_stitches"
TREE, FEATURES = "vst.tree.encoder:VSTEncoder.save_pretrained", "vst.protocol.features:FeatureStore._push"


@pytest.mark.slow
def test_commands_end_as_they_were_told_and_go_on(told, tmp_path):
    term, hup, ctrl_c, kill = signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL
    stops = {
        "calibration": (CALIBRATION, term, ["fit", "a"]),
        "caches": (CACHES, ctrl_c, ["fit", "a", "--resume"]),
        "export": (STITCHES, hup, ["fit", "a", "--resume"]),
        "report": (REPORT, term, ["fit", "a", "--resume"]),
        "killed": (REPORT, kill, ["fit", "a", "--resume"]),
        "tree": (TREE, ctrl_c, ["fit", "a", "--resume"]),
        "features": (FEATURES, ctrl_c, ["protocol", "p"]),
        "features again": (FEATURES, kill, ["protocol", "p"]),
        "row": ("vst.protocol.grid:measure", term, ["protocol", "p"]),
        "drawing": ("vst.protocol.report:curves", term, ["protocol", "p"]),
        "comparison": ("vst.trunk.command:compare_trunks", hup, ["trunk", "t"]),
    }
    cases = {name.replace(" ", "-"): (words, place, int(number)) for name, (place, number, words) in stops.items()}
    whole = {
        "fit": ["fit", "a", "--resume"], "fit-whole": ["fit", "b"], "protocol": ["protocol", "p"],
        "protocol-whole": ["protocol", "q"], "trunk": ["trunk", "t"],
    }  # fmt: skip
    found = told(cases | {name: (words, None, 0) for name, words in whole.items()})
    for name in cases:
        status, printed = found[name]
        number, command = signal.Signals(cases[name][2]), cases[name][0][0]
        assert status == -number, (name, printed)
        assert "Traceback" not in printed, printed
        advice = {"fit": RESUME, "protocol": "The same call goes on from what was saved.", "trunk": ""}[command]
        line = "" if number == kill else f"Stopped by {number.name}. {advice}".strip()
        assert number == kill or printed.strip().endswith(line), printed
    for name in whole:
        assert found[name][0] == 0, found[name][1]
    one, two = (load_file(tmp_path / out / "stitches" / "stitches.safetensors") for out in "ab")
    assert all((one[name] == two[name]).all() for name in one)
    rows = [json.loads((tmp_path / out / "results.json").read_text())["results"]["rows"] for out in "pq"]
    assert [r.get("score") for r in rows[0]] == [r.get("score") for r in rows[1]]
    assert [r.get("cka") for r in rows[0]] == [r.get("cka") for r in rows[1]]
    assert not [path for out in "abpqt" for path in (tmp_path / out).rglob(".*.tmp*")]
