"""A tree on a CPU and on a GPU: its tokens against those of a CPU in fp32, attention's kernels, memory of loading."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tree_kit import pixels_of

from vst import VSTEncoder
from vst.measure.cost import weights_bytes
from vst.tree.baseline import FullEncoders

TREES = {
    "clip, siglip": ("dinov2", "clip", "siglip"),
    "registers": ("clip", "dinov2_registers"),
    "rotary": ("dinov3", "dinov3"),
}


@pytest.fixture(params=TREES)
def tree(request, tree_of):
    return tree_of(*TREES[request.param])


def cosines(found, expected):
    """Mean over tokens, by branch."""
    return {n: float(F.cosine_similarity(found[n].cpu().float(), x, dim=-1).mean()) for n, x in expected.items()}


@torch.no_grad()
def test_fp32_is_that_of_a_cpu(tree, device):
    pixels = pixels_of(tree)
    expected = tree.sweep(pixels)
    found = tree.to(device).sweep(pixels.to(device))
    for split, tokens in expected.items():
        for name, x in tokens.items():  # sums in another order, through four blocks of large random weights
            torch.testing.assert_close(found[split][name].cpu(), x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("way", ["cast", "autocast"])
def test_bf16_points_where_fp32_does(tree, device, way):
    """A number in bf16 has 8 bits: errors of 0.4 % a step, which add up to a few degrees at the most."""
    pixels = pixels_of(tree)
    full = FullEncoders.load(tree.config)
    own = {n: pixels_of(m, seed=1) for n, m in full.models.items()}
    expected, whole = tree.sweep(pixels), full.branch_tokens(own)
    dtype = torch.bfloat16 if way == "cast" else torch.float32
    tree.to(device, dtype), full.to(device, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=way == "autocast"):
        found = tree.sweep(pixels.to(device, dtype))
        told = full.branch_tokens({n: p.to(device, dtype) for n, p in own.items()})
    for split, tokens in expected.items():
        assert all(x.dtype == dtype and x.device.type == device for x in found[split].values())
        assert min(cosines(found[split], tokens).values()) > 0.995, split
    assert min(cosines(told, whole).values()) > 0.995


@torch.no_grad()
def test_attention_that_never_holds_its_matrix_gives_the_plain_ones_tokens(tree, device):
    """Flash attention, which fails where it cannot run, against products and a softmax written out."""
    if device == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        pytest.skip("this torch has no flash attention")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tree.to(device, dtype)
    pixels = pixels_of(tree).to(device, dtype)
    with sdpa_kernel(SDPBackend.MATH):
        expected = tree.sweep(pixels)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = tree.sweep(pixels)
    least = 0.995 if dtype == torch.bfloat16 else 1 - 1e-5
    for split, tokens in expected.items():
        assert min(cosines(found[split], {n: x.cpu().float() for n, x in tokens.items()}).values()) > least


@pytest.fixture
def saved(tiny, tmp_path):
    """A tree of some 60 MB, so that what an allocator rounds weighs little."""
    tree = VSTEncoder.from_vfms(tiny("dinov2", 512), [tiny("clip", 512)], [1, 3], 56)
    tree.save_pretrained(tmp_path / "tree")
    return tmp_path / "tree", tree.config


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 3])
def test_a_gpu_holds_no_more_than_the_blocks_of_a_split(saved, split, dtype):
    folder, config = saved
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tree = VSTEncoder.from_pretrained(folder, splits=[split], dtype=dtype).to("cuda")
    assert next(tree.parameters()).dtype == dtype
    size = weights_bytes(config, split, dtype)
    assert 0.98 * size <= torch.cuda.max_memory_allocated() - before <= 1.15 * size


@pytest.mark.cuda
def test_transformers_loads_it_straight_to_a_gpu(saved):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("llava_integration")
    folder, _ = saved
    tree = VSTEncoder.from_pretrained(folder)
    size = sum(t.numel() * t.element_size() for t in tree.state_dict().values())
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = transformers.AutoModel.from_pretrained(folder, device_map="cuda", dtype=torch.float32)
    # transformers asks the allocator for all of it at once beforehand, so that some is held twice for a moment at most
    assert 0.98 * size <= torch.cuda.memory_allocated() - before <= 1.15 * size
    pixels = pixels_of(tree)
    with torch.no_grad():
        tokens = model(pixels.to("cuda")).last_hidden_state.cpu()
        torch.testing.assert_close(tokens, tree(pixels), rtol=1e-2, atol=1e-2)
