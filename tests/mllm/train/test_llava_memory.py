"""The estimate of memory against real models, real steps, what autograd really keeps, and loops written out."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from llava_integration.train.memory import Plan, estimate, language_model_parameters, memory_table
from vst import VSTConfig, VSTEncoder
from vst.measure.cost import activation_bytes, full_cost
from vst.models.spec import VFMSpec
from vst.tree.config import BranchConfig
from vst.tree.stitches import StitchSpec

VICUNA_7B = LlamaConfig(  # as in its config.json
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)


def tiny_llama(**options):
    values = {
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 100,
    }  # fmt: skip
    return LlamaConfig(**{**values, **options})


def large_tree():
    """DINOv2-L with a branch of CLIP-L's size at 336 pixels."""
    spec = VFMSpec(source="x", family="vit", width=1024, depth=24, heads=16, patch=14, hidden=4096, image_size=336)
    return VSTConfig(spec, (BranchConfig("b", spec, (6, 14, 22), (6, 14, 22), 23, StitchSpec("mlp")),), 24)


def plan(**options):
    return Plan(**{"batch": 2, "length": 24, **options})


def bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("tied", [True, False])
def test_language_models_are_counted_as_built(tied):
    config = tiny_llama(tie_word_embeddings=tied)
    assert language_model_parameters(config) == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def test_the_published_size_of_llama_2_7b():
    assert language_model_parameters(VICUNA_7B) == 6_738_415_616


STEPS = [
    (precision, bits, master, trained, 1)
    for precision, bits, master in (("fp32", 4, False), ("autocast", 4, True), ("mixed", 2, True), ("bf16", 2, False))
    for trained in ("projector", "stitches", "full", "all")
]


@pytest.mark.parametrize(("precision", "frozen_bytes", "master", "trained", "split"), STEPS)
def test_weights_gradients_and_optimizer_are_those_of_a_real_step(
    tree_of, tmp_path, precision, frozen_bytes, master, trained, split
):
    whole = tree_of("dinov2", "clip")
    tree = VSTEncoder.from_pretrained(whole.save_pretrained(tmp_path / "tree"), splits=[split])
    llm = LlamaForCausalLM(tiny_llama()).train()
    projector = nn.Linear(tree.width, 64)
    parts = {"projector": projector, "stitches": nn.ModuleList(tree.stitches().values()), "full": llm}
    for module in (tree, llm, projector):
        module.requires_grad_(False)
        if frozen_bytes == 2:
            module.to(torch.bfloat16)
    wanted = list(parts) if trained == "all" else [trained]
    for name in wanted:
        for p in parts[name].parameters():
            p.data = p.data.float() if master else p.data
            p.requires_grad = True
    if master and "stitches" in wanted:  # as training does: a tail in bf16 does not take the tokens of an fp32 stitch
        tree.float()
    everything = nn.ModuleList([tree, llm, projector])
    optimizer = torch.optim.AdamW([p for p in everything.parameters() if p.requires_grad])
    dtype = torch.bfloat16 if frozen_bytes == 2 else torch.float32
    pixels = torch.randn(2, 3, tree.image_size, tree.image_size, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=master):
        words = llm.get_input_embeddings()(torch.arange(8).expand(2, 8))
        embeddings = torch.cat([projector(tree(pixels, split=split)), words], 1)
        llm(inputs_embeds=embeddings, labels=torch.zeros(embeddings.shape[:2], dtype=torch.long)).loss.backward()
    optimizer.step()

    (row,) = estimate(
        whole.config,
        llm.config,
        sum(p.numel() for p in projector.parameters()),
        plan(
            projector="projector" in wanted,
            stitches="stitches" in wanted,
            llm="full" if "full" in wanted else "none",
            param_bytes=frozen_bytes,
            master=master,
        ),
        [split],
    )
    assert plan(param_bytes=frozen_bytes, master=master).precision == precision
    assert row.tower == bytes_of(tree.state_dict().values())
    assert row.llm == bytes_of(llm.parameters())
    assert row.projector == bytes_of(projector.parameters())
    assert row.gradients == bytes_of(p.grad for p in everything.parameters() if p.grad is not None)
    states = [v for state in optimizer.state.values() for name, v in state.items() if name != "step"]
    assert row.optimizer == bytes_of(states)
    assert row.total == row.weights + row.gradients + row.optimizer + row.activations + row.logits


def _kept(module, run):
    """Bytes that autograd keeps of a forward pass, but for the module's own weights."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert run().requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("llm", ["none", "full"])
@pytest.mark.parametrize(
    ("frozen_bytes", "master", "zero"), [(4, False, 0), (4, True, 0), (2, True, 0), (2, True, 2), (2, False, 0)]
)
def test_a_layer_keeps_what_autograd_keeps(frozen_bytes, master, zero, llm, checkpointing):
    """The difference between six layers and three, measured and estimated."""
    options = plan(llm=llm, param_bytes=frozen_bytes, master=master, zero=zero, checkpointing=checkpointing, length=64)
    widths = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 3}
    fp32 = frozen_bytes == 4 or (llm == "full" and options.autocast)
    dtype = torch.float32 if fp32 else torch.bfloat16
    measured, estimated = [], []
    for layers in (6, 3):
        config = tiny_llama(num_hidden_layers=layers, **widths)
        model = LlamaForCausalLM(config).to(dtype).train().requires_grad_(llm == "full")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        x = torch.randn(2, 64, 192, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.autocast):
            measured.append(_kept(model, lambda m=model, x=x: m.model(inputs_embeds=x, use_cache=False)[0]))
        if checkpointing and options.autocast and llm == "full":  # autocast's own cache, which autograd does not see
            measured[-1] += 2 * language_model_parameters(config)
        estimated.append(estimate(large_tree(), config, 10, options, [22])[0].activations)
    assert estimated[0] - estimated[1] == pytest.approx(measured[0] - measured[1], rel=0.01)


def test_a_whole_model_keeps_its_layers_and_one_norm():
    config = tiny_llama(hidden_size=192, intermediate_size=512, num_attention_heads=6)
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    x = torch.randn(2, 64, 192, dtype=torch.bfloat16, requires_grad=True)
    measured = _kept(model, lambda: model.model(inputs_embeds=x, use_cache=False)[0])
    (row,) = estimate(large_tree(), config, 10, plan(llm="full", master=False, length=64), [22])
    assert row.activations - activation_bytes(large_tree(), 2, torch.bfloat16) == pytest.approx(measured, rel=0.01)


def test_recomputing_layers_hold_one_layer_and_all_inputs():
    def kept(layers, checkpointing):
        config = tiny_llama(num_hidden_layers=layers)
        return estimate(large_tree(), config, 10, plan(checkpointing=checkpointing), [22])[0].activations

    inputs = 2 * 24 * 64 * 2
    assert kept(1, True) == kept(1, False) + inputs
    assert kept(9, True) == kept(1, True) + 8 * inputs


def test_layers_keep_more_than_the_published_34_bytes_but_not_much():
    """The paper's block has a plain MLP of four widths and norms in 16 bit; Llama's three matrices of 8/3 widths."""
    widths = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12, "num_key_value_heads": 12}
    one, two = (
        estimate(large_tree(), tiny_llama(num_hidden_layers=n, **widths), 1, plan(llm="full", zero=2), [22])[0]
        for n in (1, 2)
    )
    assert 34 < (two.activations - one.activations) / (2 * 24 * 768) < 1.4 * 34


def test_activations_of_trained_stitches_are_bounded(tree_of):
    tree = tree_of("dinov2", "clip")
    options = {"param_bytes": 4, "master": False}
    x = torch.randn(2, 17, 48, requires_grad=True)
    measured = _kept(tree, lambda: tree.branches["clip"].run_tail(x, 1))
    without, added = (
        estimate(tree.config, tiny_llama(), 10, plan(stitches=stitches, **options), [1])[0].activations
        for stitches in (False, True)
    )
    assert measured <= added - without < 3 * measured


def test_the_cache_of_keys_and_values_is_a_real_one():
    config = tiny_llama()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        LlamaForCausalLM(config)(torch.zeros(2, 24, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = bytes_of(t for layer in cache.layers for t in (layer.keys, layer.values))
    options = plan(param_bytes=4, master=False)
    two, four = (
        estimate(large_tree(), tiny_llama(num_key_value_heads=heads), 0, options, [22])[0].inference for heads in (2, 4)
    )
    weights = 3 * 64 * 2 * 32 * 4  # of two more heads of keys and values in each layer
    assert four - two == weights + real


def test_logits_are_told_in_fp32_with_their_gradient():
    (row,) = estimate(large_tree(), tiny_llama(), 10, plan(), [22])
    assert row.logits == 2 * torch.empty(2, 24, 100, dtype=torch.float32).nbytes


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("frozen_bytes", [2, 4])
def test_zero_divides_as_if_dealt_one_by_one(tree_of, stage, processes, frozen_bytes):
    config = tiny_llama(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    options = plan(llm="full", zero=stage, processes=processes, param_bytes=frozen_bytes, master=frozen_bytes == 2)
    (row,) = estimate(tree_of("dinov2", "clip").config, config, 1000, options, [3])
    trained = 1000 + language_model_parameters(config)
    fixed = row.activations + row.logits + (row.weights if stage == 3 else 0)  # weights that are gathered
    held = [fixed] * processes
    frozen = row.tower // frozen_bytes
    for i in range(trained + frozen):
        for p in range(processes):
            mine = i % processes == p
            held[p] += frozen_bytes if mine or stage < 3 else 0
            if i < trained:
                held[p] += frozen_bytes if mine or stage < 2 else 0
                held[p] += 12 if mine else 0
    assert row.per_device == pytest.approx(max(held), abs=3 * 16)
    assert row.host == 0


def test_sixteen_bytes_a_trained_weight_and_what_zero_leaves():
    """Figure 1 of the ZeRO paper: 7.5 billion weights on 64 devices hold 120, 31.4, 16.6 and 1.9 GB."""
    weights, devices = 7.5e9, 64
    for stage, gigabytes in ((1, 31.4), (2, 16.6), (3, 1.9)):
        options = plan(llm="full", zero=stage, processes=devices)
        w, g, o = options.trained_bytes, options.trained_bytes, options.optimizer_bytes
        assert w + g + o == 16
        assert 16 * weights / 1e9 == 120
        held = [x / (devices if stage >= first else 1) for x, first in ((w, 3), (g, 2), (o, 1))]
        assert round(sum(held) * weights / 1e9, 1) == gigabytes
    (row,) = estimate(large_tree(), VICUNA_7B, 0, plan(llm="full", projector=False, zero=2, processes=64), [22])
    psi = language_model_parameters(VICUNA_7B)
    states = row.per_device - row.activations - row.logits - row.tower
    assert states == pytest.approx((2 + 14 / 64) * psi, rel=1e-6)


def test_offload_moves_states_to_main_memory():
    def one(**options):
        return estimate(large_tree(), tiny_llama(), 1000, plan(llm="full", processes=2, **options), [22])[0]

    trained = 1000 + language_model_parameters(tiny_llama())
    on, off = one(zero=2), one(zero=2, offload_optimizer=True)
    assert on.per_device - off.per_device == trained * (12 + 2) // 2
    assert off.host == trained * (12 + 4) // 2  # gradients are added up in fp32 there
    on, off = one(zero=3, offload_optimizer=True), one(zero=3, offload_optimizer=True, offload_params=True)
    assert on.per_device - off.per_device == off.host - on.host == -(-on.weights // 2)


def test_plain_data_parallelism_holds_gradients_twice():
    alone, two = (estimate(large_tree(), tiny_llama(), 1000, plan(processes=n), [22])[0] for n in (1, 2))
    assert two.per_device - alone.per_device == alone.gradients == 4000
    assert alone.per_device == alone.total


def test_llava_with_a_7b_language_model():
    """One card of 80 GB holds stage 1 and not stage 2; shallow splits need more, both models in full the most."""
    projector = 2048 * 4096 + 4096 + 4096 * 4096 + 4096
    common = {"batch": 1, "length": 2048, "checkpointing": True}
    splits = [6, 14, 22, "full"]
    frozen = estimate(large_tree(), VICUNA_7B, projector, Plan(**common), splits)
    full = estimate(large_tree(), VICUNA_7B, projector, Plan(llm="full", zero=2, processes=1, **common), splits)
    card = 80_000_000_000
    for a, b in zip(frozen, full, strict=True):
        assert a.per_device < 20e9 < card < b.per_device
        assert b.optimizer == 12 * (6_738_415_616 + projector)
        assert a.inference == b.inference
    towers = [row.tower for row in frozen]
    assert towers[:3] == sorted(towers[:3], reverse=True)
    assert towers[2] < towers[3] == 2 * full_cost(large_tree()).parameters
    assert [row.label for row in frozen] == ["VST-6", "VST-14", "VST-22", "all in full"]


def test_the_figures_of_the_launch_page():
    page = (Path(__file__).parents[3] / "docs" / "launch.md").read_text()
    rows = re.findall(r"^\| (\d) \| `zero(\d)(_offload)?\.json` \| (\d+) \| (\d+) \|$", page, re.M)
    assert len(rows) == 5
    for stage, zero, offload, device, host in rows:
        options = Plan(
            llm="full" if stage == "2" else "none", zero=int(zero), offload_optimizer=bool(offload),
            offload_params=bool(offload) and zero == "3", processes=8, batch=16, length=2048, checkpointing=True,
        )  # fmt: skip
        (row,) = estimate(large_tree(), VICUNA_7B, 2048 * 4096 + 4096 + 4096 * 4096 + 4096, options, [14])
        assert (round(row.per_device / 1e9), round(row.host / 1e9)) == (int(device), int(host))


def test_lora_trains_little():
    (row,) = estimate(large_tree(), VICUNA_7B, 0, plan(projector=False, llm="lora", lora_parameters=10**6), [22])
    assert row.llm == 2 * 6_738_415_616 + 4 * 10**6
    assert row.gradients + row.optimizer == 12 * 10**6


def test_splits_by_branch_and_trees_without_branches(tree_of, tiny):
    tree = tree_of("dinov2", "clip", "siglip")
    rows = estimate(tree.config, tiny_llama(), 10, plan(stitches=True), [{"clip": 1, "siglip": 3}, 3])
    assert [row.label for row in rows] == ["VST-clip=1,siglip=3", "VST-3"]
    assert rows[0].tower > rows[1].tower
    alone = VSTEncoder.from_vfms(tiny("clip"), [], [])
    (row,) = estimate(alone.config, tiny_llama(), 10, plan(), [{}])
    assert (row.label, row.tower) == ("trunk alone", 2 * sum(v.numel() for v in alone.state_dict().values()))
    for wrong, told in ((2, "no stitch at split 2"), ("all", "'all' is no split")):
        with pytest.raises(ValueError, match=told):
            estimate(tree.config, tiny_llama(), 10, plan(), [wrong])


def test_nothing_is_allocated():
    """A model of 70 billion weights is counted in the memory of a test."""
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=32000,
    )  # fmt: skip
    assert language_model_parameters(config) == 68_976_648_192  # Llama-2-70B


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": False}, "Nothing is trained"),
        ({"llm": "qlora"}, "llm is 'qlora'; expected one of none, full, lora"),
        ({"llm": "lora"}, "with 0 lora_parameters"),
        ({"lora_parameters": 5}, "'none' with 5 lora_parameters"),
        ({"param_bytes": 1}, "expected one of 2, 4"),
        ({"zero": 4}, "zero is 4"),
        ({"zero": 2, "master": False}, "DeepSpeed keeps frozen weights in bf16"),
        ({"zero": 2, "param_bytes": 4}, "DeepSpeed keeps frozen weights in bf16"),
        ({"offload_optimizer": True}, "Offload with ZeRO stage 0"),
        ({"zero": 2, "offload_params": True}, "weights at stage 3"),
        ({"processes": 0}, "processes is 0"),
    ],
)
def test_plans_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_language_models_without_widths_are_refused():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="gpt2 model cannot be told"):
        estimate(large_tree(), GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10), 1, plan(), [22])


def test_the_table_marks_what_does_not_fit(capsys):
    rows = estimate(large_tree(), VICUNA_7B, 10**7, Plan(llm="full", batch=1, length=64), [6, 22])
    memory_table(rows)
    assert "fits" not in capsys.readouterr().out
    limit = (rows[0].inference + rows[1].inference) // 2
    memory_table(rows, limit)
    lines = capsys.readouterr().out.splitlines()
    training, inference = (
        [line for line in lines if f"{kind} fits {limit / 1e9:.2f} GB" in line] for kind in ("training", "inference")
    )
    assert training[0].count("NO, ") == 2
    assert inference[0].count("NO, ") == inference[0].count("yes") == 1
    assert inference[0].index("NO, ") < inference[0].index("yes")
    (total,) = (line for line in lines if "without ZeRO" in line)
    assert [f"{row.total / 1e9:.2f}" for row in rows] == [
        cell for cell in total.replace("│", " ").split() if "." in cell
    ]
