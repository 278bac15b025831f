"""Damaged and hostile trees: each loads as the tree that was saved, or is refused in one sentence, soon."""

import json
import random
import shutil
import struct
import time
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from vst import VFMSpec, VSTConfig, VSTEncoder
from vst.tree.folder import read_config
from vst.tree.seal import made_with

HOSTILE = [
    None, True, False, 0, 1, -1, 2, 3, 7, 13, 1e9, 10**9, 10**30, -(10**12), 0.5, -0.5, 1e308, 1e-300, 2.0, 6.5,
    float("nan"), float("inf"), -float("inf"), "", "no", "true", "nan", "4", "../x",
    "/etc/passwd", "<script>x</script>",
    "a\nb", "\x00", "\ud800", "x" * 5000, "é", "items", "clip", [], [1], [1, 2, 3], [0.5, 0.5, 0.5], [None], [[1]],
    [float("nan")] * 3, list(range(3000)), {}, {"a": 1}, {"family": "mlp"}, {"class_path": "os.system"},
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tree_of, tmp_path_factory):
    """A saved tree of three families and two kinds of stitch, with the pixels and tokens."""
    folder = tmp_path_factory.mktemp("good")
    tree = tree_of("dinov2", "dinov2_registers", "dinov3", splits=[1, 2], widths=(32, 32), stitch={"family": "lora"})
    tree.save_pretrained(folder / "tree")
    pixels = torch.randn(1, 3, tree.image_size, tree.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = {split: tree.branch_tokens(pixels, split) for split in (1, 2)}
    return folder / "tree", pixels, tokens


def places(values, path=()):
    """Every place in a JSON value, the whole first."""
    yield path
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def edited(values, rng):
    """A copy with one edit, and what it was."""
    values = json.loads(json.dumps(values))
    path = rng.choice([p for p in places(values) if p])
    inside = values
    for key in path[:-1]:
        inside = inside[key]
    how = rng.choice(["replace"] * 6 + ["drop", "add"])
    if how == "drop":
        del inside[path[-1]]
    elif how == "add":
        inside = inside if isinstance(inside, dict) else values
        inside[rng.choice(["x", "__class__", "class_path"])] = rng.choice(HOSTILE)
    else:
        inside[path[-1]] = rng.choice(HOSTILE)
    return values, f"{how} {path}"


def outcome(load):
    """What a load gives, and the one sentence that it may be refused with, within seconds."""
    began, found, text = time.monotonic(), None, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = load()
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
    assert "\n" not in text
    assert (found is None) == (10 < len(text) < 1500), text
    assert time.monotonic() - began < 10
    return found


@torch.no_grad()
def tokens_of(folder, pixels):
    tree = VSTEncoder.from_pretrained(folder)
    return {split: tree.branch_tokens(pixels, split) for split in tree.splits}


def told_or_equal(folder, pixels, tokens, what):
    """Load; True where the tokens are the original's, False where one sentence says why not."""
    if (found := outcome(lambda: tokens_of(folder, pixels))) is None:
        return False
    assert found, what
    for split, branches in found.items():
        for name, x in branches.items():
            wanted = tokens[split].get(name)
            wanted = tokens[split]["dinov2"] if wanted is None else wanted  # the trunk, under another name
            assert torch.equal(x, wanted), what
    return True


def test_a_config_edited_in_any_way(good, tmp_path):
    """Also where what is said of a model alone, or how tokens are joined, was changed: the branches' tokens stay."""
    folder, pixels, tokens = good
    shutil.copytree(folder, tmp_path / "tree")
    whole = json.loads((folder / "config.json").read_text())
    made = made_with(VSTConfig.from_dict(whole))
    for seed in range(300):
        values, what = edited(whole, random.Random(seed))
        (tmp_path / "tree" / "config.json").write_text(json.dumps(values))
        if told_or_equal(tmp_path / "tree", pixels, tokens, f"{seed}: {what}"):
            assert made_with(read_config(tmp_path / "tree")[1]) == made, what
    (tmp_path / "tree" / "config.json").write_text(json.dumps(whole))
    assert told_or_equal(tmp_path / "tree", pixels, tokens, "the original")


def test_a_config_edited_beside_weights_without_a_seal(good, tmp_path):
    """As an earlier version saved them: what shapes cannot tell may pass, types and ranges never do."""
    folder, pixels, _ = good
    shutil.copytree(folder, tmp_path / "tree")
    save_file(load_file(folder / "model.safetensors"), tmp_path / "tree" / "model.safetensors", {"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    for seed in range(1000, 1150):
        values, what = edited(whole, random.Random(seed))
        (tmp_path / "tree" / "config.json").write_text(json.dumps(values))
        if outcome(lambda: VSTEncoder.from_pretrained(tmp_path / "tree")) is not None:
            tree = VSTEncoder.from_pretrained(tmp_path / "tree")
            assert VSTConfig.from_dict(json.loads(json.dumps(tree.config.to_dict()))) == tree.config, what
            if tree.image_size == pixels.shape[-1]:
                assert bool(tree(pixels).isfinite().all()), what


def test_weights_damaged_in_any_way(good, tmp_path):
    folder, pixels, tokens = good
    shutil.copytree(folder, tmp_path / "tree")
    file = tmp_path / "tree" / "model.safetensors"
    whole = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    for seed in range(120):
        rng, data = random.Random(seed), bytearray(whole)
        how = rng.choice(["header", "length", "data", "data", "cut", "zeros", "more"])
        if how == "cut":
            data = data[: rng.randrange(len(data))]
        elif how == "more":
            data += bytes(rng.randrange(1, 100))
        elif how == "length":
            data[:8] = struct.pack("<Q", rng.choice([0, 1, length - 1, length + 8, 2**40, 2**63]))
        elif how == "zeros":
            at = rng.randrange(8 + length, len(data) - 64)
            data[at : at + 64] = bytes(64)
        else:
            at = rng.randrange(8, 8 + length) if how == "header" else rng.randrange(8 + length, len(data))
            data[at] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        told_or_equal(tmp_path / "tree", pixels, tokens, f"{seed}: {how}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(float("nan")), r"not finite in 1 tensors .*x_mean"),
        (lambda t: t.mul_(0).add_(float("inf")), r"not finite in 1 tensors"),
        (lambda t: t.to(torch.int32), "holds tensors of I32; expected weights of F32, F16, BF16, F64"),
        (lambda t: t.to(torch.float8_e4m3fn), "holds tensors of F8_E4M3; expected"),
    ],
)
def test_weights_that_are_no_finite_floats(tree_of, tmp_path, change, message):
    folder = tree_of("dinov2", "clip", splits=[1, 2]).save_pretrained(tmp_path / "tree")
    tensors = load_file(folder / "model.safetensors")
    key = "branches.clip.stitches.1.patches.x_mean"
    tensors[key] = change(tensors[key])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        VSTEncoder.from_pretrained(folder)


def test_a_cast_that_overflows_is_told(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    with torch.no_grad():
        tree.trunk.blocks["0"].mlp.fc1.weight[0, 0] = 1e6
    folder = tree.save_pretrained(tmp_path / "tree")
    with pytest.raises(ValueError, match=r"As torch.float16, .* not finite in 1 tensors .*fc1.weight"):
        VSTEncoder.from_pretrained(folder, dtype="float16")
    assert VSTEncoder.from_pretrained(folder, dtype="bfloat16").trunk.cls_token.dtype == torch.bfloat16


def test_a_config_that_asks_for_more_than_the_file_holds(good, tmp_path):
    """Before anything of that size is built, and whoever reads the config: loading, inspecting, a host."""
    folder, _, _ = good
    shutil.copytree(folder, tmp_path / "tree")
    save_file(load_file(folder / "model.safetensors"), tmp_path / "tree" / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    for change in ({"depth": 400}, {"width": 60000}, {"hidden": 200000}):
        wrong = json.loads(json.dumps(values))
        wrong["branches"][0]["spec"].update(change)
        if "depth" in change:
            wrong["branches"][0]["stop"] = 399
            wrong["feature_layer"] = -2
        (tmp_path / "tree" / "config.json").write_text(json.dumps(wrong))
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"describes a tree of at least \d+ weights and model.safetensors holds"):
            read_config(tmp_path / "tree")
        assert time.monotonic() - began < 1
    for change in ({"grid": 10**6}, {"trunk": {**values["trunk"], "depth": 10**9}}):
        (tmp_path / "tree" / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match="expected 1 to"):
            read_config(tmp_path / "tree")
    (tmp_path / "tree" / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_config(tmp_path / "tree")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_eps", -1e-6, "norm_eps is -1e-06; expected 1e-12 to 1"),
        ("norm_eps", "1e-6", "norm_eps is '1e-6'; expected a finite number"),
        ("mean", [float("nan")] * 3, r"mean\[0\] is nan; expected a finite number from 0 to 1"),
        ("mean", [0.5, 0.5], "expected 3 values"),
        ("std", [0, 1, 1], r"std\[0\] is 0; expected"),
        ("depth", 10**9, "depth is 1000000000; expected 1 to 512"),
        ("heads", 0, "heads is 0; expected 1 to"),
        ("patch", 14.5, "patch is 14.5; expected a whole number"),
        ("cls", "no", "cls is 'no'; expected true or false"),
        ("source", "a\nb", "source is .*; expected one line of text"),
        ("mlp", ["gelu"], "mlp is .*; expected one of"),
    ],
)
def test_a_spec_tells_what_is_wrong_with_it(tiny, field, value, message):
    from vst.models.checkpoints import describe

    values = describe(tiny("dinov2")).to_dict()
    assert VFMSpec.from_dict({**values, "patch": 14.0}) == VFMSpec.from_dict(values)
    with pytest.raises(ValueError, match=message):
        VFMSpec.from_dict({**values, field: value})


def test_a_saved_tree_has_the_same_bytes_each_time(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip", splits=[1, 2])
    files = {(tree.save_pretrained(tmp_path / str(i)) / "model.safetensors").read_bytes() for i in range(6)}
    assert len(files) == 1


def test_a_file_of_several_dtypes_becomes_one_that_runs(tree_of, tmp_path):
    tree = tree_of("dinov2", "clip")
    mixed = {n: t.half() if i % 2 else t for i, (n, t) in enumerate(tree.state_dict().items())}
    tree.save_pretrained(tmp_path / "tree", state_dict=mixed)
    again = VSTEncoder.from_pretrained(tmp_path / "tree")
    assert {t.dtype for t in again.state_dict().values()} == {torch.float32}
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, mixed[name].float())
    again(torch.zeros(1, 3, again.image_size, again.image_size))
