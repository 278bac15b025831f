"""The projector's closed-form start against least squares written out, for every projector."""

import pytest
import torch

from llava_integration.models.assemble import assemble
from llava_integration.models.processing import image_tokens
from llava_integration.train.data import Conversations, DataConfig
from llava_integration.train.start import ridge_start
from vst.tree.projector import ProjectorSpec

pytest_plugins = ("training_kit",)
SPECS = [
    ProjectorSpec(),
    ProjectorSpec("linear"),
    ProjectorSpec("mlp", "interleave"),
    ProjectorSpec("linear", "additive"),
]


def parts(kit, tree_of, lm, spec, **changes):
    model, processor = assemble(tree_of(), *lm(), projector=spec)
    data = DataConfig([str(kit.folder / "data.json")], str(kit.folder / "images"), max_length=256, **changes)
    tokens = image_tokens(model.config.vision_config.tree_config(), spec)
    return model, Conversations(data, processor.tokenizer, processor.image_processor.transform(), tokens)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.fusion}")
def test_pictures_begin_near_the_words_said_of_them(kit, tree_of, lm, spec):
    model, data = parts(kit, tree_of, lm, spec)
    table = model.get_input_embeddings().weight
    special = set(data.tokenizer.all_special_ids)
    seen, said = [], []
    for i in range(len(data)):
        sample = data[i]
        if len(sample["pixel_values"]) == 1:
            words = [w for w in sample["labels"].tolist() if w >= 0 and w not in special]
            seen.append(sample["pixel_values"])
            said.append(table[words].mean(0))
    said = torch.stack(said)

    def agreement():
        with torch.no_grad():
            out = torch.stack(list(model.model.get_image_features(torch.cat(seen)).pooler_output)).mean(1)
        out, target = out - out.mean(0), said - said.mean(0)
        return torch.nn.functional.cosine_similarity(out, target).mean().item()

    before = agreement()
    share = ridge_start(model, data, len(data), show=False)
    assert 0 < share <= 1
    assert agreement() > max(0.5, before + 0.3)


def test_a_linear_projector_is_the_ridge_solution(kit, tree_of, lm):
    """Up to the gain that restores the spread of the embeddings."""
    model, data = parts(kit, tree_of, lm, ProjectorSpec("linear"))
    ridge_start(model, data, len(data), show=False)
    table, special = model.get_input_embeddings().weight.detach(), set(data.tokenizer.all_special_ids)
    x, y = [], []
    for i in range(len(data)):
        sample = data[i]
        if len(sample["pixel_values"]) == 1:
            tokens = model.model.vision_tower(sample["pixel_values"]).last_hidden_state[0]
            words = [w for w in sample["labels"].tolist() if w >= 0 and w not in special]
            x.append(tokens.detach())
            y.append(table[words].mean(0).expand(len(tokens), -1))
    x, y = torch.cat(x).double(), torch.cat(y).double()
    xs = (x - x.mean(0)) / x.std(0, correction=0)
    ys = (y - y.mean(0)) / y.std(0, correction=0)
    solution = torch.linalg.solve(xs.T @ xs / len(xs) + 1e-2 * torch.eye(xs.shape[1]), xs.T @ ys / len(xs))
    expected = (xs @ solution) * y.std(0, correction=0)
    out = model.model.multi_modal_projector(x.float()).detach().double()
    assert torch.allclose(out.mean(0), y.mean(0), atol=1e-4)
    out = out - out.mean(0)
    gain = (out * expected).sum() / (expected * expected).sum()
    assert torch.allclose(out, gain * expected, atol=1e-3 * out.abs().max())
    assert out.std().item() == pytest.approx(table.std().item(), rel=1e-2)


def test_it_is_reproducible(kit, tree_of, lm):
    states = []
    for _ in range(2):
        model, data = parts(kit, tree_of, lm, ProjectorSpec())
        ridge_start(model, data, len(data), show=False)
        states.append(model.model.multi_modal_projector.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_conversations_without_pictures_are_an_error(kit, tree_of, lm):
    model, data = parts(kit, tree_of, lm, ProjectorSpec())
    text = [i for i in range(len(data)) if not len(data[i]["pixel_values"])]

    class Text:
        tokenizer = data.tokenizer
        __len__ = lambda self: len(text)  # noqa: E731
        __getitem__ = lambda self, i: data[text[i]]  # noqa: E731

    with pytest.raises(ValueError, match=r"set tune\.start to random"):
        ridge_start(model, Text(), 4, show=False)
