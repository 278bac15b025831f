"""What a shipped config names and a stranger does not have is said at once, without asking the hub for minutes."""

from pathlib import Path

import pytest

from llava_integration.commands import COMMANDS
from llava_integration.models import assemble
from llava_integration.train.model import ModelConfig
from vst.parsing import run

CONFIGS = Path(__file__).parents[3] / "configs" / "llava"


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VST_HOME", str(tmp_path / "home"))
    yield tmp_path
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", ["pretrain.yaml", "demo/pretrain.yaml"])
@pytest.mark.parametrize("dry", [True, False])
def test_a_tree_that_nobody_has_fitted(nowhere, file, dry):
    with pytest.raises(SystemExit, match=r"There is no tree 'runs/.*/tree' \(model\.tower\).*vst fit --out RUN"):
        run(COMMANDS, ["train", "--config", str(CONFIGS / file), *(["--dry-run"] if dry else [])])


@pytest.mark.parametrize("file", ["finetune.yaml", "finetune-lora.yaml", "demo/finetune.yaml"])
def test_a_stage_that_has_not_run(nowhere, file, monkeypatch):
    monkeypatch.setattr("llava_integration.train.model.AutoConfig.from_pretrained", lambda _: pytest.fail("asked"))
    with pytest.raises(SystemExit, match=r"holds no model that an earlier stage left \(model\.start\): run that stage"):
        run(COMMANDS, ["train", "--config", str(CONFIGS / file)])


def test_a_language_model_that_cannot_be_fetched(tree_of, tmp_path, monkeypatch):
    """The hub is asked once; transformers, which would ask for half a minute, is not."""
    tree_of().save_pretrained(tmp_path / "tree")
    asked = []

    def ask(self, name, timeout):
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr(assemble.HfApi, "model_info", ask)
    monkeypatch.setattr("llava_integration.train.model.AutoConfig.from_pretrained", lambda _: pytest.fail("asked"))
    model = ModelConfig(llm="owner/language-model", tower=str(tmp_path / "tree"))
    with pytest.raises(FileNotFoundError, match=r"hf download owner/language-model.*model\.llm"):
        model.plan()
    assert asked == ["owner/language-model"]
