"""The demo: two real encoders become one tree, measured at every split depth, on pictures that were held out.

Trunk: DINOv2-S (a backbone later trained for saliency), branch: CLIP-B/16. Task: which of 20 subcategories an emoji
belongs to, told by a linear probe; the emoji of the test are seen neither by the probe nor by the stitches before.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vst.baseline import FullEncoders
from vst.config import VSTConfig
from vst.cost import block_figure
from vst.demo import assets, emoji
from vst.demo.page import write_page
from vst.fit_config import FitConfig
from vst.fitting import fit_stitches
from vst.fusion import Fusion
from vst.images import ImageTransform
from vst.latency import measure_tree
from vst.progress import track
from vst.report import accuracy_latency_plot, objectives_table, pca_maps, stitch_table, towers_table
from vst.runs import Run
from vst.tasks import linear_probe
from vst.tree import VSTEncoder

MAP_GRID = 14  # feature maps are shown finer than the stitches were fitted: they map token by token


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs.

    Attributes:
        splits: trunk depths, of 12.
        image_size: side of the trunk's pictures; 112 is a grid of 8 x 8.
        stitch: family.
        objectives: what stitches are fitted to; the last one's tree is kept, timed and shown.
        seeds: of the division into training and test emoji, and of the fit.
        pictures: training pictures for the stitches.
        probe_train, probe_test: pictures of the probe.
        heldout: test pictures for the stitches' errors.
        fit: how stitches are fitted; objective and seed come from above.
        batch_size, repeats: of the latency measurement.
    """

    splits: list[int] = field(default_factory=lambda: [2, 4, 6, 8, 10])
    image_size: int = 112
    stitch: str = "mlp_skip"
    objectives: list[str] = field(default_factory=lambda: ["ffm"])
    seeds: list[int] = field(default_factory=lambda: [0])
    pictures: int = 400
    probe_train: int = 400
    probe_test: int = 300
    heldout: int = 96
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=2, save_every=10))
    batch_size: int = 8
    repeats: int = 15


@dataclass(frozen=True)
class Division:
    """Pictures of one seed: for the stitches, and labelled ones for the probe. Test emoji appear in the test alone."""

    fit: list[emoji.Picture]
    train: list[emoji.Picture]
    test: list[emoji.Picture]
    labels: dict[str, int]

    @classmethod
    def draw(cls, root: Path, config: DemoConfig, seed: int) -> Division:
        """Two fifths of every subcategory's emoji are test emoji, in all drawing styles."""
        rng = random.Random(seed)
        labels = {e.code: label for e, label in emoji.subcategory_task(root, 20)}
        by_label: dict[int, list[str]] = {}
        for code, label in labels.items():
            by_label.setdefault(label, []).append(code)
        tests: set[str] = set()
        for label in sorted(by_label):
            codes = sorted(by_label[label])
            rng.shuffle(codes)
            tests.update(codes[: len(codes) * 2 // 5])
        pictures = emoji.pictures(root)
        rng.shuffle(pictures)
        fit = [p for p in pictures if p.emoji.code not in tests]
        train = [p for p in fit if p.emoji.code in labels]
        test = [p for p in pictures if p.emoji.code in tests]
        return cls(fit[: config.pictures], train[: config.probe_train], test[: config.probe_test], labels)

    def label(self, pictures: Sequence[emoji.Picture]) -> list[int]:
        """Labels of pictures."""
        return [self.labels[p.emoji.code] for p in pictures]


def run_demo(folder: str | Path, config: DemoConfig, *, resume: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Run what is missing of the demo and write results.json, the plot and the page; returns the results.

    Raises:
        ValueError: the folder holds a run of another config and ``overwrite`` is False.
    """
    run = Run(folder, config, resume=resume and Path(folder).exists(), overwrite=overwrite)
    if run.path("results.json").exists() and not overwrite:
        from vst.runs import read_json

        results = read_json(run.path("results.json"))["results"]
        print(f"{folder} is complete; showing what is there (--overwrite starts again).")
        _show(results, run)
        return results
    found = assets.prepare()
    job = _Job(run, config, found)
    for seed in config.seeds:
        job.models_alone(seed)
        for objective in config.objectives:
            job.fitted(seed, objective, overwrite)
    job.latency()
    results = job.results()
    accuracy_latency_plot(results, run.path("curve.png"))
    job.page(results)
    run.finish(results)  # last: a run with results is complete
    _show(results, run)
    return results


def _show(results: dict[str, Any], run: Run) -> None:
    towers_table(results)
    if len({f["objective"] for f in results["fits"]}) > 1:
        objectives_table(results)
    print(f"results: {run.path('results.json')}\nplot:    {run.path('curve.png')}\npage:    {run.path('index.html')}")


class _Job:
    def __init__(self, run: Run, config: DemoConfig, found: assets.Assets) -> None:
        self.run, self.config, self.assets = run, config, found
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sources = {"dinov2": f"hf:{found.dinov2}", "clip": f"hf:{found.clip}"}

    def tree(self, seed: int, splits: Sequence[int] | None = None) -> VSTEncoder:
        return VSTEncoder.from_vfms(
            trunk=self.sources["dinov2"],
            branches={"clip": self.sources["clip"]},
            splits=self.config.splits if splits is None else splits,
            image_size=self.config.image_size,
            stitch=self.config.stitch,
            seed=seed,
        )

    def tokens(self, pictures: Sequence[emoji.Picture], full: FullEncoders, title: str) -> dict[str, torch.Tensor]:
        """Every model's own patch tokens of pictures, on the CPU."""
        out: dict[str, list[torch.Tensor]] = {}
        for pixels in _batches(pictures, full.transforms(), title):
            with torch.no_grad():
                for name, tokens in full.branch_tokens({n: p.to(self.device) for n, p in pixels.items()}).items():
                    out.setdefault(name, []).append(tokens.cpu())
        return {name: torch.cat(parts) for name, parts in out.items()}

    def models_alone(self, seed: int) -> None:
        """Probe each model alone and both in full."""
        key = f"models-seed{seed}"
        if self.run.has(key):
            return
        division = Division.draw(self.assets.emoji, self.config, seed)
        tree = self.tree(seed, [self.config.splits[0]])
        full = FullEncoders.load(tree.config).to(self.device)
        pooled = {}
        for part, pictures in (("train", division.train), ("test", division.test)):
            tokens = self.tokens(pictures, full, f"seed {seed}: models alone, {part}")
            names = list(tokens)
            for name in names:
                pooled[f"{name} alone", part] = _pool(tree.config, [tokens[name]])
            pooled["all in full", part] = _pool(tree.config, [tokens[n] for n in names])
        accuracy = {n: _probe(pooled[n, "train"], pooled[n, "test"], division) for n, _ in pooled}
        majority = linear_probe(
            np.zeros((len(division.train), 1)), division.label(division.train),
            np.zeros((len(division.test), 1)), division.label(division.test),
        ).majority  # fmt: skip
        self.run.add({"seed": seed, "accuracy": accuracy, "majority": majority}, key)

    def fitted(self, seed: int, objective: str, overwrite: bool) -> None:
        """Fit all splits to one objective, then probe the branch and the tree at each."""
        key = f"fit-seed{seed}-{objective}"
        if self.run.has(key):
            return
        config, division = self.config, Division.draw(self.assets.emoji, self.config, seed)
        tree = self.tree(seed)
        folder = self.run.path("fits") / f"seed{seed}-{objective}"
        match = "channel" if objective != "ffm" else config.fit.match
        fit = replace(config.fit, objective=objective, match=match, seed=seed, cache=str(self.run.path("targets")))
        result = fit_stitches(
            tree,
            [emoji.open_picture(p) for p in division.fit],
            fit,
            heldout_images=[emoji.open_picture(p) for p in division.test[: config.heldout]],
            folder=folder,
            resume=folder.exists() and not overwrite,
            overwrite=overwrite and folder.exists(),
        )
        stitch_table(result.reports)
        tree.to(self.device)
        name = tree.config.branches[0].name
        pooled: dict[tuple[str, int, str], np.ndarray] = {}
        for part, pictures in (("train", division.train), ("test", division.test)):
            title = f"seed {seed}, {objective}: all splits, {part}"
            out: dict[tuple[str, int], list[torch.Tensor]] = {}
            for pixels in _batches(pictures, {"trunk": tree.transform()}, title):
                with torch.no_grad():
                    for split, tokens in tree.sweep(pixels["trunk"].to(self.device)).items():
                        out.setdefault(("branch", split), []).append(_pooled(tree.config, [tokens[name]]))
                        out.setdefault(("tree", split), []).append(_pooled(tree.config, list(tokens.values())))
            pooled |= {(what, split, part): torch.cat(x).numpy() for (what, split), x in out.items()}
        rows = []
        for report in result.reports:
            accuracy = {
                what: _probe(pooled[what, report.split, "train"], pooled[what, report.split, "test"], division)
                for what in ("branch", "tree")
            }
            rows.append({**report.to_dict(), "branch_accuracy": accuracy["branch"], "accuracy": accuracy["tree"]})
        tree.save_pretrained(self.run.path("tree"), overwrite=True)
        row = {"seed": seed, "objective": objective, "splits": rows, "seconds": result.seconds}
        self.run.add({**row, "history": result.history}, key)

    def latency(self) -> None:
        """Time the tree at every split beside each model alone and both in full."""
        if not self.run.has("latency"):
            tree = VSTEncoder.from_pretrained(self.run.path("tree"))
            options = {"batch_size": self.config.batch_size, "repeats": self.config.repeats}
            rows = measure_tree(tree, device=self.device, **options)  # type: ignore[arg-type]
            self.run.add({"rows": rows, "batch_size": self.config.batch_size}, "latency")

    def results(self) -> dict[str, Any]:
        """Everything in one dict: towers (accuracy and latency), stitches by seed and objective."""
        rows = self.run.rows()
        models = [r for r in rows if "majority" in r]
        fits = [r for r in rows if "objective" in r]
        timing = next(r for r in rows if "batch_size" in r)
        shown = self.config.objectives[-1]
        config = VSTEncoder.skeleton(_read_config(self.run.path("tree"))).config
        towers = []
        for row in timing["rows"]:
            if row["kind"] == "split":
                at = [s for f in fits if f["objective"] == shown for s in f["splits"] if s["split"] == row["split"]]
                scores = [s["accuracy"] for s in at]
                extra = {
                    "branch_accuracy": statistics.mean(s["branch_accuracy"] for s in at),
                    "final_error": statistics.mean(s["final"]["error"] for s in at),
                    "extra_blocks": block_figure(config, row["split"]),
                }
            else:
                scores, extra = [m["accuracy"][row["name"]] for m in models], {}
            spread = statistics.stdev(scores) if len(scores) > 1 else None
            towers.append({**row, "accuracy": statistics.mean(scores), "accuracy_spread": spread, **extra})
        count = len(self.config.seeds)
        return {
            "towers": towers,
            "fits": [{k: v for k, v in f.items() if k != "history"} for f in fits],
            "models": models,
            "majority": statistics.mean(m["majority"] for m in models),
            "objective": shown,
            "batch_size": timing["batch_size"],
            "caption": f"DINOv2-S (saliency) trunk, CLIP-B/16 branch, {config.grid} x {config.grid} grid, "
            f"{self.config.stitch} stitch, {shown}; 20 emoji subcategories, {self.config.probe_test} held-out "
            f"pictures, {count} seed{'s' if count > 1 else ''}; fp32, batch {timing['batch_size']}, "
            f"{self.device.type}",
        }

    def page(self, results: dict[str, Any]) -> None:
        """Draw feature maps of held-out pictures and write the page."""
        kept = VSTEncoder.from_pretrained(self.run.path("tree"))
        tree = VSTEncoder.from_config(replace(kept.config, grid=MAP_GRID))
        tree.load_state_dict({k: v for k, v in kept.state_dict().items() if ".stitches." in k}, strict=False)
        full = FullEncoders.load(tree.config).to(self.device)
        division = Division.draw(self.assets.emoji, self.config, self.config.seeds[-1])
        pictures, seen = [], set()
        for p in division.test:
            label = division.labels[p.emoji.code]
            if label not in seen:
                seen.add(label)
                pictures.append(p)
        pictures = pictures[:16]
        own = self.tokens(pictures, full, "feature maps")
        trunk_name, name = tree.config.trunk_name, tree.config.branches[0].name
        with torch.no_grad():
            pixels = torch.stack([tree.transform()(emoji.open_picture(p)) for p in pictures])
            swept = tree.sweep(pixels)
        target = own[name].numpy()
        stitched = {split: tokens[name].numpy() for split, tokens in swept.items()}
        shown = pca_maps([target, *stitched.values()])
        trunk = pca_maps([own[trunk_name].numpy()])[0]
        columns = {"CLIP's own": shown[0]}
        columns |= {f"stitched at {s}": m for s, m in zip(stitched, shown[1:], strict=True)}
        columns["DINOv2's own"] = trunk
        titles = [f"{p.emoji.name.lower()} ({p.style})" for p in pictures]
        photos = [emoji.open_picture(p, size=112) for p in pictures]
        write_page(self.run, results, titles[:8], photos[:8], {k: v[:8] for k, v in columns.items()})


def _read_config(folder: Path) -> VSTConfig:
    from vst.saving import read_config

    return read_config(folder)[1]


def _batches(pictures: Sequence[emoji.Picture], transforms: dict[str, ImageTransform], title: str) -> Any:
    for at in track(range(0, len(pictures), 32), title, (len(pictures) + 31) // 32):
        images: list[Image.Image] = [emoji.open_picture(p) for p in pictures[at : at + 32]]
        yield {name: torch.stack([t(i) for i in images]) for name, t in transforms.items()}


def _pooled(config: VSTConfig, tokens: list[torch.Tensor]) -> torch.Tensor:
    """What a tower gives, pooled: branches normalised and set side by side as the tree does, mean over tokens."""
    widths = {str(i): t.shape[-1] for i, t in enumerate(tokens)}
    return Fusion("channel", widths, normalise=config.normalise)(tokens).mean(1).cpu()


def _pool(config: VSTConfig, tokens: list[torch.Tensor]) -> np.ndarray:
    return _pooled(config, tokens).numpy()


def _probe(train: np.ndarray, test: np.ndarray, division: Division) -> float:
    return linear_probe(train, division.label(division.train), test, division.label(division.test)).accuracy
