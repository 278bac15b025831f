"""The demo: a small language model learns to talk about pictures that it sees through a stitch tree, offline.

Tower: CLIP-B/16 trunk with DINOv2-S (saliency) as a branch, its stitches fitted first. Language model:
SmolLM2-135M-Instruct. Pictures: easy-VQA and emoji scenes; scenes are drawn in two styles for training and in a third
for the test, which neither stitches nor language model saw before.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import llava_integration  # noqa: F401 (makes transformers know the tower)
from llava_integration.answer import easy_vqa, scenes
from llava_integration.answer.ask import Question, ask
from llava_integration.answer.scoring import correct, majority, score
from llava_integration.demo import assets
from llava_integration.demo.config import LlavaDemoConfig
from llava_integration.demo.page import write_page
from llava_integration.models import assemble
from llava_integration.train.card import write_card
from llava_integration.train.config import TuneConfig
from llava_integration.train.data import DataConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.plots import depth_curve, loss_curve
from llava_integration.train.training import train
from vst.demo import assets as encoders
from vst.demo import emoji
from vst.demo.config import MODELS
from vst.fit.loop import fit_stitches
from vst.fit.precision import has_bf16, uses_bf16
from vst.models.checkpoints import describe
from vst.results.drawing import drawing
from vst.results.finished import ROWS, as_written, read_results
from vst.results.folders import Run, atomic_path, begun_with, read_json
from vst.tree.encoder import VSTEncoder
from vst.tree.folder import check_weights

TRAIN_STYLES, TEST_STYLE = ("noto", "twemoji"), "fluent"
STAGES = ("pretrain", "finetune")


def run_demo(
    folder: str | Path, config: LlavaDemoConfig, *, resume: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """Run what is missing of the demo; leaves the model, results.json, plots and a page, and returns the results.

    Raises:
        ValueError: the folder holds a run of another config and ``overwrite`` is False.
    """
    folder, device = Path(folder), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = replace(config, precision=_precision(config.precision, None if overwrite else begun_with(folder), device))
    run = Run(folder, config, resume=resume and folder.exists(), overwrite=overwrite)
    if overwrite:
        for part in ("fit", "data", "models"):
            shutil.rmtree(folder / part, ignore_errors=True)
    if run.path("results.json").exists():
        print(f"{folder} is complete; showing what is there (--overwrite starts again).")
        results = read_results(run.path("results.json"), "the language demo")
        with as_written(run.path("results.json"), "the language demo"):
            _show(results, folder)
        # It failed, or was stopped, as it was drawn.
        if run.path("rows").exists() and not run.path("index.html").exists():
            draw(results, folder)
        return results
    job = _Job(run, config, device)
    job.tree()
    for seed in config.seeds:
        splits: list[int | str] = ["random", *config.fixed]
        for split in splits:
            job.trained(seed, split)
            job.asked(seed, split)
    job.leave_model()
    results = job.results()
    job.card(results)
    run.path("index.html").unlink(missing_ok=True)
    run.finish(results)
    draw(results, folder)
    _show(results, folder)
    return results


def _precision(wanted: str, before: Mapping[str, Any] | None, device: torch.device) -> str:
    """What auto stands for: what the run began with, or what the device has."""
    if wanted != "auto":
        return "bf16" if uses_bf16(wanted, device) else "fp32"
    return (before or {}).get("precision") or ("bf16" if has_bf16(device) else "fp32")


class _Job:
    def __init__(self, run: Run, config: LlavaDemoConfig, device: torch.device) -> None:
        self.run, self.config = run, config
        self.encoders, self.assets = encoders.prepare(), assets.prepare()
        self.device, self.bf16 = device, config.precision == "bf16"
        self.split = min(config.splits) if config.split is None else config.split

    def tree(self) -> None:
        """Fit the stitches, on emoji of the training styles alone."""
        folder = self.run.path("fit")
        if (folder / "tree" / "config.json").is_file():
            check_weights(folder / "tree")
            return
        trunk, branch = self.encoders.source(self.config.trunk), self.config.branch
        tree = VSTEncoder.from_vfms(
            trunk=trunk,
            branches={branch: self.encoders.source(branch)},
            splits=self.config.splits,
            image_size=self.config.grid * describe(trunk).patch,
            stitch=self.config.stitch,
        )
        pictures = emoji.pictures(self.encoders.emoji, TRAIN_STYLES)
        random.Random(0).shuffle(pictures)
        chosen = pictures[: self.config.fit_pictures + 64]
        fit_stitches(
            tree,
            [emoji.open_picture(p) for p in chosen[64:]],
            self.config.fit,
            heldout_images=[emoji.open_picture(p) for p in chosen[:64]],
            folder=folder,
            resume=folder.exists(),
        )
        tree.split = self.split
        tree.save_pretrained(folder / "tree")

    def data(self, seed: int) -> dict[str, DataConfig]:
        """Captions for stage 1 and conversations for stage 2, on disk in LLaVA's format."""
        folder = self.run.path("data") / f"seed{seed}"
        file, captions = folder / "train.json", folder / "captions.json"
        if not file.is_file():
            records = easy_vqa.conversations(self.assets.easy_vqa, "train", self.config.easy_vqa, seed)
            for record in records:
                target = folder / "easy_vqa" / record["image"]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.assets.easy_vqa / record["image"], target)
                record["image"] = f"easy_vqa/{record['image']}"
            told = easy_vqa.captions(records)
            scenes.write(folder / "scenes", self.encoders.emoji, self.config.scenes, TRAIN_STYLES, seed)
            for name, whole in (("captions", told), ("conversations", records)):
                for record in read_json(folder / "scenes" / f"{name}.json"):
                    whole.append({**record, "image": f"scenes/{record['image']}"})
            for path, whole in ((captions, told), (file, records)):
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(whole), encoding="utf-8")
        return {
            "pretrain": DataConfig([str(captions)], str(folder), max_length=1024),
            "finetune": DataConfig([str(file), str(captions)], str(folder), max_length=1024),
        }

    def questions(self, count: int) -> dict[str, list[Question]]:
        """The test: the same for all seeds."""
        return {
            "easy-VQA": easy_vqa.questions(self.assets.easy_vqa, count),
            "emoji scenes": scenes.questions(
                self.run.path("data") / "test", self.encoders.emoji, count, TEST_STYLE, seed=1000
            ),
        }

    def folder(self, seed: int, split: int | str, stage: str) -> Path:
        """Of one training run."""
        return self.run.path("models") / f"seed{seed}-{split}" / stage

    def trained(self, seed: int, split: int | str) -> None:
        """Both stages."""
        if self.run.has(_key(seed, split)):
            return
        config, data = self.config, self.data(seed)
        common = {
            "seed": seed, "save_steps": 100, "per_device_train_batch_size": min(4, config.batch_size),
            "bf16": self.bf16, "warmup_steps": 0.05, "adam_beta2": 0.98,
        }  # fmt: skip
        stages = {
            "pretrain": (
                ModelConfig(llm=str(self.assets.llm), tower=str(self.run.path("fit") / "tree")),
                TuneConfig(llm="none", start=config.start),
                {"learning_rate": config.pretrain_lr, "max_steps": config.pretrain_steps},
            ),
            "finetune": (
                ModelConfig(start=str(self.folder(seed, split, "pretrain"))),
                TuneConfig(llm="full", projector_lr=config.projector_lr),
                {"learning_rate": config.finetune_lr, "max_steps": config.finetune_steps},
            ),
        }
        for stage, (model, tune, options) in stages.items():
            print(f"seed {seed}, split {split}: {stage}")
            folder = self.folder(seed, split, stage)
            if (folder / "results.json").is_file():
                check_weights(folder)
                continue
            train(
                model, data[stage], str(folder), tune, split, config.batch_size, {**common, **options},
                resume=folder.exists(),
            )  # fmt: skip

    def asked(self, seed: int, split: int | str) -> None:
        """Answers to the test's questions, with the picture and without, and at every depth."""
        if self.run.has(_key(seed, split)):
            return
        folder = self.folder(seed, split, "finetune")
        model, processor = assemble.load(folder)
        tower = model.model.vision_tower
        shown = self.split if split == "random" else int(split)
        model.to(self.device)  # type: ignore[arg-type]

        def answers(questions: Sequence[Question], title: str, blank: bool = False) -> list[str]:
            dtype = torch.bfloat16 if self.bf16 else None
            return ask(model, processor, questions, blank=blank, batch_size=32, title=title, dtype=dtype)

        row: dict[str, Any] = {
            "seed": seed,
            "split": split,
            "shown": shown,
            "datasets": {},
            "depths": {},
            "part": {},
            "answers": {},
            "samples": [],
        }
        for name, questions in self.questions(self.config.questions).items():
            tower.split = shown
            seen = answers(questions, f"{name}, split {shown}")
            # Without its picture a question has one answer, however often it is asked.
            unique = list({q.question: q for q in questions}.values())
            without = dict(zip([q.question for q in unique], answers(unique, f"{name}, blanked", True), strict=True))
            blank = [without[q.question] for q in questions]
            row["datasets"][name] = score(questions, seen, blank)
            row["samples"] += [
                {"dataset": name, "image": self._name(q.image), "question": q.question, "answer": a,
                 "expected": q.answer, "blank": b}
                for q, a, b in list(zip(questions, seen, blank, strict=True))[:12]
            ]  # fmt: skip
            part = questions[: self.config.depth_questions]
            said = {shown: seen}
            for depth in self.config.splits if split == "random" else []:
                if depth != shown:
                    tower.split = depth
                    said[depth] = answers(part, f"{name}, split {depth}")
            row["depths"][name] = {str(d): float(correct(a[: len(part)], part).mean()) for d, a in sorted(said.items())}
            row["part"][name] = {
                "majority": float(majority(part)[0].mean()),
                "blank": float(correct(blank[: len(part)], part).mean()),
            }
            row["answers"][name] = {"blank": blank, **{str(d): a for d, a in sorted(said.items())}}
        row |= {"history": [], "seconds": {}}
        for stage in STAGES:
            path = self.folder(seed, split, stage) / "results.json"
            with as_written(path, "a training"):
                told = read_results(path, "a training")
                row["history"] += told["history"]
                row["seconds"][stage] = told["seconds"]
        self.run.add(row, _key(seed, split))

    def _name(self, picture: Path) -> str:
        """Of a picture, inside the run relative to its folder, which may be moved."""
        folder = self.run.folder
        return str(picture.relative_to(folder) if picture.is_relative_to(folder) else picture.absolute())

    def leave_model(self) -> None:
        """The first seed's model, in the run's own folder."""
        source = self.folder(self.config.seeds[0], "random", "finetune")
        files = [p for p in source.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")]
        own = {"run.json", "environment.json", "results.json"}
        for path in sorted(files, key=lambda p: p.name == "config.json"):
            if path.name not in own:
                with atomic_path(self.run.path(path.name)) as target:
                    os.link(path, target)

    def results(self) -> dict[str, Any]:
        """Everything in one dict."""
        with as_written(self.run.path("rows"), "the language demo", ROWS):
            return self._results(self.run.rows())

    def _results(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        drawn = [r for r in rows if r["split"] == "random"]
        names = list(drawn[0]["datasets"])
        depths = {
            name: {
                "random": {d: [r["depths"][name][d] for r in drawn] for d in drawn[0]["depths"][name]},
                "fixed": {
                    str(s): [r["depths"][name][str(s)] for r in rows if r["split"] == s] for s in self.config.fixed
                },
                "majority": drawn[0]["part"][name]["majority"],
                "blank": sum(r["part"][name]["blank"] for r in drawn) / len(drawn),
            }
            for name in names
        }
        count = len(drawn)
        return {
            "caption": f"SmolLM2-135M-Instruct on a tree of {MODELS[self.config.trunk]} (trunk) and "
            f"{MODELS[self.config.branch]}, {self.config.grid} x {self.config.grid} grid, split drawn "
            f"at each step, shown at split {self.split}; {self.config.questions} test questions a set, {count} "
            f"seed{'s' if count > 1 else ''}, {self.device.type}, {'bf16 autocast' if self.bf16 else 'fp32'}",
            "seeds": [{k: r[k] for k in ("seed", "datasets", "seconds")} for r in drawn],
            "depths": depths,
            "fixed": [{k: r[k] for k in ("seed", "split", "datasets")} for r in rows if r["split"] != "random"],
            "depth_questions": self.config.depth_questions,
            "history": drawn[0]["history"],
            "samples": drawn[0]["samples"],
        }

    def card(self, results: dict[str, Any]) -> None:
        """The model card, with the scores of the model that is left."""
        scores = {
            f"{name}, {values['n']} questions": {part: values[part] for part in ("accuracy", "majority", "blank")}
            for name, values in results["seeds"][0]["datasets"].items()
        }
        write_card(self.run.folder, str(self.assets.llm), "projector and language model (both stages)", scores)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Draw the plots of results into a run's folder, and write its page."""
    plots = {"training loss": folder / "loss.png"}
    with drawing(path := folder / "loss.png"):
        loss_curve(results["history"], path)
    for name, depths in results["depths"].items():
        with drawing(path := folder / f"depth-{name.replace(' ', '-').lower()}.png"):
            note = f"{name}: {results['depth_questions']} questions; {results['caption']}"
            depth_curve(depths, path, note)
        plots[f"{name}: answers by split depth"] = path
    with drawing(folder / "index.html"):
        samples = [{**s, "image": Image.open(_picture(folder, s["image"])).convert("RGB")} for s in results["samples"]]
        write_page(folder, results, samples, plots)


def _picture(folder: Path, name: str) -> Path:
    """Of a sample; rows of an earlier version name those of the run as seen from the working folder."""
    return path if (path := folder / name).exists() else Path(name)


def _key(seed: int, split: int | str) -> str:
    return f"seed{seed}-{split}"


def _show(results: dict[str, Any], folder: Path) -> None:
    from vst.results.tables import table

    rows = [
        (
            str(row["seed"]),
            name,
            f"{100 * s['accuracy']:.1f}",
            f"{100 * s['majority']:.1f}",
            f"{100 * s['blank']:.1f}",
            _interval(s["over_majority"]),
            _interval(s["over_blank"]),
        )
        for row in results["seeds"]
        for name, s in row["datasets"].items()
    ]
    heads = ["seed", "questions", "right %", "majority %", "blanked %", "over majority (95 %)", "over blanked (95 %)"]
    table("Answers", heads, rows, results["caption"])
    for name, depths in results["depths"].items():
        shown = ", ".join(f"split {d}: {100 * sum(v) / len(v):.1f} %" for d, v in depths["random"].items())
        print(f"{name}, one model at every depth ({results['depth_questions']} questions): {shown}")
    for sample in results["samples"][:3] + results["samples"][-3:]:
        print(f"  {sample['question']}  {sample['answer']}  (expected: {sample['expected']}; {sample['image']})")
    print(f"model:   {folder} (AutoModelForImageTextToText.from_pretrained)\npage:    {folder / 'index.html'}")


def _interval(difference: dict[str, float]) -> str:
    return f"{100 * difference['mean']:+.1f} ({100 * difference['low']:+.1f} .. {100 * difference['high']:+.1f})"
