"""What the README shows runs: its Python on tiny models, its command lines through the parser."""

import re
import shlex
from pathlib import Path

import pytest

from vst import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if "vst " in line.split("#")[0] or "train/" in line or "eval/" in line
]


def test_the_python_face(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    replaced = {
        "timm:vit_large_patch14_dinov2.lvd142m": tiny("dinov2", depth=24),
        "timm:vit_large_patch14_clip_quickgelu_336.openai": tiny("clip", 48, depth=24),
        "image_size=336": "image_size=56",
    }
    for real, small in replaced.items():
        assert real in code
        code = code.replace(real, small)
    monkeypatch.chdir(tmp_path)
    space = {"image": pictures[0]}
    exec(code, space)
    assert space["tokens"].shape == (1, 16, 80)
    assert space["maps"]["clip"].map.shape == (1, 48, 4, 4)
    assert space["tree"].splits == [14]


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if "train/stitch.py" in words:
        words = ["fit", *words[words.index("train/stitch.py") + 1 :]]
    else:
        assert words[0] == "vst"
        words = words[1:]
    assert cli.parse(words)


def test_there_are_commands_to_test():
    assert len(COMMANDS) >= 6


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"(?:configs|docs|train|eval|tests|vst)/[\w./-]+\.(?:yaml|py|json|md|png)", README):
        assert (ROOT / path).exists(), path
