"""Rows whose training hardly happened, and scores at chance, are marked and decide nothing."""

from dataclasses import replace

import pytest
from protocol_kit import TRAIN
from test_protocol_findings import GOOD, rows, verdict

from vst.protocol import TrainConfig, run_protocol
from vst.protocol.config import ProtocolConfig
from vst.protocol.findings import HOLDS, NOT, UNKNOWN
from vst.protocol.marks import EDGE, FALLING, START, doubts, letters, marks, stage_marks
from vst.protocol.tables import score_tables

pytest_plugins = ("protocol_kit",)


def stage(rate=1e-3, best=4, epochs=9, tried=(1e-4, 1e-3, 1e-2)):
    return {"rate": rate, "trials": {f"{r:g}": 1.0 for r in tried}, "best": best, "epochs": epochs, "seconds": 1.0}


def trained(made, **stages):
    """Rows with facts of a sound stage for each of their chain, but for those given."""
    return [{**r, "stages": {s: stages.get(s, stage()) for s in [*r["objective"].split("+"), "head"]}} for r in made]


def alone(majority, scores, seeds=(0, 1, 2), **more):
    return [
        {"kind": "model", "task": "t", "model": name, "metric": "mIoU", "seed": s, "majority": majority, "score": score}
        | more
        for name, score in scores.items()
        for s in seeds
    ]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (stage(), []),
        (stage(1e-4), [EDGE]),
        (stage(1e-2), [EDGE]),
        (stage(best=0), [START]),
        (stage(best=9), [FALLING]),
        (stage(1e-4, best=0, epochs=5), [EDGE, START]),
        (stage(1e-2, best=1, epochs=1), [EDGE, FALLING]),
        (stage(tried=()), []),  # one rate, used as it is
        (stage(1e-4, tried=(1e-4, 1e-3)), [EDGE]),
        ({"seconds": 1.0}, []),  # a closed form
        ({}, []),
    ],
)
def test_marks_of_a_stage(facts, expected):
    assert stage_marks(facts) == expected


def test_a_row_is_marked_by_the_stages_it_is_made_by():
    (row,) = trained(rows({("a", "b", "ffm+tlt"): (0.5, 0.5)}, seeds=(0,))[:1], ffm=stage(best=9), head=stage(best=0))
    assert marks(row) == {"ffm": [FALLING]}  # its probe is where the task loss begins
    assert doubts(row) == []  # which goes on from what ffm left
    (row,) = trained([row], ffm=stage(best=0), tlt=stage(best=9))
    assert doubts(row) == ["ffm kept the start", "tlt still falling"]
    (probe,) = trained([{**row, "objective": "ridge"}], head=stage(1e-2, best=0))
    assert marks(probe) == {"head": [START]}


@pytest.mark.parametrize("bad", [stage(1e-4), stage(1e-2), stage(best=0), stage(best=9)])
@pytest.mark.parametrize("seed", [0, 2])
def test_no_verdict_from_marked_rows(bad, seed):
    sound = trained(rows(GOOD))
    assert [verdict(n, sound).verdict for n in (1, 2, 3)] == [HOLDS] * 3
    poor = trained(rows(GOOD), tlt=bad)
    mixed = [p if p["seed"] == seed else s for p, s in zip(poor, sound, strict=True)]
    for made in (poor, mixed):
        assert [verdict(n, made).verdict for n in (1, 2, 3)] == [UNKNOWN] * 3
        assert f"+20.0 points (pooled spread 1.0; tlt {stage_marks(bad)[0]})" in verdict(1, made).sentence
    worse = {k: tuple(1 - v for v in values) for k, values in GOOD.items()}
    assert NOT in [verdict(n, trained(rows(worse))).verdict for n in (1, 2, 3)]
    assert [verdict(n, trained(rows(worse), tlt=bad)).verdict for n in (1, 2, 3)] == [UNKNOWN] * 3


def test_a_marked_row_that_no_comparison_reads_takes_nothing_away():
    others = trained(rows({("a", "b", "ridge"): (0.5, 0.5), ("a", "b", "lfm"): (0.5, 0.5)}), lfm=stage(best=0))
    assert [verdict(n, [*trained(rows(GOOD)), *others]).verdict for n in (1, 2, 3)] == [HOLDS] * 3


def test_at_the_majority_class_nothing_is_told():
    """All models alike, at chance: the second finding used to hold."""
    flat = dict.fromkeys(GOOD, (0.2, 0.2))
    made = rows(flat, noise=0.001)
    assert verdict(2, made).verdict == HOLDS  # where nothing is known of the majority class
    for majority in (0.2, 0.25):
        found = verdict(2, [*made, *alone(majority, {"a": 0.2, "b": 0.2})])
        assert found.verdict == UNKNOWN
        assert "b alone is not clearly above the majority class" in found.sentence
        assert "b into itself is not clearly above the majority class" in found.sentence
    assert verdict(2, [*made, *alone(0.1, {"a": 0.2, "b": 0.2})]).verdict == HOLDS


def test_both_the_target_and_its_self_stitch_must_beat_the_majority():
    made = rows(GOOD)
    assert verdict(2, [*made, *alone(0.3, {"b": 0.7})]).verdict == HOLDS
    assert verdict(2, [*made, *alone(0.3, {"b": 0.3})]).verdict == UNKNOWN
    assert verdict(2, [*made, *alone(0.5, {"b": 0.7})]).verdict == UNKNOWN
    failed = rows({**GOOD, ("b", "b", "ffm+tlt"): (0.3, 0.3), ("a", "b", "ffm+tlt"): (0.1, 0.1)})
    assert verdict(2, failed).verdict == NOT
    assert verdict(2, [*failed, *alone(0.3, {"b": 0.7})]).verdict == UNKNOWN


def test_below_the_majority_one_training_is_not_better_than_another():
    made = rows({**GOOD, ("a", "b", "tlt"): (0.05, 0.05), ("a", "b", "ffm+tlt"): (0.2, 0.2)})
    assert verdict(1, made).verdict == HOLDS
    assert verdict(1, [*made, *alone(0.2, {"b": 0.7})]).verdict == UNKNOWN
    assert verdict(3, made).verdict == NOT
    assert verdict(3, [*made, *alone(0.9, {"b": 0.95})]).verdict == UNKNOWN


def test_the_majority_is_beaten_only_beyond_its_sampling_error():
    made, few = rows(GOOD, noise=0.0), {"metric": "accuracy", "pictures": {"test": 20_000}}
    assert verdict(2, [*made, *alone(0.46, {"b": 0.8}, **few)]).verdict == HOLDS
    few = {"metric": "accuracy", "pictures": {"test": 20_000}}
    assert verdict(2, [*made, *alone(0.475, {"b": 0.8}, **few)]).verdict == UNKNOWN


def test_tables_show_the_marks_and_what_they_mean():
    made = trained(rows(GOOD), ffm=stage(1e-4), tlt=stage(best=9))
    (shown,) = score_tables(made)
    assert ["ffm+tlt", "a into b", "50.0 +- 1.0 (e, f)", "70.0 +- 1.0 (e, f)"] in shown.rows
    assert ["tlt", "a into b", "30.0 +- 1.0 (f)", "60.0 +- 1.0 (f)"] in shown.rows
    assert "(e) rate at the edge" in shown.note
    assert "(s)" not in shown.note
    assert letters(trained(rows(GOOD))) == ""


def test_default_rates_bracket_what_rows_took():
    assert min(TrainConfig().rates) == 1e-5
    assert max(TrainConfig().rates) > 3e-3
    assert ProtocolConfig.__dataclass_fields__["train"].default_factory().rates == TrainConfig().rates


def test_marks_of_a_run_are_those_of_its_training(config, tmp_path):
    """Rates so low or so high that what happens is known: nothing beats the start, or the last epoch is the best."""
    config = replace(config, directions=["b>b"], objectives=["ffm"])
    blown = run_protocol(tmp_path / "a", replace(config, train=replace(TRAIN, rates=[5.0], ffm_epochs=2)), show=False)
    (row,) = [r for r in blown["rows"] if r["kind"] == "stitched"]
    assert marks(row)["ffm"] == [START]
    slow = run_protocol(tmp_path / "b", replace(config, train=replace(TRAIN, rates=[1e-7, 1e-6])), show=False)
    (row,) = [r for r in slow["rows"] if r["kind"] == "stitched"]
    assert marks(row)["ffm"] == [EDGE, FALLING]
    assert "(e, f)" in (tmp_path / "b" / "tables.md").read_text()
