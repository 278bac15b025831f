"""Which model should be the trunk? Every direction by closed form, on pictures of one's own, with what it costs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from vst.data.images import CUTS, PICTURE_MB
from vst.data.labels import by_folder, check_classes, one_a_picture
from vst.data.pictures import ImageSet, collate
from vst.data.probes import linear_probe
from vst.fit.calibrations import Calibrations, check_closed_form
from vst.fit.heldout import evaluate_stitches
from vst.fit.precision import usable_device
from vst.fit.teacher import TRUNK_PIXELS, Teacher, target_pixels, transforms
from vst.measure.cost import extra_blocks, full_cost, model_cost, tree_cost
from vst.measure.latency import ALL_IN_FULL, measure_tree
from vst.models.checkpoints import describe
from vst.models.fields import SEEDS, check_fields, checked, one_of, shown
from vst.models.spec import MOST_GRID
from vst.results.progress import track
from vst.tree.baseline import FullEncoders
from vst.tree.encoder import VSTEncoder
from vst.tree.stitches import DEFAULT_STITCH, StitchSpec
from vst.trunk.report import verdict

FOLDERS = "folders"
FORM = "ridge"
_PENALTY = 1e-3  # of the ridge, as a fit's
_BATCH = 16


@dataclass(frozen=True)
class TrunkConfig:
    """How trunks are compared.

    Attributes:
        splits: trunk depths, of every trunk alike; default: a sixth, a half and five sixths of each trunk's blocks.
        grid: patches a side of every model; default: the smallest grid among the models' own.
        stitch: family, with options where it has any, ``mlp_skip(reads=2)``; it needs a closed form.
        pictures: at most so many for the closed forms and the probes, drawn by the seed.
        heldout: at most so many for errors and scores; without held-out pictures of their own, a third of all at most.
        seed: of the pictures drawn.
        cut: crop, squash or pad: how a picture becomes square.
        picture_mb: pictures that take more MiB than this to decode are skipped.
        batch_size, repeats: of the time measurement; 0 repeats measure nothing.
    """

    splits: list[int] | None = None
    grid: int | None = None
    stitch: str = DEFAULT_STITCH
    pictures: int = 400
    heldout: int = 200
    seed: int = 0
    cut: str = "crop"
    picture_mb: int = PICTURE_MB
    batch_size: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        check_fields(self, {"splits": (1, None), "grid": (1, MOST_GRID), "seed": SEEDS, "picture_mb": (1, None)})
        one_of(self.cut, "cut", CUTS)
        StitchSpec.parse(self.stitch)
        if self.splits is not None and not self.splits:
            raise ValueError("splits is []; expected one or more trunk depths, or none for the default.")
        if min(self.pictures, self.heldout) < 2 or self.batch_size < 1 or self.repeats < 0:
            raise ValueError(
                f"pictures {self.pictures}, heldout {self.heldout}, batch_size {self.batch_size} and repeats "
                f"{self.repeats} were given; expected at least 2, 2, 1 and 0."
            )


def compare_trunks(
    models: Sequence[str] | Mapping[str, str],
    images: Any,
    config: TrunkConfig | None = None,
    *,
    labels: Sequence[Any] | str | None = None,
    heldout_images: Any = None,
    heldout_labels: Sequence[Any] | str | None = None,
    device: str = "cpu",
    show_progress: bool = True,
) -> dict[str, Any]:
    """Build a tree on every model with the others as branches, its stitches by ridge regression, and compare them.

    Args:
        models: two or more sources, or a mapping from names to sources.
        images: anything that :class:`vst.data.pictures.ImageSet` takes.
        config: see :class:`TrunkConfig`.
        labels: one a picture, or ``folders``: the first folder of a picture's relative path. None: no probe.
        heldout_images, heldout_labels: pictures for errors and scores; default: some of ``images``.
        device: where everything runs.
        show_progress: bars with the time left.

    Returns:
        ``rows`` (a trunk and split each: ``errors`` and ``channel_errors`` by branch, ``score`` under a probe of the
        fused tokens, costs), ``alone`` (score and FLOPs of each model and of all in full), ``trunk`` (the name to
        take, or None), ``sentence``, ``skipped`` (pictures that could not be read).

    Raises:
        ValueError: fewer than two models, labels that do not pair up, too few pictures.
    """
    config = TrunkConfig() if config is None else checked(config, TrunkConfig, "config")
    return _Comparison(models, config, usable_device(device), show_progress).run(
        images, labels, heldout_images, heldout_labels
    )


class _Comparison:
    def __init__(self, models: Sequence[str] | Mapping[str, str], config: TrunkConfig, device: str, show: bool) -> None:
        if not isinstance(models, Collection) or isinstance(models, (str, bytes)) or len(models) < 2:
            raise ValueError(
                f"models is {shown(models)}; expected two or more sources, such as [clip-l-336, dinov2-l]."
            )
        check_closed_form([StitchSpec.parse(config.stitch).family], FORM)
        self.sources = dict(models) if isinstance(models, Mapping) else named(models)
        self.specs = {name: describe(source) for name, source in self.sources.items()}
        self.config, self.device, self.show = config, torch.device(device), show
        self.grid = config.grid or min(s.image_size // s.patch for s in self.specs.values())
        self.skipped: dict[str, str] = {}

    def tree(self, trunk: str) -> VSTEncoder:
        """The tree on one trunk, its stitches new."""
        depth = self.specs[trunk].depth
        splits = self.config.splits or sorted({max(1, round(depth * part / 6)) for part in (1, 3, 5)})
        return VSTEncoder.from_vfms(
            trunk=self.sources[trunk],
            branches={name: source for name, source in self.sources.items() if name != trunk},
            splits=splits,
            image_size=self.grid * self.specs[trunk].patch,
            stitch=self.config.stitch,
            cut=self.config.cut,
        ).to(self.device)

    def run(self, images: Any, labels: Any, heldout_images: Any, heldout_labels: Any) -> dict[str, Any]:
        if heldout_images is None and heldout_labels is not None:
            raise ValueError("heldout_labels were given without heldout_images; give both, or neither.")
        if heldout_images is not None and (labels is None) != (heldout_labels is None):
            raise ValueError(
                "Labels were given for some of the pictures only; give labels and heldout_labels, or neither."
            )
        rows: list[dict[str, Any]] = []
        alone: dict[str, dict[str, Any]] = {}
        right: dict[tuple[str, int], np.ndarray] = {}
        for trunk in self.sources:
            tree = self.tree(trunk)
            data, held, train_rows, test_rows = self._pictures(tree, images, heldout_images)
            classes: tuple[list[Any], list[Any]] = ([], [])
            if labels is not None:
                classes = _labels(data, labels), _labels(held, labels if heldout_images is None else heldout_labels)
                if not alone:  # once: every trunk sees the same pictures
                    shown, asked = [classes[0][row] for row in train_rows], [classes[1][row] for row in test_rows]
                    check_classes(shown, asked, known=classes[0])
            teacher = Teacher(tree).to(self.device)
            self._start(tree, teacher, data, train_rows, trunk)
            reports = evaluate_stitches(
                tree, held, targets=teacher, indices=test_rows, skipped=self.skipped, show_progress=self.show
            )
            scores: dict[str, np.ndarray] = {}
            if labels is not None:
                parts = (data, train_rows, classes[0]), (held, test_rows, classes[1])
                scores = self._probes(tree, parts, trunk, whole=not alone)
            times = self._times(tree)
            whole, one = full_cost(tree.config), model_cost(self.specs[trunk], self.grid, tree.config.trunk_stop)
            for split in tree.splits:
                at = [r for r in reports if r.split == split]
                name = f"VST-{split}"
                if name in scores:
                    right[trunk, split] = scores[name]
                rows.append(
                    {
                        "trunk": trunk,
                        "split": split,
                        "relative_depth": split / self.specs[trunk].depth,
                        "errors": {r.branch: r.final.error for r in at},
                        "channel_errors": {r.branch: r.final.channel_error for r in at},
                        "score": float(scores[name].mean()) if name in scores else None,
                        "extra_blocks": extra_blocks(tree.config, split),
                        "trunk_flops_ratio": tree_cost(tree.config, split).flops / one.flops,
                        "flops_ratio": tree_cost(tree.config, split).flops / whole.flops,
                        **times.get(name, {}),
                    }
                )
            if not alone:
                alone = self._alone(tree, scores)
        chosen, sentence = verdict(rows, alone, right)
        return {"rows": rows, "alone": alone, "trunk": chosen, "sentence": sentence, "grid": self.grid,
                "skipped": self.skipped}  # fmt: skip

    def _pictures(
        self, tree: VSTEncoder, images: Any, heldout_images: Any
    ) -> tuple[ImageSet, ImageSet, list[int], list[int]]:
        limit = self.config.picture_mb
        data = ImageSet(images, transforms(tree), picture_mb=limit)
        generator = torch.Generator().manual_seed(self.config.seed)
        order = torch.randperm(len(data), generator=generator).tolist()
        if heldout_images is not None:
            held = ImageSet(heldout_images, transforms(tree), picture_mb=limit)
            test = torch.randperm(len(held), generator=generator).tolist()[: self.config.heldout]
        else:
            count = min(self.config.heldout, len(order) // 3)
            held, test, order = data, order[:count], order[count:]
        if heldout_images is None and (len(test) < 2 or len(order) < 2):
            raise ValueError(f"{len(data)} pictures were given; expected at least 6, so that some can be held out.")
        if len(test) < 2 or len(order) < 2:
            raise ValueError(f"{len(data)} pictures and {len(held)} held-out ones were given; expected 2 of each.")
        return data, held, order[: self.config.pictures], test

    @torch.no_grad()
    def _start(self, tree: VSTEncoder, teacher: Teacher, data: ImageSet, rows: list[int], trunk: str) -> None:
        """The closed form of every stitch."""
        sums, seen = Calibrations(tree), 0
        for pixels, kept in self._read(data, rows, f"{trunk} as trunk: closed form"):
            sums.observe(teacher, pixels)
            seen += len(kept)
        if not seen:
            raise ValueError(f"None of {len(rows)} pictures could be read: give readable ones.")
        sums.start(FORM, penalty=_PENALTY)

    def _read(self, data: ImageSet, rows: list[int], title: str) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
        """Pixels on the device, and which of ``rows`` they are."""
        loader = DataLoader(Subset(data, rows), batch_size=_BATCH, collate_fn=collate)
        done = 0
        for pixels, kept, lost in track(loader, title, len(loader), self.show):
            self.skipped.update({s.name: s.reason for s in lost})
            part = rows[done : done + _BATCH]
            done += len(part)
            if kept:
                yield {n: p.to(self.device) for n, p in pixels.items()}, [part[i] for i in kept]

    @torch.no_grad()
    def _probes(self, tree: VSTEncoder, parts: Any, trunk: str, whole: bool) -> dict[str, np.ndarray]:
        """By tower, which held-out pictures a probe of its fused, pooled tokens gets right."""
        full = FullEncoders.load(tree.config).to(self.device) if whole else None
        pooled: list[dict[str, list[Tensor]]] = []
        classes: list[list[Any]] = []
        for (data, rows, labels), what in zip(parts, ("training", "test"), strict=True):
            out: dict[str, list[Tensor]] = {}
            names: list[Any] = []
            for pixels, kept in self._read(data, rows, f"{trunk} as trunk: {what} pictures of the probe"):
                names += [labels[row] for row in kept]
                taps = tree.taps(pixels[TRUNK_PIXELS])
                for split in tree.splits:
                    fused = tree.fuse(list(tree.from_taps(taps, split).values()))
                    out.setdefault(f"VST-{split}", []).append(fused.mean(1).cpu())
                if full is not None:
                    named = {n: target_pixels(n) for n in full.models} | {tree.config.trunk_name: TRUNK_PIXELS}
                    own = full.branch_tokens({n: pixels[named[n]] for n in full.models})
                    out.setdefault(ALL_IN_FULL, []).append(full.fused(list(own.values())).mean(1).cpu())
                    for name, tokens in own.items():
                        given = trunk if name == tree.config.trunk_name else name
                        out.setdefault(given, []).append(tree.fuse([tokens]).mean(1).cpu())
            pooled.append(out)
            classes.append(names)
        train, test = ({name: torch.cat(x).float().numpy() for name, x in out.items()} for out in pooled)
        return {
            name: linear_probe(train[name], classes[0], test[name], classes[1]).given == np.asarray(classes[1])
            for name in train
        }

    def _times(self, tree: VSTEncoder) -> dict[str, dict[str, float]]:
        if not self.config.repeats:
            return {}
        rows = measure_tree(
            tree, batch_size=self.config.batch_size, repeats=self.config.repeats, device=self.device,
            show_progress=self.show,
        )  # fmt: skip
        keys = ("trunk_ratio", "trunk_ratio_sure_low", "trunk_ratio_sure_high", "ratio", "ratio_sure_low",
                "ratio_sure_high", "median_ms")  # fmt: skip
        return {r["name"]: {k: r[k] for k in keys} for r in rows if r["kind"] == "split"}

    def _alone(self, tree: VSTEncoder, scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        whole = full_cost(tree.config).flops
        flops = {
            name: model_cost(spec, self.grid, spec.depth + 1 + tree.config.feature_layer).flops
            for name, spec in self.specs.items()
        }
        return {
            name: {"score": float(scores[name].mean()) if name in scores else None, "flops_ratio": value / whole}
            for name, value in {**flops, ALL_IN_FULL: whole}.items()
        }


def _labels(data: ImageSet, labels: Any) -> list[Any]:
    """One a picture, in order."""
    if isinstance(labels, str):
        if labels != FOLDERS:
            raise ValueError(f"labels is {labels!r}; expected {FOLDERS!r}, or one label a picture.")
        return by_folder([data.name(row) for row in range(len(data))])
    return one_a_picture(labels, len(data))


def named(sources: Sequence[str]) -> dict[str, str]:
    """Sources by the last part of their own names as an identifier, numbered where it is there twice."""
    out: dict[str, str] = {}
    for source in sources:
        base = re.sub(r"\W", "_", re.split(r"[/:]", str(source).rstrip("/"))[-1], flags=re.ASCII) or "model"
        base = f"m{base}" if base[0].isdigit() else base
        name, count = base, 2
        while name in out:
            name, count = f"{base}_{count}", count + 1
        out[name] = source
    return out
