"""The rules of the findings on made-up rows that should, and should not, satisfy them."""

import pytest

from vst.protocol.findings import HOLDS, NOT, UNKNOWN, difference, findings
from vst.protocol.tables import Table, saving, score_tables
from vst.results.tables import spread


def rows(scores, depths=(2, 10), start="", noise=0.01, seeds=(0, 1, 2)):
    """Rows from ``{(source, target, chain): (score at the first depth, at the last)}``; seeds differ by the noise."""
    return [
        {
            "kind": "stitched", "task": "t", "family": "mlp", "source": a, "target": b, "depth": depth, "enter": depth,
            "seed": seed,
            "objective": start + chain, "score": score + noise * (seed - 1), "metric": "accuracy",
        }
        for (a, b, chain), values in scores.items()
        for depth, score in zip(depths, values, strict=True)
        for seed in seeds
    ]  # fmt: skip


def verdict(number, made):
    (found,) = [v for v in findings(made) if v.finding == number]
    return found


GOOD = {
    ("a", "b", "tlt"): (0.3, 0.6),
    ("a", "b", "ffm+tlt"): (0.5, 0.7),
    ("a", "a", "ffm+tlt"): (0.5, 0.6),
    ("b", "b", "ffm+tlt"): (0.48, 0.64),
}


def test_all_hold():
    for number in (1, 2, 3):
        assert verdict(number, rows(GOOD)).verdict == HOLDS, number
    assert verdict(1, rows(GOOD)).reasons == ["a into b at 2, FFM then TLT minus TLT +20.0 points (pooled spread 1.0)"]
    assert verdict(3, rows(GOOD)).reasons[0].startswith("a into b at 10 minus b into itself +6.0 points")


def test_none_holds():
    bad = {
        ("a", "b", "tlt"): (0.5, 0.6),
        ("a", "b", "ffm+tlt"): (0.3, 0.5),
        ("a", "a", "ffm+tlt"): (0.5, 0.4),
        ("b", "b", "ffm+tlt"): (0.5, 0.64),
    }
    for number in (1, 2, 3):
        assert verdict(number, rows(bad)).verdict == NOT, number


def test_within_the_spread_nothing_is_told():
    close = {
        ("a", "b", "tlt"): (0.5, 0.5),
        ("a", "b", "ffm+tlt"): (0.51, 0.51),
        ("a", "a", "ffm+tlt"): (0.5, 0.5),
        ("b", "b", "ffm+tlt"): (0.52, 0.5),
    }
    for number in (1, 2, 3):
        assert verdict(number, rows(close, noise=0.02)).verdict == UNKNOWN, number
        assert verdict(number, rows(GOOD, seeds=(0,))).verdict == UNKNOWN, number
    assert "one seed, no spread" in verdict(1, rows(GOOD, seeds=(0,))).sentence


def test_the_gain_is_against_the_better_of_the_two_self_stitches():
    only_over_the_target = {**GOOD, ("a", "a", "ffm+tlt"): (0.5, 0.72)}
    assert verdict(3, rows(only_over_the_target)).verdict == UNKNOWN
    clearly_below = {**GOOD, ("a", "a", "ffm+tlt"): (0.5, 0.8)}
    assert verdict(3, rows(clearly_below)).verdict == NOT
    # one self-stitch is enough to see that there is no gain, never to see one
    lacking = {k: v for k, v in GOOD.items() if k != ("a", "a", "ffm+tlt")}
    assert verdict(3, rows(lacking)).verdict == UNKNOWN
    assert "minus a into itself: rows are missing" in verdict(3, rows(lacking)).sentence
    assert verdict(3, rows({**lacking, ("b", "b", "ffm+tlt"): (0.5, 0.9)})).verdict == NOT


def test_all_directions_for_the_first_two_any_for_the_third():
    both = {**GOOD, ("b", "a", "tlt"): (0.5, 0.6), ("b", "a", "ffm+tlt"): (0.4, 0.5)}
    assert [verdict(n, rows(both)).verdict for n in (1, 2, 3)] == [NOT, NOT, HOLDS]
    even = {**GOOD, ("b", "a", "tlt"): (0.5, 0.6), ("b", "a", "ffm+tlt"): (0.51, 0.59)}
    assert [verdict(n, rows(even)).verdict for n in (1, 3)] == [UNKNOWN, HOLDS]


def test_starts_are_told_apart_and_missing_rows_are_said():
    made = rows(GOOD) + rows({k: v for k, v in GOOD.items() if k[2] != "tlt"}, start="ridge+")
    by_start = {v.start: v for v in findings(made) if v.finding == 1}
    assert by_start["random"].verdict == HOLDS
    assert by_start["ridge"].verdict == UNKNOWN
    assert "rows are missing" in by_start["ridge"].sentence
    assert findings(rows({("a", "b", "ffm"): (0.5, 0.5)})) == []
    selves = findings(rows({("b", "b", "ffm+tlt"): (0.5, 0.5)}))
    assert {v.verdict for v in selves} == {UNKNOWN}


@pytest.mark.parametrize("score", [None, float("nan")])
def test_a_row_without_a_score_is_missing(score):
    """What was not finite is null on disk."""
    made, full = rows(GOOD), rows(GOOD, seeds=(0, 1))
    for row in made:
        if row["seed"] == 2:
            row["score"] = score
    for number in (1, 2, 3):
        assert verdict(number, made) == verdict(number, full)


def test_a_gain_has_to_be_clear_over_both_self_stitches():
    one_seed = [r for r in rows(GOOD) if r["source"] == r["target"] == "a" and r["seed"] == 0]
    others = [r for r in rows(GOOD) if (r["source"], r["target"]) != ("a", "a")]
    assert verdict(3, others + one_seed).verdict == UNKNOWN
    wide = [{**r, "score": r["score"] + 0.1 * r["seed"]} for r in rows(GOOD) if r["source"] == r["target"] == "a"]
    assert verdict(3, others + wide).verdict == UNKNOWN


def test_a_direction_that_lacks_the_chains_is_missed():
    assert verdict(1, rows(GOOD)).verdict == HOLDS
    made = rows(GOOD) + rows({("b", "a", "ffm"): (0.5, 0.5)})
    assert verdict(1, made).verdict == UNKNOWN
    assert "b into a at 2, FFM then TLT minus TLT: rows are missing" in verdict(1, made).sentence


def test_only_seeds_that_both_have_are_compared():
    apart = [{**r, "seed": r["seed"] + 5} if r["objective"] == "tlt" else r for r in rows(GOOD)]
    assert verdict(1, apart).verdict == UNKNOWN
    more = rows(GOOD) + [{**r, "seed": 7, "score": 0.0} for r in rows(GOOD) if r["objective"] == "tlt"]
    assert verdict(1, more).reasons == verdict(1, rows(GOOD)).reasons


def test_scores_of_few_pictures_are_not_clear_however_equal_the_seeds():
    same = rows(GOOD, noise=0.0)
    model = {"kind": "model", "task": "t", "model": "a", "metric": "accuracy", "seed": 0, "pictures": {"test": 20}}
    assert [verdict(n, same).verdict for n in (1, 2, 3)] == [HOLDS] * 3
    assert [verdict(n, [*same, model]).verdict for n in (1, 2, 3)] == [UNKNOWN] * 3
    assert "(sampling error 10.7)" in verdict(1, [*same, model]).sentence  # 0.3 and 0.5 of 20
    many = {**model, "pictures": {"test": 20_000}}
    assert [verdict(n, [*same, many]).verdict for n in (1, 2, 3)] == [HOLDS] * 3
    assert [verdict(n, [*same, {**model, "metric": "mIoU"}]).verdict for n in (1, 2, 3)] == [HOLDS] * 3


def test_a_target_of_another_depth_is_controlled_where_it_is_entered():
    """b has twice as many blocks: depths 2 and 10 of a are entered at 4 and 20."""
    crossed = [{**r, "enter": 2 * r["depth"]} for r in rows(GOOD) if r["source"] != r["target"]]
    own = [r for r in rows(GOOD) if r["source"] == r["target"] == "a"]
    same_number = rows({("b", "b", "ffm+tlt"): (0.48, 0.64)})
    assert [verdict(n, crossed + own + same_number).verdict for n in (2, 3)] == [UNKNOWN] * 2
    same_place = rows({("b", "b", "ffm+tlt"): (0.48, 0.64)}, depths=(4, 20))
    assert [verdict(n, crossed + own + same_place).verdict for n in (2, 3)] == [HOLDS] * 2
    assert "b into itself at 4 minus a into b at 2" in verdict(2, crossed + own + same_place).sentence


def test_differences_written_out():
    found = difference({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.4, 2: 9.0})
    assert found.value == pytest.approx(0.2)
    assert found.spread == pytest.approx((0.02 / 2) ** 0.5)
    sampled = difference({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.4}, pictures=4)
    assert sampled.spread == pytest.approx(((0.6 * 0.4 + 0.4 * 0.6) / 4 / 2) ** 0.5)
    assert difference({0: 0.5}, {0: 0.4, 1: 0.4}).spread is None
    assert difference({0: 0.5}, {1: 0.4}) is None
    assert difference(None, {0: 1.0}) is None


def test_tables_hold_means_and_spreads():
    made = rows(GOOD)
    (shown,) = score_tables(made)
    assert shown.columns == ["objective", "direction", "2", "10"]
    assert ["ffm+tlt", "a into b", "50.0 +- 1.0", "70.0 +- 1.0"] in shown.rows
    assert spread([]) == "-"
    assert spread([0.5], 1, 100) == "50.0"
    naive = [{"kind": "x", "naive_pictures": {"m": n}} for n in (30, 70)]
    assert saving(naive, {"m": 10}).rows == [["m", "10", "100", "10"]]
    assert Table("T", ["a", "b"], [["1", "2"]]).markdown() == "### T\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    assert len(shown.rows) == 4
