"""A training run: build or load the model, train what is asked for, leave a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import reduce
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from llava_integration.models import assemble
from llava_integration.models.llava import build_projector
from llava_integration.models.processing import image_tokens
from llava_integration.train import tuning
from llava_integration.train.config import TrainerConfig, TuneConfig, processes
from llava_integration.train.data import Collate, Conversations, DataConfig
from llava_integration.train.start import ridge_start
from vst.fit.allocator import keep_freed_memory
from vst.results.folders import Run, read_json
from vst.tree.baseline import FullTower
from vst.tree.config import Split, VSTConfig, as_split
from vst.tree.encoder import VSTEncoder
from vst.tree.options import TreeArgs
from vst.tree.projector import ProjectorSpec
from vst.tree.saving import read_config, weight_files

if TYPE_CHECKING:
    from llava_integration.train.trainer import MLLMTrainer

RANDOM, STAGING = "random", ".model"
# What transformers writes of a model and its processor beside the weights, whichever kind they are of.
_OF_A_MODEL = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json", "chat_template.*",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
)  # fmt: skip
_TITLES = {"none": "stage 1 (projector)", "full": "stage 2", "lora": "stage 2 (LoRA)"}


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained: a new one from tower and language model, or one that an earlier stage saved.

    Attributes:
        start: folder of an earlier stage; tower, llm, projector and template are its own then.
        llm: causal language model: folder (``~`` is home) or hub id.
        tower: folder or hub id of a saved tree.
        tree: a tree to build from its models instead: for towers without stitches.
        full: the models of the tree in full, without stitches: the baseline.
        fusion: of the tower's branches; default: as the tree was saved.
        projector: kind and, for one projector a branch, fusion.
        template: chat template: a name (vicuna) or a .jinja file; default: the language model's own.
    """

    start: str | None = None
    llm: str | None = None
    tower: str | None = None
    tree: TreeArgs | None = None
    full: bool = False
    fusion: str | None = None
    projector: ProjectorSpec = field(default_factory=ProjectorSpec)
    template: str | None = None

    def __post_init__(self) -> None:
        if self.start is not None:
            if self.llm or self.tower or self.tree:
                raise ValueError("model.start brings its own tower and language model; leave tower, tree and llm out.")
        elif self.llm is None or (self.tower is None) == (self.tree is None):
            raise ValueError(
                "A new model needs model.llm and one of model.tower (a saved tree) and model.tree (one to build); or "
                "give model.start, the folder of an earlier stage."
            )

    def plan(self) -> tuple[VSTConfig, Any, ProjectorSpec, bool]:
        """Tree, language model's config, projector and ``full``, from configs alone."""
        if self.start is not None:
            config = _start_config(self.start)
            spec = config.projector_spec() if hasattr(config, "projector_spec") else ProjectorSpec()
            vision: Any = config.vision_config
            return vision.tree_config(), config.text_config, spec, vision.full
        tree = read_config(self.tower)[1] if self.tower is not None else self.tree.plan()  # type: ignore[union-attr]
        if self.fusion is not None:
            with torch.device("meta"):
                tree = VSTEncoder(tree).set_fusion(self.fusion).config
        try:
            text = AutoConfig.from_pretrained(os.path.expanduser(str(self.llm)))
        except OSError as error:
            raise FileNotFoundError(
                f"The language model {self.llm!r} cannot be read: give a folder that save_pretrained wrote, or a hub "
                "id that can be reached."
            ) from error
        return tree, text, self.projector, self.full

    def build(self, dtype: torch.dtype, seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
        """The model, weights in ``dtype``, with its processor."""
        if self.start is not None:
            return assemble.load(self.start, dtype)  # type: ignore[return-value]
        tree: Any
        if self.full:
            tree = FullTower.from_config(self.plan()[0])
        else:
            tree = VSTEncoder.from_pretrained(self.tower) if self.tower is not None else VSTEncoder.from_args(self.tree)  # type: ignore[arg-type]
            if self.fusion is not None:
                tree.set_fusion(self.fusion)
        lm, tokenizer = assemble.load_language_model(self.llm, dtype)  # type: ignore[arg-type]
        model, processor = assemble.assemble(
            tree.to(dtype), lm, tokenizer, projector=self.projector, template=self.template, seed=seed
        )
        model.to(dtype=dtype)  # type: ignore[call-arg]
        return model, processor


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
        resume: go on where a killed run stopped; the result is that of an uninterrupted one.
        overwrite: start the run in out again.
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
    config = {
        "model": asdict(model), "data": asdict(data), "tune": asdict(tune), "split": split, "batch_size": batch_size,
        "processes": processes(), "trainer": dict(trainer or {}),
    }  # fmt: skip
    folder = Path(out)
    run = None
    if main:
        run = Run(folder, config, resume=resume and folder.exists(), overwrite=overwrite)
        if overwrite:
            _clear(folder)
    if (folder / "results.json").is_file() and not overwrite:
        if main:
            print(f"{out} is complete; nothing was done (--overwrite starts it again).")
        return
    try:
        _train(model, data, folder, tune, split, splits, values, run)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"Out of memory ({str(error).split('.')[0]}); --dry-run estimates what a run needs: take a deeper split, a "
            "smaller trainer.per_device_train_batch_size, trainer.gradient_checkpointing true, ZeRO-3 or offload."
        ) from error


def _train(
    model: ModelConfig, data: DataConfig, folder: Path, tune: TuneConfig, split: int | dict[str, int] | str | None,
    splits: Sequence[Split], values: dict[str, Any], run: Run | None,
) -> None:  # fmt: skip
    # What is imported here brings datasets and peft along, which nobody needs who only asks for the options.
    from transformers import TrainingArguments, set_seed

    from llava_integration.train.trainer import MLLMTrainer, last_checkpoint

    began = time.monotonic()
    if values["use_cpu"]:
        keep_freed_memory()
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
    checkpoint = last_checkpoint(Path(values["output_dir"])) if run is not None else None
    checkpoint = _agreed(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    _export(trainer, tuner, processor, folder, dtypes)
    skipped = _merged(trainer.skipped)
    if run is None:
        return
    history = [
        {"stage": _TITLES[tune.llm], **{k: row[k] for k in ("step", "loss", "learning_rate", "grad_norm") if k in row}}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    from llava_integration.train.plots import loss_curve

    loss_curve(history, folder / "loss.png")
    shutil.rmtree(values["output_dir"], ignore_errors=True)
    run.finish(
        {
            "steps": trainer.state.global_step,
            "seconds": time.monotonic() - began,
            "loss": history[-1]["loss"] if history else None,
            "skipped": skipped,
            "engine": type(trainer.model_wrapped).__name__,
            "history": history,
        }
    )
    if skipped:
        print(f"skipped {len(skipped)} conversations or pictures; names and reasons: {folder}/results.json")
    print(f"{trainer.state.global_step} steps in {time.monotonic() - began:.0f} s; model in {folder}")


def _spec(config: LlavaConfig) -> ProjectorSpec:
    return config.projector_spec() if hasattr(config, "projector_spec") else ProjectorSpec()


def _start_config(folder: str) -> LlavaConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{folder} holds no model that an earlier stage left (model.start): give the folder of a finished run."
        ) from error
    if not isinstance(config, LlavaConfig) or not hasattr(config.vision_config, "tree_config"):
        raise ValueError(
            f"{folder} holds a {config.model_type} model, expected a language model on a tree (model.start)."
        )
    return config


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


def _clear(folder: Path) -> None:
    """Take away what a run before left, so that nothing of it is taken for the new run's."""
    for name in ("checkpoints", STAGING):
        shutil.rmtree(folder / name, ignore_errors=True)
    own = (path.name for pattern in _OF_A_MODEL for path in folder.glob(pattern))
    for name in (*weight_files(folder), *own):
        (folder / name).unlink()


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


def _export(
    trainer: MLLMTrainer, tuner: Any, processor: LlavaProcessor, folder: Path, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Write the model beside the run's files; config.json, which says that there is a model, comes last.

    Args:
        trainer: that has trained it.
        tuner: LoRA's, to be folded in, or None.
        processor: of the model.
        folder: the run's.
        dtypes: by name, the type in which each tensor was built: it is saved in it, whatever it was trained in.
    """
    engine: Any = trainer.deepspeed
    zero3 = trainer.is_deepspeed_enabled and engine.zero_optimization_stage() == 3
    model = trainer.accelerator.unwrap_model(trainer.model)
    gathered: Any = nullcontext()
    if zero3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0)
    with gathered:
        if not trainer.args.should_save:
            return
        if tuner is not None:
            tuner.merge_and_unload()
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        tensors = {k: v.detach().to("cpu", dtypes[k]) for k, v in model.state_dict().items()}
        model.config.use_cache = True
        model.save_pretrained(staging, state_dict=tensors)
        # The config's one type is what the whole is loaded in. transformers takes it from the first parameter, which
        # may be a master weight; the widest of those that were written loses nothing of any.
        kinds = {v.dtype for v in tensors.values() if v.is_floating_point()}
        model.config.dtype = reduce(torch.promote_types, kinds)
        model.config.save_pretrained(staging)
        processor.save_pretrained(staging)
    files = sorted(staging.iterdir(), key=lambda p: p.name == "config.json")
    for path in files:
        os.replace(path, folder / path.name)
    staging.rmdir()


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
        facts = facts if isinstance(facts, dict) else read_json(facts)
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
        checkpointing=bool(values.get("gradient_checkpointing")),
    )
    splits: list[Any] = ["full"] if full else list(tree.choices().values()) or [{}]
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    print(
        f"{plan.processes} processes, ZeRO stage {plan.zero}, {plan.precision}, {plan.batch} x {plan.length} tokens a "
        f"device, {image_tokens(tree, spec)} of them a picture's; language model tuned: {tune.llm}"
    )
    memory_table(estimate(tree, text, sum(p.numel() for p in projector.parameters()), plan, splits), device)
