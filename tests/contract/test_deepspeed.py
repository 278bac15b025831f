"""The original LLaVA under DeepSpeed ZeRO-2, two processes over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("llava", reason="the host is not installed here: make test-hosts")
pytest.importorskip("deepspeed")

from host_kit import losses

pytest_plugins = ("host_kit",)
CONFIG = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json"


@pytest.mark.timeout(600)  # DeepSpeed compiles its communication once
def test_stage_1_under_zero_2(kit, tmp_path):
    out = tmp_path / "llava-zero2"
    words = kit.words(out, "plain", 6, tune_mm_mlp_adapter=True, learning_rate=3e-2, deepspeed=CONFIG)
    at = words.index("--use_cpu")  # this transformers drops DeepSpeed where that is set
    del words[at : at + 2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", "-m", "llava_integration", "llava.train.train"]
    log = tmp_path / "log"
    with log.open("w") as file:
        done = subprocess.run(
            [*launcher, *words], stdout=file, stderr=file, timeout=580, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    assert done.returncode == 0, log.read_text()[-3000:]
    found = losses(out)
    assert found[-1] < found[0]
    assert (out / "mm_projector.bin").is_file()
    assert "DeepSpeed" in log.read_text()
