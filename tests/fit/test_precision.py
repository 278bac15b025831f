"""bf16 where a device has it, and a word where a CPU has not."""

import warnings

import pytest
import torch

from vst.fit.precision import has_bf16, uses_bf16

CPU, OLD, NEW = torch.device("cpu"), {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, {"avx512_bf16": True}


@pytest.mark.parametrize(
    ("facts", "expected"), [(OLD, False), (NEW, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({}, False)]
)
def test_a_cpu_has_bf16_where_torch_says_so(monkeypatch, facts, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts, raising=False)
    assert has_bf16(CPU) is expected


def test_without_a_word_from_torch_none_is_assumed(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not has_bf16(CPU)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_of_gpus_from_8_0_on(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert has_bf16(gpu) is uses_bf16("auto", gpu) is (capability >= (8, 0))


@pytest.mark.parametrize("facts", [OLD, NEW, {}])
def test_only_bf16_on_a_cpu_without_it_warns(monkeypatch, facts):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: facts, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not uses_bf16("auto", CPU)
        assert not uses_bf16("fp32", CPU)
        if facts != OLD:
            assert uses_bf16("bf16", CPU)
    if facts == OLD:
        with pytest.warns(UserWarning, match="faster with precision fp32"):
            assert uses_bf16("bf16", CPU)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="'fp16'; expected auto, fp32 or bf16"):
        uses_bf16("fp16", CPU)
