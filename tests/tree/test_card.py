"""The model card as the hub reads it."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from vst import VSTEncoder
from vst.tree.card import model_card

LICENCES = ["mit", "no", "1.10", "other: [see it]", "a\n---\nb: &c", '"quoted" #', "two | cells"]


def licensed(config, licence):
    branches = tuple(replace(b, spec=replace(b.spec, license=licence)) for b in config.branches)
    return replace(config, trunk=replace(config.trunk, license=licence), branches=branches)


@pytest.mark.parametrize("licence", LICENCES)
def test_any_licence_comes_back_from_the_head(tree_of, tmp_path, licence):
    tree = VSTEncoder(licensed(tree_of("dinov2", "clip").config, licence))
    card = ModelCard.load(tree.save_pretrained(tmp_path / "tree") / "README.md")
    assert card.data.to_dict() == {
        "library_name": "vfm-stitch-tree",
        "pipeline_tag": "image-feature-extraction",
        "license": licence,
        "tags": ["vision", "model-stitching", "stitch-tree"],
    }
    assert card.text.lstrip().startswith("# A stitch tree\n")
    assert str(ModelCard(card.content)) == card.content == model_card(tree.config)
    assert len([line for line in card.text.splitlines() if line.startswith("| trunk | `hf:")]) == 1
    cells = [line.replace("\\|", "").count("|") for line in card.text.splitlines() if " of 4 |" in line]
    assert cells == [6, 6]


def test_parts_of_several_licences_are_other_and_each_is_told(tree_of, tmp_path):
    config = tree_of("dinov2", "clip").config
    mixed = replace(config, trunk=replace(config.trunk, license="apache-2.0"))
    for made in (config, mixed):  # "unknown" of both parts, then of one
        assert ModelCard(model_card(made)).data.license == "other"
    text = model_card(mixed)
    assert "| apache-2.0 |" in text
    assert "| unknown |" in text
    assert "stitches alone" in model_card(mixed, stitches_only=True)
    assert "self-contained" in text
