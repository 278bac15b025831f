"""Tables and verdicts in README and docs are those of the rows that lie in docs/results."""

import json
import re

import pytest
from pages_kit import PAGES, README, RESULTS

from llava_integration.demo.page import depth_rows
from llava_integration.demo.page import score_rows as answer_rows
from llava_integration.evaluate.sweep import sweep_rows
from vst import VSTEncoder
from vst.demo.config import DemoConfig
from vst.demo.division import SCENES, SUBCATEGORIES
from vst.demo.pictures import picture_rows
from vst.demo.results import demo_results
from vst.demo.tables import ahead_rows, demo_markdown, error_rows, fit_rows, points_text, score_rows
from vst.fit.config import FitConfig
from vst.measure.tables import timings_markdown
from vst.protocol.findings import findings
from vst.protocol.report import row_place
from vst.protocol.tables import score_tables
from vst.results.folders import read_json
from vst.results.tables import markdown
from vst.trunk.report import trunk_rows


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
    fitted = [row for row in rows if ", " not in row[0]]
    assert len(fitted) < len(rows)
    assert (markdown(heads, fitted) in README) == (name == "demo")


ALL = (score_rows, error_rows, ahead_rows, fit_rows)
RECIPES = {
    "recipes": ALL,
    "recipes-parts": ALL,
    "recipes-dinov2": ALL[:2],
    "recipes-loss": (error_rows, ahead_rows),
    "deep": ALL,
    "pictures": (score_rows, error_rows, picture_rows),
}


@pytest.mark.parametrize(("name", "tables"), RECIPES.items(), ids=RECIPES)
def test_tables_of_recipes_are_those_of_their_results(name, tables):
    results = read_json(RESULTS / name / "results.json")["results"]
    for rows in tables:
        assert markdown(*rows(results)) in PAGES["docs/recipe.md"]


def run_of(name, tiny):
    """Config, rows and tree of a kept run of the demo, the tree with its blocks and grid alone."""
    folder = RESULTS / name
    config = read_json(folder / "results.json")["config"]
    config = DemoConfig(**{**config, "fit": FitConfig(**config["fit"])})
    kept = sorted((read_json(path) for path in (folder / "rows").glob("*.json")), key=lambda r: r["ordinal"])
    shapes = {"clip": tiny("clip", 48, depth=12, grid=8), "dinov2": tiny("dinov2", depth=12, grid=8)}
    tree = VSTEncoder.plan(shapes[config.trunk], {config.branch: shapes[config.branch]}, config.splits)
    return config, [r["row"] for r in kept], tree


@pytest.mark.parametrize("name", ["demo", "demo-dinov2", *RECIPES])
def test_results_of_the_demo_are_those_of_its_rows(name, tiny):
    config, rows, tree = run_of(name, tiny)
    stored = read_json(RESULTS / name / "results.json")["results"]
    again = json.loads(json.dumps(demo_results(rows, config, tree, config.objectives[-1])))
    assert_same({**again, "caption": stored["caption"]}, stored)


def test_the_recipe_of_the_demo_is_the_one_that_its_rule_gives(tiny):
    """Of four that pass, the one that does not lie below the longer fit on the global task."""
    config, rows, tree = run_of("recipes", tiny)
    timing = next(row for row in rows if "rows" in row)
    above, lost = {}, {}
    for recipe in (name for name in config.objectives if name not in ("ridge", "long")):
        own = {**timing, "stitch": str(config.stitch_of(recipe))}
        towers = {r["name"]: r for r in demo_results([*rows, own], config, tree, recipe)["towers"]}
        ahead = {split: towers[f"VST-{split}, long"]["behind"] for split in config.splits}
        trunks = [towers[name]["over_untuned"] for name in ("clip tuned",) if name in towers]
        dense = ahead[10][SCENES]["low"] > 0 and ahead[6][SCENES]["high"] >= 0
        if dense and all(task["high"] >= 0 for trunk in trunks for task in trunk.values()):
            above[recipe] = points_text(ahead[10][SCENES])
            if ahead[10][SUBCATEGORIES]["high"] < 0:
                lost[recipe] = points_text(ahead[10][SUBCATEGORIES])
    assert list(above) == ["two-ridge", "two", "two-both", "both"]
    assert set(above) - set(lost) == {config.objectives[-1]} == {"both"}
    page = PAGES["docs/recipe.md"].replace("\n", " ")
    for told in (above, lost):
        *most, last = told.items()
        said = ", ".join(f"`{name}` by {points}" for name, points in most)
        assert f"{said} and `{last[0]}` by {last[1]}" in page


def test_no_option_of_the_loss_passes_its_rule():
    """Which asks for a lower error by channel at every split of every seed, and for no higher one of the whole."""
    fits = read_json(RESULTS / "recipes-loss/results.json")["results"]["fits"]
    errors: dict[str, list] = {}
    for fit in fits:
        finals = [stitch["final"] for stitch in fit["reports"]]
        errors.setdefault(fit["objective"], []).extend((final["channel_error"], final["error"]) for final in finals)
    del errors["ridge"]
    plain = errors.pop("channel")
    assert len(plain) == 2
    off = {}
    for name, found in errors.items():
        pairs = list(zip(found, plain, strict=True))
        assert not all(new[0] < old[0] and new[1] <= old[1] for new, old in pairs), name
        off[name] = [f"{new[0] - old[0]:+.3f}" for new, old in pairs]
    assert off == {"mix": ["+0.001", "+0.006"], "hints": ["-0.001", "+0.006"], "beyond": ["+0.009", "+0.029"]}


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


def test_every_folder_of_results_is_told_of():
    table = PAGES["docs/results.md"].partition("\n\n|")[2].partition("\n\n")[0]
    for folder in RESULTS.iterdir():
        assert not folder.is_dir() or f"`{folder.name}`" in table
