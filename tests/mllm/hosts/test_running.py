"""Programs of other packages in one process with trees: with no host around, and with a broken one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
READS = """
import sys
from transformers import AutoImageProcessor, AutoModel

def main():
    model = AutoModel.from_pretrained(sys.argv[1])
    AutoImageProcessor.from_pretrained(sys.argv[1])
    print("READ", type(model).__name__, sys.argv[2:], __name__)
    return int(sys.argv[2]) if len(sys.argv) > 2 else None

if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.fixture
def run(tmp_path, tree_of):
    """A package without a host, its module, its command, and a call of ours in its environment."""
    tree_of().save_pretrained(tmp_path / "tree")
    package = tmp_path / "site" / "reader"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text(READS)
    facts = tmp_path / "site" / "reader-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: reader\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[console_scripts]\nread-tree = reader.cli:main\nlost = reader.none:main\n")

    def call(*words):
        path = os.pathsep.join((str(ROOT), str(tmp_path / "site")))
        return subprocess.run(
            [sys.executable, "-m", "llava_integration", *words],
            capture_output=True, text=True, timeout=200, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    return call


def test_a_module_that_needs_no_host(run, tmp_path):
    done = run("reader.cli", str(tmp_path / "tree"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "READ VSTVisionModel [] __main__" in done.stdout
    assert run("reader.cli", str(tmp_path / "tree"), "3").returncode == 3
    done = run("reader.nothing")
    assert done.returncode == 1
    assert done.stderr.strip().split("\n")[-1].startswith("ImportError: There is no module 'reader.nothing'")


def test_an_installed_command(run, tmp_path):
    done = run("read-tree", str(tmp_path / "tree"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "READ VSTVisionModel [] reader.cli" in done.stdout
    assert run("read-tree", str(tmp_path / "tree"), "3").returncode == 3
    done = run("lost")
    assert done.returncode == 1
    assert done.stderr.strip().split("\n")[-1] == "ImportError: No module named 'reader.none'"
    done = run("no-such-command")
    assert done.returncode == 2
    assert "no-such-command" in done.stderr


def test_a_hosts_module_still_asks_for_its_host(run):
    done = run("llava.train.train")
    assert done.returncode == 1
    assert "ImportError: No host is found" in done.stderr


def test_a_broken_host_is_told_and_left(run, tmp_path):
    builder = tmp_path / "site" / "cambrian" / "model" / "multimodal_encoder" / "builder.py"
    builder.parent.mkdir(parents=True)
    builder.write_text("import no_such_package_at_all\n")
    done = run("reader.cli", str(tmp_path / "tree"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "READ VSTVisionModel" in done.stdout
    assert "The host 'cambrian' is found but" in done.stderr
    assert run("cambrian.train").returncode == 1
