"""From the demo's rows to its results: scores over seeds, the share of the gain that is kept, what it costs."""

from __future__ import annotations

import base64
import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from vst.data.probes import score_of_counts
from vst.demo.config import MODELS, OWN, DemoConfig
from vst.demo.division import SCENES, SUBCATEGORIES
from vst.measure.cost import extra_blocks
from vst.measure.latency import ALL_IN_FULL
from vst.results.gain import bootstrap_share_of_gain
from vst.tree.config import VSTConfig

Row = Mapping[str, Any]
KINDS = {SCENES: "segmentation", SUBCATEGORIES: "classification"}
TITLES = {SCENES: "scenes, mIoU", SUBCATEGORIES: "subcategories, accuracy"}
"""A task's name in tables and pictures, with what its score is."""


def pack(values: np.ndarray, dtype: str) -> dict[str, Any]:
    """An array of small whole numbers as JSON holds it in little room: ``shape``, ``dtype``, and zlib in base64."""
    stored = np.ascontiguousarray(values.astype(dtype))
    if not np.array_equal(stored, values):
        raise ValueError(f"Values from {values.min()} to {values.max()} do not fit into {dtype}.")
    data = base64.b64encode(zlib.compress(stored.tobytes(), 9)).decode()
    return {"shape": list(stored.shape), "dtype": dtype, "data": data}


def unpack(packed: Row) -> np.ndarray:
    """Inverse of :func:`pack`."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    return np.frombuffer(raw, packed["dtype"]).reshape(packed["shape"])


def demo_results(rows: Sequence[Row], config: DemoConfig, tree: VSTConfig, shown: str) -> dict[str, Any]:
    """Everything in one dict; ``towers`` is what tables, plots and recommendations read.

    Args:
        rows: of the run: models alone and fits by seed, and latency.
        config: of the demo. tree: of the tree.
        shown: the objective whose towers carry the bare names (``VST-2``); others are named after theirs.
    """
    seeds = [s for s in config.seeds if any(r.get("seed") == s for r in rows)]
    scored = [r for s in seeds for r in rows if r.get("seed") == s]
    plain = str(config.stitch_of(None))
    timings = {r.get("stitch", plain): r for r in rows if "rows" in r}
    timing = timings[str(config.stitch_of(shown))]
    objectives = [o for o in config.objectives if any(r["objective"] == o for r in scored)]
    fits = [r for r in scored if r["objective"] is not None]
    models = [r for r in scored if r["objective"] is None]
    by_tower: dict[str, list[Row]] = {}
    tuned = f"{config.trunk} tuned"
    for r in scored:
        held = {**r["towers"], **({tuned: r["trunk"]["tower"]} if "trunk" in r else {})}
        for name, tower in held.items():
            by_tower.setdefault(_name(name, r["objective"], shown), []).append(tower)
    trunk, branch = f"{config.trunk} alone", f"{config.branch} alone"
    better = {t: max((trunk, branch), key=lambda n: _mean(by_tower[n], t)) for t in KINDS}
    costs = {r["name"]: r for r in timing["rows"]}
    towers = []
    # A tuned trunk without any branch costs what the trunk does.
    alone = {**costs[trunk], "name": tuned, "kind": "tuned"}
    controls = [name for name in models[0]["towers"] if name not in costs]
    as_the_trunk = [alone, *({**costs[trunk], "name": name, "kind": "control"} for name in controls)]
    for cost in [*timing["rows"], *as_the_trunk]:
        recipes = [
            o for o in [shown, *(o for o in objectives if o != shown)] if _name(cost["name"], o, shown) in by_tower
        ]
        for objective in recipes if cost["kind"] in ("split", "tuned") else [None]:
            own = by_tower[name := _name(cost["name"], objective, shown)]
            scores = {t: dict(zip(map(str, seeds), (x[t]["score"] for x in own), strict=True)) for t in KINDS}
            means = [statistics.mean(values) for values in zip(*(s.values() for s in scores.values()), strict=True)]
            made, at = [f for f in fits if f["objective"] == objective], dict(cost)
            if cost["kind"] == "split":
                at = _costs(cost, str(config.stitch_of(objective)), timings, made)
            tower = {**at, "name": name, "objective": objective, "tasks": scores}
            tower |= {"accuracy": statistics.mean(means), "accuracy_spread": _spread(means)}
            tower["share"] = {t: _share(own, by_tower[better[t]], by_tower[ALL_IN_FULL], t) for t in KINDS}
            tower["detail"] = _detail([unpack(x[SCENES]["counts"]) for x in own])
            tower |= _over_trunk(at, costs[trunk])
            if cost["kind"] == "tuned":
                tower["own"] = _moved(made)
                tower["over_untuned"] = {t: _ahead(own, by_tower[trunk], t) for t in KINDS}
            elif objective is not None:
                tower["extra_blocks"] = extra_blocks(tree, cost["split"])
                reports = [x for f in made for x in f["reports"] if x["split"] == cost["split"]]
                tower["final_error"] = statistics.mean(x["final"]["error"] for x in reports)
                if config.recipes and objective != shown:
                    tower["behind"] = {t: _ahead(by_tower[cost["name"]], own, t) for t in KINDS}
            towers.append(tower)
    return {
        "trunk": config.trunk,
        "branch": config.branch,
        "objective": shown,
        "seeds": seeds,
        "better": better,
        "score": "mean of both tasks' scores, %",
        "majority": {t: statistics.mean(r["majority"][t] for r in models) for t in KINDS},
        "towers": towers,
        "fits": [_told(f) for f in fits],
        **({"recipes": _recipes(config, objectives)} if config.recipes else {}),
        "batch_size": timing["batch_size"],
        "caption": f"{MODELS[config.trunk]} trunk, {MODELS[config.branch]} branch, {tree.grid} x {tree.grid} grid, "
        f"{config.stitch_of(shown)} stitch; {config.probe_test} held-out pictures a task, {len(seeds)} "
        f"seed{'s' if len(seeds) > 1 else ''}; fp32, batch {timing['batch_size']}, {timing['device']}",
    }


def _costs(cost: Row, stitch: str, timings: Mapping[str, Row], fits: Sequence[Row]) -> dict[str, Any]:
    """What a tree of some stitches costs at a split: as it was measured, or in FLOPs alone where it was not.

    Args:
        cost: of the tree that is shown, at that split. stitch: of the other one, whose fits are given.
        timings: by stitch. fits: of the other one.
    """
    if stitch in timings:
        return next(dict(r) for r in timings[stitch]["rows"] if r["name"] == cost["name"])
    gflops = fits[0]["gflops"][str(cost["split"])]
    ratio = gflops * cost["flops_ratio"] / cost["gflops"]
    return {"name": cost["name"], "kind": "split", "split": cost["split"], "gflops": gflops, "flops_ratio": ratio}


def _recipes(config: DemoConfig, objectives: Sequence[str]) -> dict[str, Any]:
    """By recipe: pictures of each kind, its stitches, and the fields of the fit that it changes."""
    return {
        recipe: {
            "pictures": config.pictures_of(recipe),
            "stitch": str(config.stitch_of(recipe)),
            "fit": {k: v for k, v in changes.items() if k not in OWN},
        }
        for recipe, changes in config.recipes.items()
        if recipe in objectives
    }


def _moved(fits: Sequence[Row]) -> dict[str, float]:
    """How far the trunk's own features are from the published model's, over fits that measured it."""
    own = [f["trunk"]["own"] for f in fits if f["trunk"]["own"]]
    return {key: statistics.mean(values[key] for values in own) for key in (own[0] if own else ())}


def _told(fit: Row) -> Row:
    """A fit without its history and what its towers answered."""
    own = {"trunk": {"own": fit["trunk"]["own"]}} if "trunk" in fit else {}
    return {**{k: v for k, v in fit.items() if k not in ("history", "towers")}, **own}


def _name(tower: str, objective: str | None, shown: str) -> str:
    return tower if objective in (None, shown) else f"{tower}, {objective}"


def _mean(rows: Sequence[Row], task: str) -> float:
    return statistics.mean(r[task]["score"] for r in rows)


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _share(own: Sequence[Row], one: Sequence[Row], full: Sequence[Row], task: str) -> dict[str, Any]:
    tower, least, most = ([unpack(r[task]["counts"]) for r in part] for part in (own, one, full))
    share = bootstrap_share_of_gain(tower, least, most, partial(score_of_counts, kind=KINDS[task]))
    return {**asdict(share), "text": str(share)}


def _ahead(own: Sequence[Row], other: Sequence[Row], task: str) -> dict[str, float]:
    """How far one tower's score lies above another's on the same pictures, with the 95 % interval."""
    found = _share(own, other, own, task)
    return {"points": found["gain"], "low": found["gain_low"], "high": found["gain_high"]}


def _detail(counts: Sequence[np.ndarray]) -> dict[str, float]:
    """Pixel accuracy and IoU of the foreground's classes (background left out), means over seeds."""
    sums = [c.astype(np.int64).sum(0) for c in counts]
    return {
        "pixel_accuracy": statistics.mean(float(score_of_counts(s, "classification")) for s in sums),
        "foreground_mean_iou": statistics.mean(float(score_of_counts(s[:, 1:], "segmentation")) for s in sums),
    }


def _over_trunk(cost: Row, one: Row) -> dict[str, float]:
    """FLOPs over the trunk alone, and beyond it over what the second model adds in full (0 the trunk, 1 both)."""
    return {
        "trunk_flops_ratio": cost["flops_ratio"] / one["flops_ratio"],
        "extra_flops": (cost["flops_ratio"] - one["flops_ratio"]) / (1 - one["flops_ratio"]),
    }
