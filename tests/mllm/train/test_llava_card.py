"""The model card that a training leaves: metadata that hubs read, parts, and a user's own page left alone."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig

from llava_integration.train.card import CARD, is_own_card, language_model_of, model_card, write_card
from llava_integration.train.config import TuneConfig
from llava_integration.train.model import ModelConfig
from llava_integration.train.training import train

pytest_plugins = ("training_kit",)


def test_both_stages_leave_a_card(kit, tmp_path):
    (kit.folder / "llm" / CARD).write_text("---\nlicense: apache-2.0\n---\n\nA tiny one.\n")
    train(kit.model, kit.data, str(tmp_path / "one"), **kit.options(steps=1))
    two = ModelConfig(start=str(tmp_path / "one"))
    train(two, kit.data, str(tmp_path / "two"), TuneConfig(llm="full"), **kit.options(steps=1))
    for folder, trained in (("one", "stage 1"), ("two", "stage 2")):
        card = ModelCard.load(tmp_path / folder / CARD)
        facts = card.data.to_dict()
        assert facts["library_name"] == "transformers"
        assert facts["pipeline_tag"] == "image-text-to-text"
        assert facts["license"] == "other"  # of the parts, one is Apache and the others are not known
        assert "stitch-tree" in facts["tags"]
        assert "base_model" not in facts
        for text in ("import llava_integration", 'pip install "vfm-stitch-tree[llava]"', trained, "| apache-2.0 |",
                     "| `llm` |", "| trunk |", "branch `clip`", "No scores were measured"):  # fmt: skip
            assert text in card.text, text
        assert str(kit.folder / "llm") not in card.text
        code = card.text.partition("```python\n")[2].partition("```")[0]
        compile(code, "card", "exec")
        assert is_own_card(tmp_path / folder / CARD)


def test_a_page_of_a_users_own_is_left_alone(kit, tmp_path):
    folder = tmp_path / "run"
    train(kit.model, kit.data, str(folder), **kit.options(steps=1))
    (folder / CARD).write_text("# my notes\n")
    train(kit.model, kit.data, str(folder), **kit.options(steps=1), overwrite=True)
    assert (folder / CARD).read_text() == "# my notes\n"
    (folder / CARD).unlink()
    train(kit.model, kit.data, str(folder), **kit.options(steps=1), overwrite=True)
    assert is_own_card(folder / CARD)
    scores = {"easy-VQA, 20 questions": {"accuracy": 0.51234, "majority": 0.4}}
    write_card(folder, "owner/name", scores=scores)
    card = ModelCard.load(folder / CARD)
    assert card.data.base_model == "owner/name"
    assert "| easy-VQA, 20 questions | 51.2 % | 40.0 % |" in card.text


@pytest.mark.parametrize("licence", ["mit", "no", "other: [see it]", "a\n---\nb: &c", '"quoted" #', "<script>|`"])
def test_any_licence_and_name_make_a_card_that_can_be_read(kit, tmp_path, licence):
    train(kit.model, kit.data, str(tmp_path / "run"), **kit.options(steps=1))
    path = tmp_path / "run" / "config.json"
    config = AutoConfig.from_pretrained(tmp_path / "run")
    facts = json.loads(path.read_text())
    known = config.vision_config.tree_config().trunk.license
    path.write_text(json.dumps(facts).replace(json.dumps(known), json.dumps(licence)))
    card = ModelCard(model_card(AutoConfig.from_pretrained(tmp_path / "run"), "a|b\n---\n<script>"))
    assert card.data.library_name == "transformers"
    assert "<script>" not in card.text.partition("```")[2].partition("```")[2]
    rows = [line for line in card.text.splitlines() if line.startswith(("| trunk", "| branch", "| language"))]
    assert [row.replace("\\|", "").count("|") for row in rows] == [5, 5, 5]


def test_a_tuned_tower_is_told(tmp_path, tree_of, lm, pictures):
    from llava_integration.models.assemble import assemble
    from vst import fit_stitches
    from vst.tree.baseline import FullTower

    tree = tree_of("dinov2", "clip", splits=[2])
    fit_stitches(tree, pictures[:12], tune={"trunk": "lora", "tails": "lora"}, show_progress=False)
    for name, tower in (("tuned", tree), ("full", FullTower.from_config(tree.config))):
        model, _ = assemble(tower, *lm())
        model.save_pretrained(tmp_path / name)
    told, full = (model_card(AutoConfig.from_pretrained(tmp_path / name), None) for name in ("tuned", "full"))
    assert f"are not the published ones: {tree.config.tuned.told()}." in told
    assert "published ones" not in full  # the models in full are


def test_the_language_model_is_found_through_the_stages(tmp_path):
    for name, model in (("one", {"llm": "owner/name"}), ("two", {"start": str(tmp_path / "one")}), ("odd", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"model": model}))
    (tmp_path / "ring").mkdir()
    (tmp_path / "ring" / "run.json").write_text(json.dumps({"model": {"start": str(tmp_path / "ring")}}))
    found = {n: language_model_of(ModelConfig(start=str(tmp_path / n))) for n in ("one", "two", "odd", "ring", "none")}
    assert found == {"one": "owner/name", "two": "owner/name", "odd": None, "ring": None, "none": None}
    assert language_model_of(ModelConfig(llm="x/y", tower="z")) == "x/y"
