"""The command ``vst trunk``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from vst.demo.assets import exact_source
from vst.demo.division import demo_pictures
from vst.fit.precision import usable_device
from vst.results.drawing import drawing
from vst.results.folders import Run
from vst.results.locks import LOCK, held
from vst.results.tables import table
from vst.trunk.compare import FOLDERS, TrunkConfig, compare_trunks, named
from vst.trunk.report import trunk_plot, trunk_rows


def trunk(
    models: list[str] | dict[str, str] = ["demo:clip", "demo:dinov2"],  # noqa: B006 (read only)
    images: str = "demo:emoji",
    labels: bool = False,
    heldout_images: str | None = None,
    compare: TrunkConfig = TrunkConfig(),  # noqa: B008 (frozen)
    device: str = "auto",
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Which of two or more models should be the trunk? Every direction by closed form, on your pictures, with its cost.

    Examples:
        vst trunk --models '[clip-l-336,dinov2-l]' --images pictures/
        vst trunk --models '[clip-l-336,dinov2-l]' --images pictures/ --labels true --out runs/trunk
        vst trunk --labels true                    # the demo's two models on emoji, offline

    Args:
        models: sources, or a mapping from names to sources; demo:clip and demo:dinov2 are the demo's.
        images: folder of pictures, searched recursively; or demo:emoji.
        labels: pictures lie in one folder a class: probe each tree's tokens for it, on held-out pictures.
        heldout_images: folder of pictures for errors and scores (with the same classes); default: some of images.
        compare: how.
        device: auto, cpu or cuda.
        out: run folder for results.json and trunk.png; default: only print.
        overwrite: replace the run in out.
    """
    where, sources = usable_device(device), models if isinstance(models, dict) else named(models)
    if overwrite and out is None:
        raise ValueError("overwrite needs a run folder (out): name the run's.")
    with held(out) if out is not None else nullcontext():
        _trunk(sources, images, labels, heldout_images, compare, where, out, overwrite)


def _trunk(
    sources: dict[str, str], images: str, labels: bool, heldout_images: str | None, compare: TrunkConfig, where: str,
    out: str | None, overwrite: bool,
) -> None:  # fmt: skip
    if out is not None and not overwrite and any(path.name != LOCK for path in Path(out).iterdir()):
        raise FileExistsError(f"{out} is not empty; give overwrite to replace the comparison in it, or another folder.")
    given: dict[str, Any] = {"images": images, "labels": FOLDERS if labels else None}
    if heldout_images is not None:
        given |= {"heldout_images": heldout_images, "heldout_labels": FOLDERS if labels else None}
    if images == "demo:emoji":
        if heldout_images is not None:
            raise ValueError("demo:emoji has held-out pictures of its own; leave heldout_images out.")
        given = demo_pictures(labels)
    exact = {name: exact_source(source) for name, source in sources.items()}
    results = compare_trunks(exact, config=compare, device=where, **given)
    table(
        "Which trunk?", *trunk_rows(results), f"grid {results['grid']} x {results['grid']}; closed-form stitches alone"
    )
    print(results["sentence"])
    if results["skipped"]:
        print(f"skipped {len(results['skipped'])} pictures that could not be read")
    if out is not None:  # only now, so that a mistake leaves no folder behind
        facts = {"models": sources, "images": images, "labels": labels, "heldout_images": heldout_images}
        run = Run(out, {**facts, "compare": compare}, overwrite=overwrite, device=where)
        print(f"results: {run.finish(results)}")  # before the plot, which could fail
        with drawing(run.path("trunk.png")):
            trunk_plot(results, run.path("trunk.png"))
        print(f"plot:    {run.path('trunk.png')}")
