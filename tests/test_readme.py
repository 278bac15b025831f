"""What README and docs show is so: their Python and commands run or parse, their tables are those of committed rows."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import llava_integration
import vst
from llava_integration.commands import COMMANDS
from llava_integration.demo.page import depth_rows
from llava_integration.demo.page import score_rows as answer_rows
from llava_integration.evaluate.lmms.record import NAME
from llava_integration.evaluate.sweep import sweep_rows
from llava_integration.hosts.hooks import hooked
from llava_integration.models.assemble import assemble
from vst import VSTEncoder, cli
from vst.demo.config import DemoConfig
from vst.demo.results import demo_results
from vst.demo.tables import demo_markdown, score_rows
from vst.fit.config import FitConfig
from vst.measure.tables import timings_markdown
from vst.parsing import parse
from vst.protocol.findings import findings
from vst.protocol.report import row_place
from vst.protocol.tables import score_tables
from vst.results.folders import read_json
from vst.results.tables import markdown
from vst.trunk.report import trunk_rows

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
}
README = PAGES["README.md"]
RESULTS = ROOT / "docs/results"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
SCRIPTS = {
    "train/stitch.py": (cli.COMMANDS, "fit"),
    "train/mllm.py": (COMMANDS, "train"),
    "eval/latency.py": (cli.COMMANDS, "latency"),
    "eval/sweep.py": (cli.COMMANDS, "protocol"),
    "eval/lmms.py": (COMMANDS, "evaluate"),
}
PROGRAMS = ("vst ", "python ", "torchrun ", "deepspeed ", "make ", "pip ")


def blocks(page, language):
    return [text for kind, text in FENCE.findall(PAGES[page]) if kind == language]


def shell_lines(page):
    """Commands of the shell blocks that belong to this project, continued lines as one."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    ours = (*SCRIPTS, "vst ", "-m llava_integration", "-m lmms_eval", "make ", "pip ")
    return [line for line in lines if any(part in line.split("#")[0] for part in ours)]


def inline_commands(page):
    """Commands between backticks in running text, once each."""
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", PAGES[page]))]
    return list(dict.fromkeys(span for span in spans if span.startswith(PROGRAMS)))


LINES = [(page, line) for page in PAGES for line in shell_lines(page)]
INLINE = [(page, line) for page in PAGES for line in inline_commands(page)]


def test_a_few_lines_of_python(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    small = {'"dinov2-l"': repr(tiny("dinov2", depth=24)), '"clip-l-336"': repr(tiny("clip", 48, depth=24))}
    space = run_python("README.md", {**small, "image_size=336": "image_size=56"}, tmp_path, monkeypatch, pictures)
    assert space["tokens"].shape == (1, 16, 80)
    assert VSTEncoder.from_pretrained(tmp_path / "my-tree").splits == [6, 14, 22]


def test_the_python_face(tiny, picture_folder, tmp_path, monkeypatch, pictures):
    small = {
        "timm:vit_large_patch14_dinov2.lvd142m": tiny("dinov2", depth=24),
        "timm:vit_large_patch14_clip_quickgelu_336.openai": tiny("clip", 48, depth=24),
        "image_size=336": "image_size=56",
    }
    space = run_python("docs/library.md", small, tmp_path, monkeypatch, pictures)
    assert space["tokens"].shape == (1, 16, 80)
    assert space["maps"]["clip"].map.shape == (1, 48, 4, 4)
    assert space["tree"].splits == [14]


def test_the_language_model(tree_of, lm, pictures, tmp_path, monkeypatch):
    tree = tree_of(splits=(1, 3))
    for part in assemble(tree, *lm()):
        part.save_pretrained(tmp_path / "runs" / "llava-demo")
    small = {"vision_tower.split = 10": "vision_tower.split = 1"}
    space = run_python("docs/multimodal.md", small, tmp_path, monkeypatch, pictures)
    assert space["answer"].shape[0] == 1
    assert space["model"].model.vision_tower.split == 1


def test_the_hook_of_hosts(tmp_path, monkeypatch, pictures):
    builder = tmp_path / "cambrian" / "model" / "multimodal_encoder" / "builder.py"
    builder.parent.mkdir(parents=True)
    builder.write_text("def build_vision_tower(vision_tower_cfg, **kwargs):\n    return None\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        run_python("docs/hosts.md", {}, tmp_path, monkeypatch, pictures)
        assert hooked("cambrian") == ["cambrian.model.multimodal_encoder.builder"]
    finally:
        llava_integration.uninstall()
        for name in [n for n in sys.modules if n.partition(".")[0] == "cambrian"]:
            del sys.modules[name]


def run_python(page, replaced, folder, monkeypatch, pictures):
    """Run a page's only block of Python in a folder, with small things in place of large ones; what it left."""
    (code,) = blocks(page, "python")
    for real, small in replaced.items():
        assert real in code
        code = code.replace(real, small)
    monkeypatch.chdir(folder)
    space = {"image": pictures[0]}
    exec(code, space)
    return space


def test_all_python_is_run():
    shown = {page for page in PAGES if blocks(page, "python")}
    assert shown == {"README.md", "docs/library.md", "docs/multimodal.md", "docs/hosts.md"}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_command_lines_parse(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    assert check_command(words) or words[-1] == "..."


@pytest.mark.parametrize(("page", "line"), INLINE)
def test_commands_in_running_text_parse(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(shlex.split(line))


def check_command(words):
    """Whether a command was parsed in full; one without options, or that ends in ..., is only looked up."""
    if script := next((word for word in words if word.endswith(".py")), None):
        rest = words[words.index(script) + 1 :]
        assert (ROOT / script).is_file()
        if script not in SCRIPTS or rest[:1] in ([], ["..."]):
            return False
        commands, name = SCRIPTS[script]
        if script == "eval/lmms.py" and runpy.run_path(script)["has_rows"](rest):
            name = "sweep"
        return bool(parse(commands, [name, *rest]))
    if words[0] == "make":
        assert f"{words[1]}:" in (ROOT / "Makefile").read_text()
        return True
    if words[0] == "pip":
        extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(words))
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        return True
    if "llava_integration" in words:
        first, *rest = words[words.index("llava_integration") + 1 :] or ["MODULE"]
        if "." in first or first == "MODULE":  # a host's module: its options
            assert first.startswith(("llava.train.", "llava.serve.", "lmms_eval.", "MODULE"))
            return True
        return look_up(COMMANDS, first, rest)
    if "lmms_eval" in words:
        assert words[words.index("--model") + 1] == NAME
        return True
    if words[:3] == ["python", "-m", "MODULE"]:
        return False
    at = words.index("vst")
    assert words[:at] in ([], ["torchrun", "--nproc_per_node", "2", "-m"])
    return look_up(cli.COMMANDS, words[at + 1], words[at + 2 :])


def look_up(commands, name, rest):
    assert name in [command.__name__ for command in commands]
    needed = name in ("demo", "doctor", "tasks")  # may stand alone
    if rest[-1:] == ["..."] or not (rest or needed):
        return False
    return bool(parse(commands, [name, *rest]))


def test_there_are_commands_to_test():
    assert len(LINES) >= 40
    assert len(INLINE) >= 40


@pytest.mark.parametrize("path", sorted((RESULTS / "performance").glob("*.json")), ids=lambda p: p.stem)
def test_tables_of_timings_are_those_of_their_files(path):
    page = PAGES["docs/performance.md"]
    assert path.name in page
    for line in timings_markdown(read_json(path)["results"]).splitlines():
        assert line in page


@pytest.mark.parametrize("name", ["protocol", "protocol-bf16"])
def test_tables_and_verdicts_of_the_protocol_are_those_of_its_rows(name):
    folder, page = RESULTS / name, PAGES["docs/protocol.md"]
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
    (told,) = re.findall(r"^\| DINOv2-S into CLIP-B/16.*?\n\n", PAGES["docs/results.md"], re.M | re.S)
    for line in told.splitlines()[2:-1] if name == "protocol" else ():
        objective, *scores = line.strip("| ").split(" | ")
        assert [objective.split(" (")[0], "dinov2 into clip", *scores] in shown[0].rows


@pytest.mark.parametrize("name", ["demo", "demo-dinov2"])
def test_tables_of_the_demo_are_those_of_its_results(name):
    results = read_json(RESULTS / name / "results.json")["results"]
    assert demo_markdown(results) in PAGES["docs/demo.md"]
    heads, rows = score_rows(results)
    assert markdown(heads, rows) in PAGES["docs/demo.md"]
    fitted = [row for row in rows if not row[0].endswith(", ridge")]
    assert len(fitted) < len(rows)
    assert (markdown(heads, fitted) in README) == (name == "demo")


@pytest.mark.parametrize("name", ["demo", "demo-dinov2"])
def test_results_of_the_demo_are_those_of_its_rows(name, tiny):
    folder = RESULTS / name
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
    results = read_json(RESULTS / "trunk/results.json")["results"]
    page = PAGES["docs/demo.md"]
    assert markdown(*trunk_rows(results)) in page
    assert results["sentence"] in page.replace("\n", " ")


def test_tables_of_the_language_model_are_those_of_its_results():
    results, page = read_json(RESULTS / "llava-demo/results.json")["results"], PAGES["docs/results.md"]
    heads, rows = answer_rows(results["seeds"])
    assert heads[2] == "questions"
    for row in rows:
        assert f"| {' | '.join([*row[:2], *row[3:]])} |" in page
    for name, by in results["depths"].items():
        every, alone = zip(*[cells[1:] for cells in depth_rows(by)[1]], strict=True)
        others = [f"{100 * by[key]:.1f}" for key in ("majority", "blank")]
        assert f"| {' | '.join([name, 'one for all depths', *every, *others])} |" in page
        assert f"| {' | '.join([name, 'one a depth', *alone])} | | |" in page


def test_tables_of_the_sweep_are_those_of_its_results():
    results, page = read_json(RESULTS / "llava-sweep/results.json")["results"], PAGES["docs/results.md"]
    for row in sweep_rows(results)[1]:
        assert f"| {' | '.join(row[:5])} |" in page
    scores = []
    for split in (10, 2):
        tasks = read_json(RESULTS / f"llava-sweep/trained-at-{split}-alone.json")["results"]["tasks"]
        scores += [f"{100 * tasks[task]['score']:.1f}" for task in ("vst_easy_vqa", "vst_scenes")]
    at_10, at_2 = " and ".join(scores[:2]), " and ".join(scores[2:])
    told = f"trained at split 10 alone has {at_10} on the same questions, one trained at split 2 alone {at_2} "
    assert told in page.replace("\n ", "")


def test_files_that_pages_name_exist():
    rooms = "configs|docs|train|eval|tests|tools|vst|llava_integration"
    named = re.compile(rf"(?<![\w/.-])(?:{rooms})/[\w./*-]+\.(?:yaml|py|json|md|png)")
    found = {(page, path) for page, text in PAGES.items() for path in named.findall(text) if "NAME" not in path}
    assert len(found) >= 60
    for page, path in found:
        assert any(ROOT.glob(path)), (page, path)


def test_the_citation_is_complete():
    text = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(text)  # what the format requires
    assert (text["cff-version"], text["type"]) == ("1.2.0", "software")
    assert text["version"] == vst.__version__
    assert f'license = "{text["license"]}"' in (ROOT / "pyproject.toml").read_text()
    assert all(isinstance(author["name"], str) for author in text["authors"])
    (paper,) = text["references"]
    assert {"type", "title", "authors"} <= set(paper)  # of a reference
    assert f"*{paper['title']}*" in README
    assert f"{paper['conference']['name']}" == f"CVPR {paper['year']}"
    assert paper["url"] in README
