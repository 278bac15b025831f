"""A training run: build or load the model, train what is asked for, leave a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig

from llava_integration.models.llava import build_projector
from llava_integration.models.processing import image_tokens
from llava_integration.train import tuning
from llava_integration.train.card import language_model_of
from llava_integration.train.config import TrainerConfig, TuneConfig, processes
from llava_integration.train.content import check_pictures, noted
from llava_integration.train.data import Collate, Conversations, DataConfig
from llava_integration.train.export import clear, export
from llava_integration.train.model import ModelConfig
from llava_integration.train.start import ridge_start
from vst.data.images import PICTURE_MB
from vst.fit.allocator import keep_freed_memory
from vst.fit.op_builds import clear_stale_locks
from vst.results.finished import as_written, read_results
from vst.results.folders import Run, read_json
from vst.results.room import room_for
from vst.tree.config import VSTConfig
from vst.tree.folder import check_weights
from vst.tree.projector import ProjectorSpec
from vst.tree.splits import Split, as_split

RANDOM = "random"
_TRAINED = {
    "none": "the projector, with a frozen language model (stage 1)",
    "full": "projector and language model (stage 2)",
    "lora": "projector, and the language model by LoRA, which is folded in (stage 2)",
}
_TITLES = {"none": "stage 1 (projector)", "full": "stage 2", "lora": "stage 2 (LoRA)"}


def train(
    model: ModelConfig,
    data: DataConfig,
    out: str,
    tune: TuneConfig = TuneConfig(),  # noqa: B008 (frozen)
    split: int | dict[str, int] | str | None = None,
    batch_size: int | None = None,
    trainer: dict[str, Any] | None = None,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Train a language model on a tree, LLaVA's way: stage 1 the projector, stage 2 the language model with it.

    The folder that is left holds the whole model: after ``import llava_integration``, transformers'
    ``AutoModelForImageTextToText.from_pretrained(out)`` and ``AutoProcessor.from_pretrained(out)`` read it.

    Examples:
        torchrun --nproc_per_node 8 train/mllm.py --config configs/llava/pretrain.yaml \\
            --trainer.deepspeed configs/deepspeed/zero2.json
        torchrun --nproc_per_node 8 train/mllm.py --config configs/llava/finetune.yaml \\
            --trainer.deepspeed configs/deepspeed/zero3.json
        python train/mllm.py --config configs/llava/finetune.yaml --dry-run

    Args:
        model: which model.
        data: which conversations.
        out: run folder: config, environment, checkpoints, loss curve, and at the end the model.
        tune: what is trained.
        split: trunk depth that the tree is trained and left at, or one by branch; random draws one for each step, so
            that the model runs at every depth its tree holds (by branch where branches share less than two); default:
            the tree's own.
        batch_size: conversations a step over all processes; default: LLaVA-1.5's 256 (stage 1) or 128.
        trainer: any of transformers' TrainingArguments (--trainer.learning_rate 1e-3, --trainer.deepspeed FILE).
        dry_run: only check the options and print an estimate of memory by split depth.
        resume: go on where a killed run stopped; the result is that of an uninterrupted one. With DeepSpeed this
            unpickles the run's checkpoint, which can run code: resume only folders that you trust.
        overwrite: start the run in out again.

    Raises:
        ValueError: options that do not suit, a run that cannot be resumed.
        FileNotFoundError: a tree, language model, or data that are not there.
        NotFinite: a loss, gradient or weight that is not finite; nothing was exported, checkpoints before it are kept.
    """
    main = int(os.environ.get("RANK", "0")) == 0
    options = TrainerConfig(trainer or {})
    values = options.resolve(tune, batch_size, str(Path(out) / "checkpoints"), processes())
    tree, text, spec, full = model.plan()
    splits = _splits(split, tree, full)
    taken, times = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    if main and taken != options.at_a_time(tune):
        print(
            f"a step of {taken * times * processes()} conversations over {processes()} processes is {taken} at a time "
            f"and process, not {options.at_a_time(tune)}, and {times} of them a step"
        )
    if dry_run:
        _estimate(tree, text, spec, full, tune, data, values)
        return
    # Folders of runs from before there was a choice of picture_mb go on.
    chosen = {k: v for k, v in asdict(data).items() if (k, v) != ("picture_mb", PICTURE_MB)}
    config = {
        "model": asdict(model), "data": chosen, "tune": asdict(tune), "split": split, "batch_size": batch_size,
        "processes": processes(), "trainer": dict(trainer or {}),
    }  # fmt: skip
    folder = Path(out)
    run = None
    if main:
        config = noted(folder, config, model, data, resume)
        run = Run(folder, config, resume=resume and folder.exists(), overwrite=overwrite)
        if overwrite:
            clear(folder)
    if (folder / "results.json").is_file() and not overwrite:
        check_weights(folder)
        if main:
            shutil.rmtree(values["output_dir"], ignore_errors=True)  # left where it was stopped as it finished
            if not (folder / "loss.png").exists():
                with as_written(path := folder / "results.json", "a training"):
                    history = read_results(path, "a training").get("history", [])
                _draw(history, folder / "loss.png")
            print(f"{out} is complete; nothing was done (--overwrite starts it again).")
        return
    try:
        _train(model, data, folder, tune, split, splits, values, run)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"Out of memory ({str(error).split('.')[0]}); --dry-run estimates what a run needs: take a deeper split, a "
            "smaller trainer.per_device_train_batch_size, trainer.gradient_checkpointing true, ZeRO-3 or offload."
        ) from error
    finally:
        if run is not None:
            run.close()


def _train(
    model: ModelConfig, data: DataConfig, folder: Path, tune: TuneConfig, split: int | dict[str, int] | str | None,
    splits: Sequence[Split], values: dict[str, Any], run: Run | None,
) -> None:  # fmt: skip
    # What is imported here brings datasets and peft along, which nobody needs who only asks for the options.
    from transformers import TrainingArguments, set_seed

    from llava_integration.train.checkpoints import StopWhenTold, check_resumable, last_checkpoint
    from llava_integration.train.trainer import MLLMTrainer

    checkpoint = last_checkpoint(Path(values["output_dir"])) if run is not None else None
    if checkpoint is not None:
        check_resumable(checkpoint, engine=bool(values.get("deepspeed")))
    if run is not None and values.get("save_only_model"):
        print("trainer.save_only_model is true: a run that is stopped cannot be resumed, --overwrite starts it again")
    if values["use_cpu"]:
        keep_freed_memory()
    if values.get("deepspeed") and os.environ.get("LOCAL_RANK", "0") == "0":
        clear_stale_locks()
    seed = int(values.get("seed", 42))
    set_seed(seed)
    half = bool(values.get("bf16"))
    # The model is built before TrainingArguments: under ZeRO-3 those would have every part made in pieces.
    whole, processor = model.build(torch.bfloat16 if half else torch.float32, seed)
    dtypes = {name: tensor.dtype for name, tensor in whole.state_dict().items()}
    tower = whole.model.vision_tower
    if split is not None and split != RANDOM:
        tower.split = split
    tuner = tuning.prepare(whole, tune)
    if half:  # master weights of what is trained; autocast computes in bf16
        for p in whole.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        if tune.stitches:  # a norm does not take fp32 tokens and bf16 weights
            tower.float()
    vision: Any = whole.config.vision_config
    tree, spec = vision.tree_config(), _spec(whole.config)
    tokens = image_tokens(tree, spec)
    transform = processor.image_processor.transform()
    conversations = Conversations(data, processor.tokenizer, transform, tokens)
    conversations.check()
    told, cautions = conversations.survey()
    if run is not None:
        print(told)
        for caution in cautions:
            warnings.warn(caution, stacklevel=2)
        check_pictures(run, conversations.pictures(), data.images)
    args = TrainingArguments(**values)
    device = args.device  # asked for before the start, as it is what lets the processes speak to each other
    if tune.start == "ridge" and model.start is None:
        share = ridge_start(whole, conversations, tune.start_pictures, seed=seed, device=device, show=run is not None)
        if run is not None:
            print(f"the projector starts from a ridge fit that explains {100 * share:.0f} % of what answers name")
    trainer = MLLMTrainer(
        tune=tune,
        splits=splits,
        title=_TITLES[tune.llm],
        model=whole,
        args=args,
        train_dataset=conversations,
        data_collator=Collate(
            processor.tokenizer.pad_token_id, whole.config.image_token_id, tokens, transform.size
        ),
    )  # fmt: skip
    trainer.skipped.update(conversations.skipped)
    if run is not None:
        shown = sum(p.numel() for p in whole.parameters() if p.requires_grad)
        print(
            f"{len(conversations)} conversations, {tokens} tokens a picture, {shown / 1e6:.2f} M parameters trained, "
            f"{values['per_device_train_batch_size']} x {values['gradient_accumulation_steps']} x {processes()} a step"
        )
    checkpoint = _agreed(checkpoint)
    if checkpoint is not None and values.get("deepspeed") and run is not None:
        print(
            f"going on from DeepSpeed's checkpoint {checkpoint}, which is read by unpickling: files of somebody else "
            "could run code here, so resume only runs of your own."
        )
    with ExitStack() as block:
        trainer.add_callback(StopWhenTold(block, folder))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.finite.check_weights()
    with room_for(f"the model in {folder}", "make room and call again with --resume, which has only to write it"):
        export(trainer, tuner, processor, folder, dtypes, language_model_of(model), _TRAINED[tune.llm])
    skipped = _merged(trainer.skipped)
    if run is None:
        return
    history = [
        {"stage": _TITLES[tune.llm], **{k: row[k] for k in ("step", "loss", "learning_rate", "grad_norm") if k in row}}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    run.finish(
        {
            "steps": trainer.state.global_step,
            "seconds": trainer.spent(),
            "loss": history[-1]["loss"] if history else None,
            "skipped": skipped,
            "engine": type(trainer.model_wrapped).__name__,
            "history": history,
        }
    )
    shutil.rmtree(values["output_dir"], ignore_errors=True)
    _draw(history, folder / "loss.png")
    if skipped:
        print(f"skipped {len(skipped)} conversations or pictures; names and reasons: {folder}/results.json")
    print(f"{trainer.state.global_step} steps in {trainer.spent():.0f} s; model in {folder}")


def _draw(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The loss curve; what was trained is saved by now, so no plot can cost it."""
    from llava_integration.train.plots import loss_curve

    try:
        loss_curve(history, path)
    except Exception as error:  # whatever a plotting library raises
        warnings.warn(f"{path} could not be drawn ({error}); results.json holds the losses.", stacklevel=2)


def _spec(config: LlavaConfig) -> ProjectorSpec:
    return config.projector_spec() if hasattr(config, "projector_spec") else ProjectorSpec()


def _splits(split: int | dict[str, int] | str | None, tree: VSTConfig, full: bool) -> Sequence[Split]:
    """Splits to draw from: those in common, else all that the branches' own make together; empty: nothing to draw."""
    if split is None:
        return []
    if full or not tree.branches:
        raise ValueError(f"split is {split!r}, but this tower has no stitches and no split; leave it out.")
    if split != RANDOM:
        try:
            chosen = as_split(split)
        except ValueError as error:
            raise ValueError(
                f"split is {split!r}; expected a trunk depth, one for each branch, {RANDOM!r}, or nothing for the "
                "tree's own."
            ) from error
        tree.resolve(chosen)
        return []
    if len(tree.splits) > 1:
        return tree.splits
    names = [b.name for b in tree.branches]
    apart = [dict(zip(names, own, strict=True)) for own in product(*(b.splits for b in tree.branches))]
    if len(apart) < 2:
        raise ValueError(f"split is {RANDOM!r}, but the tree holds one split alone, {apart[0]}; leave it out.")
    return apart


def _agreed(checkpoint: Path | None) -> Path | None:
    """The main process' choice, in all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return checkpoint
    box = [checkpoint]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _merged(skipped: Mapping[str, str]) -> dict[str, str]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(sorted(skipped.items()))
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, dict(skipped))
    return dict(sorted((k, v) for part in parts for k, v in part.items()))


def _estimate(
    tree: VSTConfig, text: Any, spec: ProjectorSpec, full: bool, tune: TuneConfig, data: DataConfig,
    values: dict[str, Any],
) -> None:  # fmt: skip
    """Print what the run would need, at every split."""
    from llava_integration.train.memory import Plan, estimate, memory_table

    half = bool(values.get("bf16"))
    zero: dict[str, Any] = {}
    if values.get("deepspeed"):
        facts = values["deepspeed"]
        facts = facts if isinstance(facts, dict) else read_json(facts, "mend it (trainer.deepspeed)")
        zero = facts.get("zero_optimization", {})
    with torch.device("meta"):
        projector = build_projector(tree, spec, text.hidden_size)
    plan = Plan(
        projector=tune.projector,
        llm=tune.llm,
        lora_parameters=tuning.lora_parameters(text, tune) if tune.llm == "lora" else 0,
        stitches=tune.stitches,
        param_bytes=2 if half else 4,
        master=half,
        zero=zero.get("stage", 0),
        offload_optimizer="offload_optimizer" in zero,
        offload_params="offload_param" in zero,
        processes=processes(),
        batch=values["per_device_train_batch_size"],
        length=data.max_length,
        checkpointing=bool(values.get("activation_checkpointing") or values.get("gradient_checkpointing")),
    )
    splits: list[Any] = ["full"] if full else list(tree.choices().values()) or [{}]
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    print(
        f"{plan.processes} processes, ZeRO stage {plan.zero}, {plan.precision}, {plan.batch} x {plan.length} tokens a "
        f"device, {image_tokens(tree, spec)} of them a picture's; language model tuned: {tune.llm}"
    )
    memory_table(estimate(tree, text, sum(p.numel() for p in projector.parameters()), plan, splits), device)
