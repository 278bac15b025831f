"""What the README shows runs: its Python on tiny models, its command lines through the parser."""

import json
import re
from pathlib import Path

import pytest
from commands_kit import parsed_line

from llava_integration.models.assemble import assemble
from vst import VSTEncoder
from vst.demo.config import DemoConfig
from vst.demo.results import demo_results
from vst.demo.tables import demo_markdown, score_rows
from vst.fit.config import FitConfig
from vst.measure.tables import timings_markdown
from vst.protocol.findings import findings
from vst.protocol.report import row_place
from vst.protocol.tables import score_tables
from vst.results.folders import read_json
from vst.results.tables import markdown
from vst.trunk.report import trunk_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if any(part in line.split("#")[0] for part in ("vst ", "train/", "eval/", "-m llava_integration"))
]


def test_the_python_face(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    code, _ = re.findall(r"```python\n(.*?)```", README, re.S)
    replaced = {
        "timm:vit_large_patch14_dinov2.lvd142m": tiny("dinov2", depth=24),
        "timm:vit_large_patch14_clip_quickgelu_336.openai": tiny("clip", 48, depth=24),
        "image_size=336": "image_size=56",
    }
    for real, small in replaced.items():
        assert real in code
        code = code.replace(real, small)
    monkeypatch.chdir(tmp_path)
    space = {"image": pictures[0]}
    exec(code, space)
    assert space["tokens"].shape == (1, 16, 80)
    assert space["maps"]["clip"].map.shape == (1, 48, 4, 4)
    assert space["tree"].splits == [14]


def test_the_language_model(tree_of, lm, pictures, tmp_path, monkeypatch):
    _, code = re.findall(r"```python\n(.*?)```", README, re.S)
    tree = tree_of(splits=(1, 3))
    for part in assemble(tree, *lm()):
        part.save_pretrained(tmp_path / "runs" / "llava-demo")
    assert "vision_tower.split = 10" in code
    monkeypatch.chdir(tmp_path)
    space = {"image": pictures[0]}
    exec(code.replace("split = 10", "split = 1"), space)
    assert space["answer"].shape[0] == 1
    assert space["model"].model.vision_tower.split == 1


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parsed_line(line)


@pytest.mark.parametrize("path", sorted((ROOT / "docs/results/performance").glob("*.json")), ids=lambda p: p.stem)
def test_tables_of_timings_are_those_of_their_files(path):
    page = (ROOT / "docs/performance.md").read_text()
    assert path.name in page
    for line in timings_markdown(read_json(path)["results"]).splitlines():
        assert line in page


@pytest.mark.parametrize("name", ["protocol", "protocol-bf16"])
def test_tables_and_verdicts_of_the_protocol_are_those_of_its_rows(name):
    folder, page = ROOT / "docs/results" / name, (ROOT / "docs/protocol.md").read_text()
    rows = sorted((read_json(path)["row"] for path in (folder / "rows").glob("*.json")), key=row_place)
    tables, shown = (folder / "tables.md").read_text(), score_tables(rows)
    assert shown
    for table in shown:
        assert table.note in tables
        for line in table.markdown().splitlines():
            if " into " in line:
                assert line in tables
                assert line in page
    for verdict in findings(rows):
        assert verdict.sentence in tables
        assert f"*{verdict.verdict}*" in page
    (told,) = re.findall(r"^\| DINOv2-S into CLIP-B/16.*?\n\n", README, re.M | re.S)
    for line in told.splitlines()[2:-1] if name == "protocol" else ():
        objective, *scores = line.strip("| ").split(" | ")
        assert [objective.split(" (")[0], "dinov2 into clip", *scores] in shown[0].rows


@pytest.mark.parametrize("name", ["demo", "demo-dinov2"])
def test_tables_of_the_demo_are_those_of_its_results(name):
    results = read_json(ROOT / "docs/results" / name / "results.json")["results"]
    page = (ROOT / "docs/demo.md").read_text()
    assert demo_markdown(results) in page
    assert (markdown(*score_rows(results)) in README) == (name == "demo")


@pytest.mark.parametrize("name", ["demo", "demo-dinov2"])
def test_results_of_the_demo_are_those_of_its_rows(name, tiny):
    folder = ROOT / "docs/results" / name
    stored = read_json(folder / "results.json")
    fields = {**stored["config"], "fit": FitConfig(**stored["config"]["fit"])}
    config = DemoConfig(**fields)
    kept = sorted((read_json(path) for path in (folder / "rows").glob("*.json")), key=lambda r: r["ordinal"])
    shapes = {"clip": tiny("clip", 48, depth=12, grid=8), "dinov2": tiny("dinov2", depth=12, grid=8)}  # blocks, grid
    tree = VSTEncoder.plan(shapes[config.trunk], {config.branch: shapes[config.branch]}, config.splits)
    found = demo_results([r["row"] for r in kept], config, tree, config.objectives[-1])
    again = json.loads(json.dumps(found))
    again["caption"] = stored["results"]["caption"]
    assert_same(again, stored["results"])


def assert_same(given, wanted):
    """Numbers to what another machine's arithmetic may change."""
    if isinstance(wanted, dict):
        assert list(given) == list(wanted)
        for key in wanted:
            assert_same(given[key], wanted[key])
    elif isinstance(wanted, list):
        assert len(given) == len(wanted)
        for pair in zip(given, wanted, strict=True):
            assert_same(*pair)
    else:
        assert given == (pytest.approx(wanted, abs=1e-9) if isinstance(wanted, float) else wanted)


def test_the_comparison_of_trunks_is_that_of_its_results():
    results = read_json(ROOT / "docs/results/trunk/results.json")["results"]
    page = (ROOT / "docs/demo.md").read_text()
    assert markdown(*trunk_rows(results)) in page
    assert results["sentence"] in page.replace("\n", " ")


def test_there_are_commands_to_test():
    assert len(LINES) >= 10


def test_files_that_the_readme_names_exist():
    for path in re.findall(r"(?:configs|docs|train|eval|tests|vst)/[\w./-]+\.(?:yaml|py|json|md|png)", README):
        assert "NAME" in path or (ROOT / path).exists(), path
