"""How much memory training and inference take, by split depth, before anything is loaded.

Everything here is an estimate from configs: models are counted on the meta device, activations by formula. Not counted:
the framework itself, the allocator's fragments, buffers of communication, activations of the projector.

What a weight costs in training with AdamW, in bytes:

    precision   frozen   trained: weight + gradient + optimizer
    fp32        4        4 + 4 + 8        (DeepSpeed steps on a copy here too: 4 more)
    autocast    4        4 + 4 + 8        HF Trainer with bf16=True, model loaded in fp32
    mixed       2        4 + 4 + 8        the same, frozen parts loaded in bf16 (beside trained stitches: in fp32)
    mixed       2        2 + 2 + 4 + 8    DeepSpeed's bf16 engine (ZeRO): bf16 weights beside fp32 masters
    bf16        2        2 + 2 + 4        model loaded in bf16: AdamW's moments have the dtype of the weights

The 16 bytes of DeepSpeed's engine and what each ZeRO stage divides among the processes are those of Rajbhandari et al.
2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 3.1 and figure 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vst.measure.cost import activation_bytes, full_cost, tree_cost
from vst.results.tables import table
from vst.tree.config import VSTConfig
from vst.tree.encoder import VSTEncoder
from vst.tree.splits import split_label

Split = int | Mapping[str, int] | Literal["full"]

# DeepSpeed's default of stage3_max_live_parameters: weights that a process may hold gathered under ZeRO-3.
_LIVE = 1_000_000_000
# Bytes a token and unit of width that a plain block keeps for its backward pass in 16 bit, the attention matrix left
# out: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", equation 1.
_BLOCK = 34


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained and how.

    Attributes:
        projector: whether the projector is trained.
        llm: none, full or lora.
        lora_parameters: of LoRA's factors.
        stitches: whether the stitches are trained.
        param_bytes: bytes a weight of the frozen parts: 2 (bf16) or 4 (fp32).
        master: mixed precision: computes in bf16, AdamW steps on fp32 weights of what is trained.
        zero: ZeRO stage; 0 is no DeepSpeed.
        offload_optimizer, offload_params: to main memory (``offload_optimizer``, ``offload_param`` of DeepSpeed).
        processes: one a device.
        batch: sequences a device, each with one picture.
        length: tokens of a sequence, the picture's included.
        checkpointing: whether the language model's layers recompute their activations.

    Raises:
        ValueError: nothing is trained, or values that do not go together.
    """

    projector: bool = True
    llm: str = "none"
    lora_parameters: int = 0
    stitches: bool = False
    param_bytes: int = 2
    master: bool = True
    zero: int = 0
    offload_optimizer: bool = False
    offload_params: bool = False
    processes: int = 1
    batch: int
    length: int
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, known in (("llm", ("none", "full", "lora")), ("param_bytes", (2, 4)), ("zero", (0, 1, 2, 3))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(str, known))}.")
        for name in ("processes", "batch", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not (self.projector or self.stitches or self.llm != "none"):
            raise ValueError("Nothing is trained; set projector, stitches or llm.")
        if (self.llm == "lora") != (self.lora_parameters > 0):
            raise ValueError(
                f"llm is {self.llm!r} with {self.lora_parameters} lora_parameters; expected them with 'lora' alone."
            )
        if self.zero and self.master != (self.param_bytes == 2):
            raise ValueError(
                f"ZeRO with param_bytes {self.param_bytes} and master {self.master}: DeepSpeed keeps frozen weights in "
                "bf16 and has fp32 masters (2 and True), or computes in fp32 (4 and False)."
            )
        if (self.offload_optimizer and not self.zero) or (self.offload_params and self.zero != 3):
            raise ValueError(
                f"Offload with ZeRO stage {self.zero}: the optimizer is offloaded from stage 1 on, weights at stage 3."
            )

    @property
    def precision(self) -> str:
        """fp32, autocast, mixed or bf16: see the table at the top of this file."""
        return {(4, False): "fp32", (4, True): "autocast", (2, True): "mixed", (2, False): "bf16"}[
            self.param_bytes, self.master
        ]

    @property
    def autocast(self) -> bool:
        """Whether torch casts from fp32 to bf16 while it computes (DeepSpeed's engine holds bf16 weights instead)."""
        return self.master and not self.zero

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in products and activations."""
        return 2 if self.master else self.param_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained weight, and of its gradient."""
        return 4 if self.autocast else self.param_bytes

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's state for a trained weight: two moments and, under ZeRO, the fp32 copy that it steps on."""
        return (8 if self.master else 2 * self.param_bytes) + (4 if self.zero else 0)


@dataclass(frozen=True)
class Row:
    """Bytes at one split.

    Attributes:
        label: of the split.
        tower, llm, projector: weights, of one whole copy.
        gradients, optimizer: of one whole copy.
        activations: of one device: the tower's working set and what the language model keeps for the backward pass.
        logits: of one device: in fp32, and their gradient.
        inference: of the whole model on one device: weights, key-value cache of ``length`` tokens, working set.
        per_device: all of it that one device holds in training, after ZeRO and offload.
        host: what one process keeps in main memory instead.
    """

    label: str
    tower: int
    llm: int
    projector: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    inference: int
    per_device: int = 0
    host: int = 0

    @property
    def weights(self) -> int:
        """All weights."""
        return self.tower + self.llm + self.projector

    @property
    def total(self) -> int:
        """What training takes where nothing is shared: one process without ZeRO."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def language_model_parameters(config: PreTrainedConfig) -> int:
    """Parameters of a causal language model, from its config alone; tied ones count once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def estimate(
    tree_config: VSTConfig,
    text_config: PreTrainedConfig,
    projector_parameters: int,
    plan: Plan,
    splits: Iterable[Split],
) -> list[Row]:
    """A row for each split, as if the tower were loaded with no more than that split needs.

    Args:
        tree_config: of the tower.
        text_config: of the language model, its vocabulary as it is trained (with the image token).
        projector_parameters: of the projector.
        plan: what is trained and how.
        splits: as ``tree(x, split=...)`` takes them; ``"full"`` is every model in full, without stitches.

    Raises:
        ValueError: a split that the tree does not hold, or a language model whose config lacks its widths.
    """
    llm = language_model_parameters(text_config)
    kept, cache, block = _language_model(text_config, plan, llm)
    working = activation_bytes(tree_config, plan.batch, torch.bfloat16 if plan.compute_bytes == 2 else torch.float32)
    frozen, own = plan.param_bytes, plan.trained_bytes
    rows = []
    for split in splits:
        tower = _tower_parameters(tree_config, split)
        stitches = _stitch_parameters(tree_config, split) if plan.stitches else 0
        trained = stitches + plan.lora_parameters
        trained += projector_parameters if plan.projector else 0
        trained += llm if plan.llm == "full" else 0
        row = Row(
            label=_label(split),
            tower=tower * (own if plan.stitches else frozen),
            llm=llm * (own if plan.llm == "full" else frozen) + plan.lora_parameters * own,
            projector=projector_parameters * (own if plan.projector else frozen),
            gradients=trained * own,
            optimizer=trained * plan.optimizer_bytes,
            activations=working + kept + (_tail_activations(tree_config, split, plan) if plan.stitches else 0),
            logits=2 * 4 * plan.batch * plan.length * text_config.vocab_size,
            inference=(tower + llm + projector_parameters) * plan.compute_bytes + cache + max(working, block),
        )
        device, host = _divided(row, trained, plan)
        rows.append(replace(row, per_device=device, host=host))
    return rows


def memory_table(rows: Sequence[Row], device_bytes: int | None = None) -> None:
    """Print the rows; with the memory of a device, what does not fit it is marked.

    Args:
        rows: of :func:`estimate`.
        device_bytes: memory of one device; None leaves the marks out.
    """
    unit, name = (1e9, "GB") if max(row.total for row in rows) >= 1e9 else (1e6, "MB")
    lines = {
        "tower": "tower",
        "language model": "llm",
        "projector": "projector",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "activations": "activations",
        "logits": "logits",
        "training, one process without ZeRO": "total",
        "training, a device of this plan": "per_device",
        "training, main memory of a process": "host",
        "inference, one device": "inference",
    }
    cells = [[line, *(f"{getattr(row, key) / unit:.2f}" for row in rows)] for line, key in lines.items()]
    if device_bytes is not None:
        for line, key in (("training", "per_device"), ("inference", "inference")):
            over = [getattr(row, key) - device_bytes for row in rows]
            marks = ["yes" if more <= 0 else f"NO, {more / unit:.2f} over" for more in over]
            cells.append([f"{line} fits {device_bytes / unit:.2f} {name}", *marks])
    table(
        f"Memory by split, {name}",
        ["", *(row.label for row in rows)],
        cells,
        "an estimate; not counted: the framework, the allocator's fragments, buffers of communication",
    )


def _tower_parameters(tree: VSTConfig, split: Split) -> int:
    return (full_cost(tree) if split == "full" else tree_cost(tree, split)).parameters


def _stitch_parameters(tree: VSTConfig, split: Split) -> int:
    if split == "full":
        return 0
    branches, chosen = VSTEncoder.skeleton(tree).branches, tree.resolve(split)
    stitches = [branch.stitches[str(chosen[name])] for name, branch in branches.items()]
    return sum(p.numel() for stitch in stitches for p in stitch.parameters() if p.requires_grad)


def _tail_activations(tree: VSTConfig, split: Split, plan: Plan) -> int:
    """What the tails behind trained stitches keep: an upper bound, since their own weights are frozen."""
    if split == "full":
        return 0
    chosen = tree.resolve(split)
    units = sum(
        (b.stop - b.enter(chosen[b.name])) * (tree.grid**2 + b.spec.prefix) * b.spec.width for b in tree.branches
    )
    return plan.batch * units * _BLOCK * plan.compute_bytes // 2


def _language_model(text: PreTrainedConfig, plan: Plan, parameters: int) -> tuple[int, int, int]:
    """Bytes kept for the backward pass, of the key-value cache, and of a block's working set in inference.

    Counted as Korthikanti et al. do (section 4.1), tensor by tensor, for what transformers' layers of Llama's make keep
    where they have 34 h: norms in fp32, no dropout, fewer keys and values than queries, a gated MLP. Attention is
    SDPA, which does not keep the attention matrix (their 5 a s^2). Recomputing layers keep their input alone, and one
    of them at a time everything (section 5). The working set is that of :func:`vst.measure.cost.activation_bytes`.
    """
    try:
        width, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    except AttributeError as error:
        raise ValueError(
            f"The memory of a {text.model_type} model cannot be told: its config lacks a width ({error}); the estimate "
            "is written for language models of Llama's make."
        ) from error
    head = getattr(text, "head_dim", None) or width // heads
    queries, keys = heads * head, (getattr(text, "num_key_value_heads", None) or heads) * head
    trained, size = plan.llm != "none", plan.compute_bytes
    cast = plan.autocast and (plan.llm == "full" or plan.param_bytes == 4)
    stream = 4 if cast else size  # of the residual stream
    norm = 4 * width + (stream * width if trained else 0)  # its fp32 input and, for its own weights, its output
    attention = size * (2 * queries + 2 * keys)  # queries, keys, values, output
    mlp = size * inner * (4 if trained else 3)  # gate, activated gate, other half and, for the last matrix, product
    # What matrices with gradients read: shared by query, key, value and by gate, up, unless each casts it for itself.
    inputs = size * width * (5 if cast else 2) if trained else 0
    tokens = plan.batch * plan.length
    layer = tokens * (2 * norm + attention + mlp + inputs)
    kept = text.num_hidden_layers * (tokens * stream * width if plan.checkpointing else layer) + tokens * norm
    kept += layer if plan.checkpointing else 0
    if cast and (plan.llm == "full" or not plan.checkpointing):
        kept += 2 * parameters  # autocast's bf16 copies, which live until the backward pass
    cache = 2 * text.num_hidden_layers * tokens * keys * size
    return kept, cache, tokens * size * (3 * width + 2 * inner)


def _divided(row: Row, trained: int, plan: Plan) -> tuple[int, int]:
    """Bytes on one device and in main memory: ZeRO-1 divides optimizer states, 2 also gradients, 3 also weights."""

    def share(size: int, stage: int) -> int:
        return -(-size // plan.processes) if plan.zero >= stage else size

    weights, gradients, optimizer = share(row.weights, 3), share(row.gradients, 2), share(row.optimizer, 1)
    host = 0
    if not plan.zero and plan.processes > 1:
        gradients *= 2  # DistributedDataParallel's buckets (gradient_as_bucket_view is False by default)
    if plan.offload_params:
        host, weights = host + weights, 0
    if plan.offload_optimizer:
        host, optimizer = host + optimizer, 0
        if plan.zero > 1:  # gradients follow, and are added up in fp32 (Ren et al. 2021, "ZeRO-Offload")
            host, gradients = host + share(4 * trained, 2), 0
    if plan.zero == 3:
        weights += min(_LIVE * plan.param_bytes, row.weights)  # gathered for the layers at work
    return weights + gradients + optimizer + row.activations + row.logits, host


def _label(split: Split) -> str:
    if split == "full":
        return "all in full"
    if isinstance(split, Mapping):
        return f"VST-{split_label(split)}" if split else "trunk alone"
    return f"VST-{split}"
