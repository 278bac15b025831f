"""lmms-eval and its adapter, on a CPU and on a GPU."""

import pytest
import torch

pytest.importorskip("lmms_eval")
pytest.importorskip("datasets")

from lmms_kit import asked, folder, questions, roots  # noqa: F401 (fixtures)

from llava_integration.evaluate.lmms import evaluate


def first_logits(lm, requests):
    seen = []
    handle = lm._model.lm_head.register_forward_hook(lambda m, i, out: seen.append(out[:, -1].float().cpu()))
    lm.generate_until(requests)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_the_adapter(folder, asked, device, dtype, close):  # noqa: F811
    requests = asked.generate(max_new_tokens=1)
    expected = first_logits(asked.model(folder, device="cpu", dtype="float32", batch_size=4), requests)
    lm = asked.model(folder, device=device, dtype=dtype, batch_size=4)
    assert {p.device.type for p in lm._model.parameters()} == {device}
    found = first_logits(lm, requests)
    assert found.shape == expected.shape
    distance = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(distance.median()) < close
    answers = lm.generate_until(asked.generate(max_new_tokens=4))
    assert len(answers) == 100
    assert len(set(answers)) > 10


def test_lmms_eval_itself(folder, questions, device):  # noqa: F811
    found = evaluate(str(folder), ["vst_easy_vqa"], data=questions, device=device, show=False, batch_size=4)
    assert found["tasks"]["vst_easy_vqa"]["n"] == 8
    assert 0 <= found["tasks"]["vst_easy_vqa"]["score"] <= 1
