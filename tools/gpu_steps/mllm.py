"""The language demo on the GPU: a small language model learns to talk about pictures that it sees through a tree."""

from __future__ import annotations

from gpu_steps.options import made, options
from gpu_steps.work import Skipped, Work, needs
from vst.demo import assets as encoders


def run(work: Work) -> str:
    """Run what is missing of it; needs transformers, and the demo's assets."""
    needs("transformers", "accelerate", "matplotlib")
    try:
        from llava_integration.demo import assets
        from llava_integration.demo.config import LlavaDemoConfig
        from llava_integration.demo.job import run_demo
    except ImportError as error:
        raise Skipped(f"a package is not installed ({error})") from None
    if lacking := [*encoders.missing(), *assets.missing()]:
        raise Skipped(f"the demo's assets are not there ({', '.join(lacking)}): see docs/gpu.md")
    config = LlavaDemoConfig(grid=14)
    if work.dry:
        small = {"splits": [6, 10], "grid": 4, "fit_pictures": 16, "easy_vqa": 4, "scenes": 4, "questions": 4}
        few = {"pretrain_steps": 1, "finetune_steps": 1, "depth_questions": 2, "batch_size": 1}
        fit = {"epochs": 1, "calibration": 16}
        config = made(LlavaDemoConfig, options("llava/demo/short.yaml", "demo"), **small, **few, fit=fit)
    results = run_demo(work.folder("language-demo"), config)
    first = results["seeds"][0]["datasets"]
    return ", ".join(f"{name}: {100 * score['accuracy']:.1f} % right" for name, score in first.items())
