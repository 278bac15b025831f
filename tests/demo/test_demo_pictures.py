"""What pictures are worth: series among recipes, the line through them against closed forms, the plot and the page."""

import math

import numpy as np
import pytest
from PIL import Image

from vst.demo.config import DemoConfig
from vst.demo.division import SCENES
from vst.demo.pictures import Slope, picture_rows, pictures_plot, series_of
from vst.measure.latency import ALL_IN_FULL

TOLD = {"match": "mix", "tune": {"trunk": "lora"}}


def results(share=1.0):
    """Shares of 0.4 at 75 pictures of the task, and 0.1 more with each doubling; of single ones, 0.05."""
    recipes, fits = {}, []
    towers = [{"name": ALL_IN_FULL, "kind": "full", "objective": None, "share": {SCENES: {"share": share}}}]
    for kind, gain, counts in (("scenes", 0.1, (300, 75, 150)), ("singles", 0.05, (75, 300))):
        for n in counts:
            recipe, doublings = f"{kind}-{n}", math.log2(n / 75)
            pictures = {"scenes": 0, "singles": 0, kind: n}
            recipes[recipe] = {"pictures": pictures, "fit": {**TOLD, "epochs": 1200 // n}}
            tower = {"name": f"VST-10, {recipe}", "objective": recipe, "tasks": {SCENES: {"0": 0.3, "1": 0.4}}}
            deep = 0.4 + gain * doublings
            for kept, split in ((deep, 10), (0.9, 6)):
                shared = {SCENES: {"share": None if share is None else kept}}
                towers.append({**tower, "kind": "split", "split": split, "share": shared})
            if kind == "scenes":
                alone = {SCENES: {"share": None if share is None else deep / 2}}
                towers.append({**tower, "kind": "tuned", "split": None, "share": alone})
            reports = [{"split": s, "final": {"channel_error": e}} for s, e in ((10, 0.7 - 0.02 * doublings), (6, 0.4))]
            fits.append({"objective": recipe, "steps": 150, "pictures": n, "reports": reports})
    recipes["other"] = {"pictures": {"scenes": 75, "singles": 0}, "fit": {"match": "raw"}}
    return {
        "recipes": recipes,
        "fits": fits,
        "towers": towers,
        "trunk": "clip",
        "branch": "dinov2",
        "caption": "made up",
    }


def test_series_are_recipes_that_differ_in_pictures_alone():
    scenes, singles = series_of(results())
    assert (scenes.name, scenes.kind, list(scenes.recipes.items())) == (
        "scenes", "scenes", [(75, "scenes-75"), (150, "scenes-150"), (300, "scenes-300")]
    )  # fmt: skip
    assert (singles.name, list(singles.recipes)) == ("singles", [75, 300])
    assert series_of({"recipes": {"a": {"pictures": {"scenes": 4, "singles": 4}, "fit": {}}}}) == []
    assert series_of({}) == []
    told = results()  # as many pictures in fewer passes: a series of their own, once there are two
    for n in (75, 150):
        told["recipes"][f"short-{n}"] = {"pictures": {"scenes": n, "singles": 0}, "fit": {**TOLD, "epochs": 1}}
        assert len(series_of(told)) == (2 if n == 75 else 3)
    assert series_of(told)[0].recipes == scenes.recipes
    assert (short := series_of(told)[-1]).recipes == {75: "short-75", 150: "short-150"}
    assert short.name == "short"


def test_the_table_tells_the_line_through_them():
    heads, rows = picture_rows(results())
    assert heads[3] == "share of the gain on scenes, %"
    assert rows[0] == ["scenes", "75", "150", "40.0", "20.0", "0.700"]
    assert rows[3] == ["scenes", "each doubling", "", "+10.0 +- 0.0", "+5.0 +- 0.0", "-0.020 +- 0.000"]
    assert rows[-1] == ["singles", "each doubling", "", "+5.0", "", "-0.020"]
    heads, rows = picture_rows(results(share=None))  # a gain that cannot be told from zero has no share
    assert (heads[3], rows[0][3]) == ("scenes, mIoU %", "35.0")


def test_the_line_and_its_error_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    pictures, values = [75, 150, 300, 600, 2400], rng.normal(size=5)
    (slope, _), covariance = np.polyfit(np.log2(pictures), values, 1, cov=True)
    found = Slope.of(pictures, values)
    assert found.each_doubling == pytest.approx(slope)
    assert found.error == pytest.approx(math.sqrt(covariance[0, 0]))
    assert Slope.of([75, 300], [1.0, 2.0]) == Slope(pytest.approx(0.5), None)


@pytest.mark.parametrize("share", [1.0, None])
def test_it_is_drawn(share, tmp_path):
    pictures_plot(results(share), path := tmp_path / "pictures.png")
    assert np.asarray(Image.open(path)).std() > 5


def test_a_recipe_says_which_pictures_it_sees():
    recipes = {"few": {"pictures": {"singles": 3}, "epochs": 5}, "all": {"epochs": 1}}
    config = DemoConfig(pictures=11, recipes=recipes)
    assert config.pictures_of("few") == {"scenes": 0, "singles": 3}
    assert config.pictures_of("all") == config.pictures_of("ffm") == config.kinds == {"scenes": 6, "singles": 5}
    assert config.fit_of("few", 0).epochs == 5


@pytest.mark.parametrize(
    "given", [{"scenes": 7}, {"scenes": 0}, {"scene": 3}, {"singles": True}, {"scenes": -1}, [3], 3, {"scenes": 2.0}]
)
def test_pictures_that_there_are_not(given):
    with pytest.raises(ValueError, match=r"Recipe 'few' has pictures .*; expected up to 6 scenes and up to 5 singles"):
        DemoConfig(pictures=11, recipes={"few": {"pictures": given}})
