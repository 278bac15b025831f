"""The demo: two real encoders become one tree, measured at every split depth on two tasks, on pictures held out.

First results come after a few minutes: the closed-form stitches, scored and timed. The fit follows.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vst.data.images import ImageTransform
from vst.data.probes import dense_probe, linear_probe, picture_counts, score_of_counts
from vst.demo import assets
from vst.demo.config import DemoConfig
from vst.demo.curve import share_plot
from vst.demo.division import SCENES, Division, TaskData
from vst.demo.page import write_page
from vst.demo.pictures import pictures_plot, series_of
from vst.demo.results import demo_results, pack
from vst.demo.tables import scores_line, show_results
from vst.fit.loop import fit_stitches
from vst.measure.cost import tree_cost
from vst.measure.latency import ALL_IN_FULL, measure_tree
from vst.models.checkpoints import describe
from vst.results.drawing import NotDrawn, drawing
from vst.results.feature_maps import pca_maps
from vst.results.finished import ROWS, as_written, read_results
from vst.results.folders import Run
from vst.results.progress import track
from vst.tree.baseline import FullEncoders
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import check_weights, read_config
from vst.tree.fusion import Fusion

MAP_GRID = 14  # feature maps are shown finer than the stitches were fitted: they map token by token
SHOWN = 8  # pictures of the page
_TRAIN_MASK = 32  # pixels a side that the segmentation probe is fitted to
_BATCH = 32


def run_demo(folder: str | Path, config: DemoConfig, *, resume: bool = True, overwrite: bool = False) -> dict[str, Any]:
    """Run what is missing of the demo and write results.json, the plot and the page; returns the results.

    Raises:
        ValueError: the folder holds a run of another config and ``overwrite`` is False.
    """
    run = Run(folder, config, resume=resume and Path(folder).exists(), overwrite=overwrite)
    if overwrite:  # at once: a new run that is stopped must not go on with parts of the old one
        for part in ("fits", "tree"):
            shutil.rmtree(run.path(part), ignore_errors=True)
        for part in ("curve.png", "pictures.png", "index.html"):
            run.path(part).unlink(missing_ok=True)
    if run.path("results.json").exists() and not overwrite:
        results = read_results(run.path("results.json"), "vst demo")
        print(f"{folder} is complete; showing what is there (--overwrite starts again).")
        if run.path("tree").exists():  # results may lie alone, as published ones do
            _warn_of_damage(run.path("tree"))
        with as_written(run.path("results.json"), "vst demo"):
            _show(results, run)
        # It failed, or was stopped, as it was drawn.
        if run.path("tree").exists() and not run.path("index.html").exists():
            _Job(run, config, assets.prepare()).draw(results)
        return results
    job = _Job(run, config, assets.prepare())
    first, shown = config.seeds[0], config.objectives[-1]
    for seed in config.seeds:
        job.models_alone(seed)
        for objective in config.objectives:
            job.fitted(seed, objective)
            early = (seed, objective) == (first, config.objectives[0]) and objective != shown
            if early and not run.has(f"seed{seed}-{shown}"):
                job.latency(objective)
                show_results(results := job.results(objective, seeds=[first]))
                try:
                    job.draw(results)
                except NotDrawn as error:  # which must not cost what is still to come
                    warnings.warn(str(error), stacklevel=2)
                print(f"First results, by {objective} alone: {run.path('index.html')}. The fit of {shown} follows.")
        job.forget()
    job.latency(shown)
    results = job.results(shown, seeds=config.seeds)
    run.path("index.html").unlink(missing_ok=True)  # of the first results
    run.finish(results)
    job.draw(results)
    _show(results, run)
    return results


def _warn_of_damage(folder: Path) -> None:
    try:
        check_weights(folder)
    except (FileNotFoundError, ValueError) as error:
        warnings.warn(f"{error} The results are whole; --overwrite runs everything again.", stacklevel=3)


def _show(results: dict[str, Any], run: Run) -> None:
    show_results(results)
    print(f"results: {run.path('results.json')}\nplot:    {run.path('curve.png')}\npage:    {run.path('index.html')}")


class _Job:
    def __init__(self, run: Run, config: DemoConfig, found: assets.Assets) -> None:
        self.run, self.config, self.assets = run, config, found
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._division: dict[int, Division] = {}
        self._encoded: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}

    def tree(self, seed: int, objective: str | None = None) -> VSTEncoder:
        """The tree with new stitches, of the family that one of the config's objectives has."""
        trunk, branch = self.assets.source(self.config.trunk), self.config.branch
        return VSTEncoder.from_vfms(
            trunk=trunk,
            branches={branch: self.assets.source(branch)},
            splits=self.config.splits,
            image_size=self.config.grid * describe(trunk).patch,
            stitch=self.config.stitch_of(objective),
            seed=seed,
        )

    def division(self, seed: int) -> Division:
        """Pictures of a seed, drawn once."""
        if seed not in self._division:
            self._division[seed] = Division.draw(self.assets.emoji, self.config, seed)
        return self._division[seed]

    def forget(self) -> None:
        """Let go of the features of a seed that is done."""
        self._division.clear()
        self._encoded.clear()

    def encoded(self, seed: int) -> dict[tuple[str, str], dict[str, Any]]:
        """By task and part, what stays the same whatever the stitches: the trunk's tokens by depth, the branch's own.

        ``taps``: depth to ``[pictures, T, D]``; ``own``: model to patch tokens ``[pictures, N, D]``; on the CPU.
        """
        if seed not in self._encoded:
            tree = self.tree(seed).to(self.device)
            branch = self.config.branch
            target = FullEncoders.load(tree.config, [branch]).to(self.device)
            depths = {depth for o in self.config.objectives for depth in self.depths(o)}
            self._encoded[seed] = self._encode_all(tree, target, seed, f"seed {seed}", depths)
        return self._encoded[seed]

    def depths(self, objective: str | None) -> set[int]:
        """The trunk's depths that stitches of an objective read."""
        return {depth for split in self.config.splits for depth in self.config.stitch_of(objective).reads(split)}

    def _encode_all(
        self, tree: VSTEncoder, target: FullEncoders | None, seed: int, title: str, depths: set[int]
    ) -> dict[tuple[str, str], dict[str, Any]]:
        """By task and part, a tree's tokens at the trunk's depths, and a target's where one is given."""
        return {
            (name, part): self._encode(tree, target, getattr(task, part), f"{title}: {name}, {part}", depths)
            for name, task in self.division(seed).tasks.items()
            for part in ("train", "test")
        }

    @torch.no_grad()
    def _encode(
        self, tree: VSTEncoder, target: FullEncoders | None, images: list[Image.Image], title: str, depths: set[int]
    ) -> dict[str, Any]:
        trunk, branch = tree.config.trunk_name, self.config.branch
        taps: dict[int, list[Tensor]] = {}
        own: dict[str, list[Tensor]] = {trunk: [], **({} if target is None else {branch: []})}
        transforms = {trunk: tree.transform(), **({} if target is None else target.transforms())}
        for pixels in _batches(images, transforms, title):
            there = {name: p.to(self.device) for name, p in pixels.items()}
            tokens = tree.trunk.taps(there[trunk], {*depths, tree.config.trunk_stop})
            for depth, x in tokens.items():
                taps.setdefault(depth, []).append(x.cpu())
            own[trunk].append(tree.trunk.features(tokens[tree.config.trunk_stop]).cpu())
            if target is not None:
                own[branch].append(target.branch_tokens({branch: there[branch]})[branch].cpu())
        return {
            "taps": {depth: torch.cat(x) for depth, x in taps.items()},
            "own": {name: torch.cat(x) for name, x in own.items()},
        }

    def models_alone(self, seed: int) -> None:
        """Probe each model alone and both in full."""
        key = f"seed{seed}-models"
        if self.run.has(key):
            return
        encoded, tasks = self.encoded(seed), self.division(seed).tasks
        trunk, branch = self.config.trunk, self.config.branch
        names = {f"{trunk} alone": [trunk], f"{branch} alone": [branch], ALL_IN_FULL: [trunk, branch]}
        towers: dict[str, Any] = {}
        controls = self.controls()
        for tower in track([*names, *controls], f"seed {seed}: probes of the models", len(names) + len(controls)):
            own = {at: [e["own"][n] for n in names.get(tower, [trunk])] for at, e in encoded.items()}
            taken = {
                at: [e["taps"][d][:, -(self.config.grid**2) :] for d in controls.get(tower, ())]
                for at, e in encoded.items()
            }
            towers[tower] = self._scored(tasks, {at: [*own[at], *taken[at]] for at in encoded})
        self.run.add({"seed": seed, "objective": None, "towers": towers, "majority": _majority(tasks)}, key)
        print(scores_line(f"seed {seed}", towers))

    def controls(self) -> dict[str, tuple[int, ...]]:
        """The trunk alone with its own tokens at the depths that stitches of several read, by a tower's name.

        A tree whose stitch reads earlier depths gives the consumer some of what these hold, branch or not.
        """
        deepest = max(self.config.splits)
        read = {self.config.stitch_of(o).reads(deepest) for o in self.config.objectives}
        return {
            f"{self.config.trunk} alone and its depths {', '.join(map(str, depths))}": depths
            for depths in sorted(read)
            if len(depths) > 1
        }

    def fitted(self, seed: int, objective: str) -> None:
        """Fit all splits to one objective, then probe the tree at each."""
        key = f"seed{seed}-{objective}"
        if self.run.has(key):
            return
        config, division, tree = self.config, self.division(seed), self.tree(seed, objective)
        folder = self.run.path("fits") / key
        result = fit_stitches(
            tree,
            division.pictures(config.pictures_of(objective)),
            config.fit_of(objective, seed),
            heldout_images=division.heldout,
            folder=folder,
            resume=folder.exists(),
        )
        tree.to(self.device)
        title = f"seed {seed}, {objective}"
        tuned = tree.config.tuned is not None and tree.config.tuned.trunk_blocks > 0
        encoded = self._encode_all(tree, None, seed, title, self.depths(objective)) if tuned else self.encoded(seed)
        towers, splits = {}, tree.splits
        for split in track(splits, f"{title}: tails and probes", len(splits)):
            parts = {at: self._stitched(tree, e["taps"], split) for at, e in encoded.items()}
            towers[f"VST-{split}"] = self._scored(division.tasks, parts)
        if seed == config.seeds[0]:
            tree.save_pretrained(self.run.path("tree"), overwrite=True)
        reports = [report.to_dict() for report in result.reports]
        row: dict[str, Any] = {
            "seed": seed,
            "objective": objective,
            "towers": towers,
            "reports": reports,
            "seconds": result.seconds,
        }
        row |= {"steps": result.steps, "pictures": result.pictures}
        row["gflops"] = {str(split): tree_cost(tree.config, split).flops / 1e9 for split in splits}
        if tuned:  # what it keeps without any branch, at the cost of the trunk alone
            own = {at: [e["own"][tree.config.trunk_name]] for at, e in encoded.items()}
            row["trunk"] = {"tower": self._scored(division.tasks, own), "own": result.to_dict().get("own")}
        self.run.add({**row, "history": result.history}, key)
        print(scores_line(title, {**towers, **({f"{config.trunk} tuned": row["trunk"]["tower"]} if tuned else {})}))

    @torch.no_grad()
    def _stitched(self, tree: VSTEncoder, taps: Mapping[int, Tensor], split: int) -> list[Tensor]:
        """Every branch's patch tokens at a split, from the trunk's tokens, on the CPU."""
        pictures = len(next(iter(taps.values())))
        out: list[list[Tensor]] = []
        for at in range(0, pictures, _BATCH):
            part = {depth: x[at : at + _BATCH].to(self.device) for depth, x in taps.items()}
            out.append([x.cpu() for x in tree.from_taps(part, split).values()])
        return [torch.cat(parts) for parts in zip(*out, strict=True)]

    def _scored(
        self, tasks: Mapping[str, TaskData], parts: Mapping[tuple[str, str], Sequence[Tensor]]
    ) -> dict[str, dict[str, Any]]:
        """Score of a tower by task, with counts by picture; predicted masks of the first test scenes."""
        out: dict[str, dict[str, Any]] = {}
        for name, task in tasks.items():
            train, test = (_fused(parts[name, part]) for part in ("train", "test"))
            if task.kind == "segmentation":
                small = F.interpolate(task.train_labels[:, None].float(), (_TRAIN_MASK, _TRAIN_MASK), mode="nearest")
                head = dense_probe(train, small[:, 0].long(), len(task.classes))
                given = head.resized(head(test), task.test_labels).argmax(1)
            else:
                labels = task.train_labels.tolist(), task.test_labels.tolist()
                pooled = train.mean(1).numpy(), test.mean(1).numpy()
                given = torch.from_numpy(linear_probe(pooled[0], labels[0], pooled[1], labels[1]).given)
            counts = picture_counts(given, task.test_labels, len(task.classes))
            out[name] = {"score": float(score_of_counts(counts.sum(0), task.kind)), "counts": pack(counts, "int16")}
            if task.kind == "segmentation":
                out[name]["masks"] = pack(given[:SHOWN].numpy(), "uint8")
        return out

    def latency(self, objective: str) -> None:
        """Time the tree of an objective at every split beside each model alone and both in full."""
        stitch = str(self.config.stitch_of(objective))
        key = "latency" if stitch == str(self.config.stitch_of(None)) else f"latency-{objective}"
        if not self.run.has(key):
            tree = VSTEncoder.from_pretrained(self.run.path("tree"))
            options = {"batch_size": self.config.batch_size, "repeats": self.config.repeats}
            rows = measure_tree(tree, device=self.device, **options)  # type: ignore[arg-type]
            self.run.add({"rows": rows, "device": self.device.type, "stitch": stitch, **options}, key)

    def results(self, shown: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Results of what is there."""
        with as_written(self.run.path("rows"), "vst demo", ROWS):
            return demo_results(self._rows(seeds), self.config, read_config(self.run.path("tree"))[1], shown)

    def _rows(self, seeds: Sequence[int]) -> list[dict[str, Any]]:
        return [r for r in self.run.rows() if "rows" in r or r["seed"] in seeds]

    def draw(self, results: dict[str, Any]) -> None:
        """The plot and the page of results."""
        with drawing(path := self.run.path("curve.png")):
            share_plot(results, path)
        if series_of(results):
            with drawing(path := self.run.path("pictures.png")):
                pictures_plot(results, path)
        with drawing(self.run.path("index.html")):
            tree = VSTEncoder.from_pretrained(self.run.path("tree"))
            self._page(results, self._rows(results["seeds"]), tree)

    def _page(self, results: dict[str, Any], rows: Sequence[Mapping[str, Any]], kept: VSTEncoder) -> None:
        """Masks that were predicted and feature maps of the first seed's first test scenes."""
        tree = VSTEncoder.from_config(replace(kept.config, grid=MAP_GRID))
        # Positions are the sources', at this grid; all else is the tree's own, which may have been tuned.
        tree.load_state_dict({k: v for k, v in kept.state_dict().items() if "pos_embed" not in k}, strict=False)
        tree.to(self.device)
        full = FullEncoders.load(tree.config).to(self.device)
        task = self.division(self.config.seeds[0]).tasks[SCENES]
        (pixels,) = _batches(task.test[:SHOWN], full.transforms())
        trunk, branch = self.config.trunk, self.config.branch
        with torch.no_grad():
            own = full.branch_tokens({name: p.to(self.device) for name, p in pixels.items()})
            swept = tree.sweep(pixels[trunk].to(self.device))
        shown = {f"stitched at {s}": tokens[branch].cpu().numpy() for s, tokens in swept.items()}
        maps = pca_maps([own[branch].cpu().numpy(), *shown.values()])
        columns = {f"{branch}'s own": maps[0], **dict(zip(shown, maps[1:], strict=True))}
        columns[f"{trunk}'s own"] = pca_maps([own[trunk].cpu().numpy()])[0]
        write_page(self.run, results, rows, task, columns)


def _batches(
    images: Sequence[Image.Image], transforms: Mapping[str, ImageTransform], title: str | None = None
) -> Iterator[dict[str, Tensor]]:
    starts = range(0, len(images), _BATCH)
    for at in track(starts, title or "", len(starts), title is not None):
        yield {name: torch.stack([t(i) for i in images[at : at + _BATCH]]) for name, t in transforms.items()}


def _fused(tokens: Sequence[Tensor]) -> Tensor:
    """What a tower gives: branches normalised and set side by side, as the tree does by default."""
    return Fusion("channel", {str(i): t.shape[-1] for i, t in enumerate(tokens)})(list(tokens))


def _majority(tasks: Mapping[str, TaskData]) -> dict[str, float]:
    """Score of always giving the training pictures' most frequent class."""
    out = {}
    for name, task in tasks.items():
        given = torch.full_like(task.test_labels, int(task.train_labels.flatten().bincount().argmax()))
        out[name] = float(score_of_counts(picture_counts(given, task.test_labels, len(task.classes)).sum(0), task.kind))
    return out
