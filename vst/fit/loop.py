"""Fit a tree's stitches: a closed-form start, then one loop for all depths, on one process or many."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from vst.data.pictures import ImageSet, collate
from vst.data.views import Views
from vst.fit.calibrations import Calibrations, check_closed_form
from vst.fit.clock import Clock
from vst.fit.config import FitConfig, FitResult
from vst.fit.heldout import StitchReport, UnreadableHeldout, check_tree, evaluate_stitches, evaluate_trunk
from vst.fit.history import Window, warn_of_drift, warn_of_rise
from vst.fit.matching import Matcher
from vst.fit.objectives import OBJECTIVES
from vst.fit.order import batches, divide
from vst.fit.precision import uses_bf16
from vst.fit.processes import accelerator_for, gathered
from vst.fit.similarity import Agreement
from vst.fit.states import drop_states, has_state, load_state, save_state
from vst.fit.steps import Steps, check_finite
from vst.fit.teacher import Teacher, transforms
from vst.fit.tuning import Tuning
from vst.models.fields import checked, shown
from vst.models.vfm import VFM
from vst.results.finished import as_written, read_results
from vst.results.folders import Run, begun_with
from vst.results.later import later_defaults
from vst.results.progress import progress, track
from vst.results.stopping import Stop, stopping
from vst.tree.encoder import VSTEncoder

OPERATIONAL = ("workers", "save_every", "cache", "cache_limit_gb", "checkpointing")


def fit_stitches(
    tree: VSTEncoder,
    images: Any,
    config: FitConfig | Mapping[str, Any] | None = None,
    *,
    targets: Mapping[str, VFM] | None = None,
    heldout_images: Any = None,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
    **changes: Any,
) -> FitResult:
    """Fit all stitches of a tree, in place; the models themselves change only where ``config.tune`` says so.

    Runs as one process, or as many under ``torchrun`` / ``accelerate launch`` (each calls this alike; the global batch
    and so the result stay the same).

    Args:
        tree: to fit.
        images: a folder, a Hugging Face dataset, a list of paths or any iterable of PIL images. Files that cannot be
            read are skipped and counted.
        config: a :class:`FitConfig`, or a mapping of its fields.
        targets: by branch, the whole models to match; default: loaded from the branches' sources. Of a tree that is
            tuned, they stay the published models.
        heldout_images: pictures for the report; default: ``config.heldout`` of ``images``.
        folder: run folder for config, state, results and stitches; None writes nothing.
        resume: go on with the run in ``folder``; gives what the uninterrupted run would have given.
        overwrite: start the run in ``folder`` again.
        show_progress: bars (or lines where there is no terminal) with the time left.
        changes: fields of the config to replace, such as ``epochs=2``.

    Returns:
        The result; ``folder`` then also holds ``results.json`` and ``stitches/``.

    Raises:
        FileExistsError: ``folder`` is in use and neither flag was given.
        FolderInUse: another process writes to ``folder``.
        ValueError: bad options, no readable picture, targets that are not the branches' models.
        RuntimeError: a loss that is not finite.
        TypeError: an option that there is not.
    """
    check_tree(tree, "fit_stitches")
    config = FitConfig.of(config, changes)
    if folder is not None and (not isinstance(folder, (str, Path)) or not str(folder)):
        raise ValueError(f"folder is {shown(folder)}; expected the path of a run folder, or none.")
    checked(resume, bool, "resume")
    checked(overwrite, bool, "overwrite")
    checked(show_progress, bool, "show_progress")
    checked(targets, Mapping[str, VFM] | None, "targets")
    home = next(tree.parameters()).device
    try:
        result = _Fit(tree, images, config, targets, heldout_images, show_progress).run(folder, resume, overwrite)
        tree.eval()  # what was fitted is looked at next: see VSTEncoder.features
        return result
    finally:
        for model in (tree, *(targets or {}).values()):
            model.to(home)


class _Fit:
    """One fit: data, frozen models, loop, state."""

    def __init__(
        self,
        tree: VSTEncoder,
        images: Any,
        config: FitConfig,
        targets: Mapping[str, VFM] | None,
        heldout_images: Any,
        show: bool,
    ) -> None:
        if not tree.branches:
            raise ValueError("This tree has no branches, so there is nothing to fit.")
        self.tree, self.config = tree, config
        if OBJECTIVES[config.objective].closed_form:
            check_closed_form((b.stitch.family for b in tree.config.branches), config.objective)
        self.accelerator = accelerator_for(config)
        self.main = self.accelerator.is_main_process
        self.show = show and self.main
        self.device = self.accelerator.device
        if any(p.dtype != torch.float32 for s in tree.stitches().values() for p in s.parameters()):
            raise ValueError("The tree's stitches are not fp32; load it with dtype=torch.float32 to fit them.")
        self.tuning: Tuning | None = None
        self.bf16 = uses_bf16(config.precision, self.device)
        self.data = ImageSet(images, transforms(tree), limit=config.limit, picture_mb=config.picture_mb)
        self.heldout_data = self.data
        if heldout_images is not None:
            self.heldout_data = ImageSet(heldout_images, transforms(tree), picture_mb=config.picture_mb)
        self.train, self.heldout = divide(len(self.data), config.heldout if heldout_images is None else 0, config.seed)
        if heldout_images is not None:
            self.heldout = list(range(len(self.heldout_data)))
        self.teacher = Teacher(tree, targets, beyond=config.beyond).to(self.device)
        self.skipped: dict[str, str] = {}
        self.clock = Clock()
        self.cache_bytes = 0

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def run(self, folder: str | Path | None, resume: bool, overwrite: bool) -> FitResult:
        if folder is not None:
            self.tree.check_changes()
        finished = resume and folder is not None and (Path(folder) / "results.json").exists()
        if self.config.tune.anything and not finished:
            self.config.tune.weights(self.tree)
        run = self._open(folder, resume, overwrite)
        try:
            return self._run(run, resume)
        except BaseException:
            if self.tuning is not None:
                self.tuning.undo()
            raise
        finally:
            if run is not None:
                run.close()

    def _run(self, run: Run | None, resume: bool) -> FitResult:
        if run is not None and resume and run.path("results.json").exists():
            return self._finished(run)
        resume = resume and has_state(run)
        explained: dict[str, float | None] = {}
        if OBJECTIVES[self.config.objective].closed_form:
            with self.clock.phase("calibration"):
                explained = self._calibrate(None)
            check_finite(self.tree, None, 0)
            history: list[dict[str, float]] = []
            steps = 0
        else:
            matcher = self._matcher()
            if not resume:
                with self.clock.phase("calibration"):
                    explained = self._calibrate(matcher)
            steps, history, explained = self._loop(matcher, run, resume, explained)
            if self.main and self.config.start != "random":
                warn_of_rise(history)
            if self.tuning is not None:  # in every process alike
                self.tuning.merge(pictures=len(self.train), steps=steps)
        result = self._report(run, steps, history, explained)
        self.accelerator.wait_for_everyone()
        return result

    def _matcher(self) -> Matcher:
        """The loss, and with it all that is trained; from here on what is tuned is computed from its changes."""
        config, tune = self.config, self.config.tune
        if tune.anything:
            kept = self.teacher.hold(trunk=self._own, tails=tune.tails != "none")
            self.tuning = Tuning(self.tree, tune, config.seed)
            if self.show:
                trained = sum(p.numel() for p in self.tuning.parameters())
                beside = f"; the published models are kept beside until then ({kept / 1e6:,.0f} MB more)"
                print(
                    f"tuning: {trained / 1e6:.2f} M numbers in {len(self.tuning.changes)} weights, merged at the end"
                    f"{beside if kept else ''}",
                    file=sys.stderr,
                )
        return Matcher(
            self.teacher, config.objective, config.match, hints=config.hints, beyond=config.beyond, tuning=self.tuning,
            own=tune.own,
        )  # fmt: skip

    @property
    def _own(self) -> bool:
        """Whether the trunk's own features are about to change, and are kept by the tree."""
        return self.config.tune.trunk != "none" and self.tree.config.keep_trunk

    def _open(self, folder: str | Path | None, resume: bool, overwrite: bool) -> Run | None:
        if folder is None:
            if resume or overwrite:
                raise ValueError("resume and overwrite need a folder: name the run's.")
            return None
        # What a resumed run may change without changing its result is left out.
        fit = {k: v for k, v in asdict(self.config).items() if k not in OPERATIONAL}
        tree = self.tree.config
        # A tuned tree is to be tuned by the finished run alone that made it, and is told as that run began with it.
        again = tree.tuned is not None and self.config.tune.anything
        if tree.tuned is not None:
            tree = replace(tree, tuned=None if again else tree.tuned.unmeasured())
        facts: dict[str, Any] = {
            "fit": {**fit, "precision": "bf16" if self.bf16 else "fp32"},
            "tree": tree.to_dict(),
            "pictures": {"count": len(self.data), "fingerprint": self.data.fingerprint()},
            "heldout": {"count": len(self.heldout), "fingerprint": self.heldout_data.fingerprint()},
        }
        if not (resume and _began_without_weights(Path(folder))):
            facts["weights"] = (begun_with(folder) or {}).get("weights") if again else self.teacher.fingerprint()
        run = None
        if self.main:
            run = Run(folder, facts, resume=resume, overwrite=overwrite, later=self._later())
            if overwrite:
                drop_states(run)
        self.accelerator.wait_for_everyone()
        return run or Run(folder, facts, resume=True, lock=False, later=self._later())

    def _later(self) -> dict[str, Any]:
        """What the folder of a run that an earlier version began stands for."""
        return later_defaults(self.config, "fit.")

    def _batch(self, pixels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: p.to(self.device) for name, p in pixels.items()}

    @torch.no_grad()
    def _calibrate(self, matcher: Matcher | None) -> dict[str, float | None]:
        """Closed-form start; every process does the same, so nothing has to be exchanged."""
        chosen = self.train[: self.config.calibration]
        loader = DataLoader(Subset(self.data, chosen), batch_size=16, collate_fn=collate)
        compared = None if matcher is None else matcher.compared
        sums, seen = Calibrations(self.tree, compared, own=matcher is not None and matcher.own > 0), 0
        for pixels, kept, skipped in track(loader, "calibration", len(loader), self.show):
            self.skipped.update({s.name: s.reason for s in skipped})
            if kept:
                seen += len(kept)
                with self._autocast():
                    sums.observe(self.teacher, self._batch(pixels))
        if not seen:
            raise ValueError(f"None of {len(chosen)} pictures could be read ({_reasons(self.skipped)}).")
        form = None if self.config.start == "random" else self.config.start
        explained = sums.start(form, penalty=self.config.penalty)
        if matcher is not None:
            sums.set_scales(matcher)
        return {f"{name}@{split}": value for (name, split), value in explained.items()}

    def _loop(
        self, matcher: Matcher, run: Run | None, resume: bool, explained: dict[str, float | None]
    ) -> tuple[int, list[dict[str, float]], dict[str, float | None]]:
        config, accelerator = self.config, self.accelerator
        steps = Steps(accelerator, config, self.teacher, matcher, self.data.transforms, bf16=self.bf16)
        if config.cache is not None:
            steps.targets.open_caches(
                self.data, config, bf16=self.bf16, main=self.main, show=self.show, wait=accelerator.wait_for_everyone
            )
            self.cache_bytes = steps.targets.cache_bytes
        plan = batches(self.train, config.epochs, config.batch_size, config.seed)
        first, history, window = 0, [], Window(matcher.labels, len(matcher.keys))
        if run is not None and resume and (saved := load_state(accelerator, run, len(plan))) is not None:
            first, history, explained = saved["step"], saved["history"], saved["explained"]
            self.skipped.update(saved["skipped"])
            self.clock.go_on(saved.get("seconds", {}))
            if self.main and "pending" in saved:
                window.restore(saved["pending"])
            if self.show:
                print(f"going on after step {first} of {len(plan)}", file=sys.stderr)
        rank, world = accelerator.process_index, accelerator.num_processes
        shares = [batch[rank::world] for batch in plan[first:]]
        data, shown = self._shown(shares, first)
        loader = DataLoader(data, batch_sampler=shown, collate_fn=collate, num_workers=config.workers)
        # Without a folder there is nothing to save, and signals do what they always do.
        listening = nullcontext(Stop()) if run is None else stopping()
        title = f"{config.objective} fit"
        bar = progress(title, len(plan), self.show)
        with steps.recomputing(), self.clock.phase("fit"), listening as stop, bar as shown_steps:
            shown_steps.skip(first)
            for step, (pixels, kept, skipped) in enumerate(loader, start=first):
                self.skipped.update({s.name: s.reason for s in skipped})
                rate = steps.set_rate(step, len(plan))
                losses = steps.step(self._batch(pixels), [shares[step - first][i] for i in kept])
                if losses is not None:
                    window.add(losses, step + 1)
                last = step + 1 == len(plan)
                stopped = run is not None and stop.asked(self.device)
                save = run is not None and not last and (step + 1) % config.save_every == 0
                if last or save or step == 0 or (step + 1) % 10 == 0:
                    history.append({"step": step + 1, "lr": rate, **window.mean(accelerator)})
                if last or save or stopped:
                    check_finite(self.tree, self.tuning, step + 1)
                shown_steps.step(f"loss {history[-1]['mean']:.4f}" if history else "")
                if run is not None and (save or stopped):
                    facts = {
                        "step": step + 1,
                        "history": history,
                        "pending": window.pending(accelerator),
                        "explained": explained,
                        "skipped": gathered(accelerator, self.skipped),
                        "seconds": self.clock.spent(),
                    }
                    save_state(accelerator, run, facts)
                if run is not None and stopped:
                    stop.saved = f"step {step + 1} of {len(plan)} in {run.folder}" if self.main else None
                    break
        return len(plan), history, explained

    def _shown(self, shares: list[list[int]], first: int) -> tuple[Any, list[list[int]]]:
        """What is loaded for shares of the steps from ``first`` on, and by which numbers."""
        if not self.config.augment:
            return self.data, shares
        size = len(self.data)
        views = [[row + (first + i) * size for row in share] for i, share in enumerate(shares)]
        return Views(self.data, self.config.seed), views

    def _report(self, run: Run | None, steps: int, history: Any, explained: dict[str, float | None]) -> FitResult:
        skipped = gathered(self.accelerator, self.skipped)
        reports: list[StitchReport] = []
        own: Agreement | None = None
        if self.main:
            if run is not None:  # before the report, so that nothing can cost what was trained
                self.tree.save_stitches(run.path("stitches"), overwrite=True)
            try:
                with self.clock.phase("report"):
                    reports = evaluate_stitches(
                        self.tree,
                        self.heldout_data,
                        targets=self.teacher,
                        indices=self.heldout,
                        skipped=skipped,
                        show_progress=self.show,
                    )
                    own = self._measured_trunk()
            except UnreadableHeldout as error:
                warnings.warn(f"No report: {error}", stacklevel=2)
        own = self._noted(own)
        if self.main:
            warn_of_drift(own)
        if run is not None and self.main and own is not None:  # once more: the card and the config tell it as well
            self.tree.save_stitches(run.path("stitches"), overwrite=True)
        result = FitResult(
            reports=reports,
            explained=explained,
            history=history,
            skipped=dict(sorted(skipped.items())),
            steps=steps,
            pictures=len(self.train),
            seconds=self.clock.spent(),
            cache_bytes=self.cache_bytes,
            own=own,
        )
        if run is not None and self.main:
            run.finish(result.to_dict())
            drop_states(run)
        return result

    def _measured_trunk(self) -> Agreement | None:
        """How far the trunk's own features are from the published one's, where this fit tuned it."""
        if self.tuning is None or not self._own:
            return None
        return evaluate_trunk(self.tree, self.heldout_data, targets=self.teacher, indices=self.heldout)

    def _noted(self, own: Agreement | None) -> Agreement | None:
        """What the main process measured, noted in every process' tree."""
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [own]
        if self.tuning is not None:
            broadcast_object_list(told)
        if (own := told[0]) is not None and (tuned := self.tree.config.tuned) is not None:
            tuned = replace(tuned, own_error=own.error, own_channel_error=own.channel_error)
            self.tree.config = replace(self.tree.config, tuned=tuned)
        return own

    def _finished(self, run: Run) -> FitResult:
        """A run that had finished: stitches and results are read back, and what it tuned is merged if it was not."""
        self.tree.load_stitches(run.path("stitches"))
        if self.main:
            drop_states(run)  # left where it was stopped as it finished
        path = run.path("results.json")
        with as_written(path, "a fit"):
            return FitResult.from_dict(read_results(path, "a fit"))


def _began_without_weights(folder: Path) -> bool:
    """Whether the run in a folder was begun by a version that noted no weights, and so has none to compare."""
    before = begun_with(folder)
    return before is not None and "weights" not in before


def _reasons(skipped: Mapping[str, str]) -> str:
    shown = [f"{name}: {reason}" for name, reason in list(skipped.items())[:3]]
    return "; ".join(shown) + ("; ..." if len(skipped) > 3 else "")
