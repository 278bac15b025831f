"""The projector's closed-form start against least squares written out, for every projector; once for all processes.

As a script this file is what the launched processes run.
"""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_integration.models.assemble import assemble
from llava_integration.models.processing import image_tokens
from llava_integration.train.config import TuneConfig
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


def start_of(folder):
    """Build the model of a kit and start it; how many pictures this process' tower saw, its share and its weights."""
    from llava_integration.train.model import ModelConfig

    model, processor = ModelConfig(llm=f"{folder}/llm", tower=f"{folder}/tree").build(torch.float32, seed=RANK)
    data = DataConfig([f"{folder}/data.json"], f"{folder}/images", max_length=256)
    tokens = image_tokens(model.config.vision_config.tree_config())
    data = Conversations(data, processor.tokenizer, processor.image_processor.transform(), tokens)
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    share = ridge_start(model, data, len(data), device="cpu", show=False)
    return len(seen), share, model.model.multi_modal_projector.state_dict()


RANK = int(os.environ.get("RANK", "0"))


def launch(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_compute_once_and_have_the_same(kit):
    """Their projectors are drawn from other seeds, and end as that of one process alone, to the bit."""
    first, second = launch(kit.folder)
    count, share, weights = start_of(kit.folder)
    assert count > 1
    assert (first["seen"], second["seen"]) == (count, 0)
    assert first["share"] == second["share"] == share
    for rank in range(2):
        found = load_file(kit.folder / f"{rank}.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_two_processes_fail_alike(kit):
    records = json.loads((kit.folder / "data.json").read_text())
    (kit.folder / "data.json").write_text(json.dumps([r for r in records if "image" not in r]))
    for facts in launch(kit.folder):
        assert "set tune.start to random" in facts["error"]


def test_training_starts_on_the_device_that_it_trains_on(kit, tmp_path, monkeypatch):
    from llava_integration.train import training

    seen = []

    def told(*args, **options):
        seen.append(options["device"])
        return ridge_start(*args, **options)

    monkeypatch.setattr(training, "ridge_start", told)
    training.train(kit.model, kit.data, str(tmp_path / "run"), TuneConfig(start="ridge"), **kit.options(steps=1))
    assert seen == [torch.device("cuda:0" if torch.cuda.is_available() else "cpu")]


def test_conversations_without_pictures_are_an_error(kit, tree_of, lm):
    model, data = parts(kit, tree_of, lm, ProjectorSpec())
    text = [i for i in range(len(data)) if not len(data[i]["pixel_values"])]

    class Text:
        tokenizer = data.tokenizer
        __len__ = lambda self: len(text)  # noqa: E731
        __getitem__ = lambda self, i: data[text[i]]  # noqa: E731

    with pytest.raises(ValueError, match=r"set tune\.start to random"):
        ridge_start(model, Text(), 4, show=False)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=120))
    try:
        seen, share, weights = start_of(folder)
        save_file(weights, folder / f"{RANK}.safetensors")
        facts = {"seen": seen, "share": share}
    except ValueError as error:
        facts = {"error": str(error)}
    (folder / f"{RANK}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
