"""Command lines and configs through the parser of the command that they are for; nothing is run."""

import shlex
from pathlib import Path

from llava_integration.commands import COMMANDS
from vst import cli
from vst.parsing import parse


def parsed_line(line):
    """What the parser makes of a line of the README, or True where the line is a host's own."""
    words = shlex.split(line, comments=True)
    if "train/stitch.py" in words:
        return parse(cli.COMMANDS, ["fit", *words[words.index("train/stitch.py") + 1 :]])
    if "train/mllm.py" in words:
        return parse(COMMANDS, ["train", *words[words.index("train/mllm.py") + 1 :]])
    if "eval/lmms.py" in words:
        return parse(COMMANDS, ["evaluate", *words[words.index("eval/lmms.py") + 1 :]])
    if "llava_integration" in words and "." in (module := words[words.index("llava_integration") + 1]):
        return module.startswith("llava.train.")  # a host's module: its options
    if "eval/sweep.py" in words:
        return parse(cli.COMMANDS, ["protocol", *words[words.index("eval/sweep.py") + 1 :]])
    if words[:3] == ["python", "-m", "llava_integration"]:
        return parse(COMMANDS, words[3:])
    at = words.index("vst")
    assert words[:at] in ([], ["torchrun", "--nproc_per_node", "2", "-m"])
    return parse(cli.COMMANDS, words[at + 1 :])


def parsed_config(file, configs: Path):
    """What the command that a config is for makes of it.

    Args:
        file: a YAML file below ``configs``.
        configs: a folder laid out as the project's own.
    """
    kind = file.parent.relative_to(configs).as_posix()
    name = {"stitch": "fit", "trees": "latency", "demo": "demo", "llava/demo": "demo"}.get(kind, "train")
    by_file = {"sweep": "sweep", "pretrain": "train", "finetune": "train", "protocol": "protocol"}
    name = by_file.get(file.stem.partition("-")[0] if kind in ("stitch", "llava/demo", "llava") else "", name)
    more = ["--images", "pictures", "--out", "runs/x"] if name == "fit" else []
    files = ["--config", str(file)]
    if file.parent.name in ("towers", "llms"):  # parts, for a whole config
        files = ["--config", str(file.parents[1] / "pretrain.yaml"), *files]
    if file.stem == "protocol-offline":  # more tasks, for the protocol
        files = ["--config", str(file.parent / "protocol.yaml"), *files]
    return parse(COMMANDS if kind.startswith("llava") else cli.COMMANDS, [name, *files, *more])[name]
