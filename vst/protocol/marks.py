"""Marks of rows whose training hardly happened, read from what their stages noted.

A stage chooses among rates and keeps its best epoch. Where the rate is the lowest or the highest of those tried, a
better one may lie beyond; where the best epoch is 0, training changed nothing; where it is the last that was allowed,
more epochs might have gone on. What such rows score is told, and marked; no finding rests on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vst.protocol.chains import is_closed, needs_labels, parse_chain

EDGE, START, FALLING = "rate at the edge", "kept the start", "still falling"
LETTERS = {EDGE: "e", START: "s", FALLING: "f"}
"""As they stand behind a score in a table."""


def stage_marks(facts: Mapping[str, Any]) -> list[str]:
    """Of one trained stage, from its ``rate``, ``trials``, ``epochs`` and ``best``; a closed form has none of these."""
    out, rates = [], sorted(map(float, facts.get("trials") or ()))
    if rates and float(facts["rate"]) in (rates[0], rates[-1]):
        out.append(EDGE)
    if facts.get("best") == 0:
        out.append(START)
    elif "best" in facts and facts["best"] == facts["epochs"]:  # a stage that stopped by itself went on beyond its best
        out.append(FALLING)
    return out


def marks(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """By stage of a row of a stitched model; of those that its stitch was trained by, and of the head of a probe.

    A head's rate is not looked at: its loss is convex and it stops by itself, so that a rate costs it steps alone.
    """
    stages, chain = row.get("stages") or {}, parse_chain(row["objective"])
    found = {stage: stage_marks(stages.get(stage, {})) for stage in chain if not is_closed(stage)}
    if not needs_labels(chain):
        found["head"] = [mark for mark in stage_marks(stages.get("head", {})) if mark != EDGE]
    return {stage: own for stage, own in found.items() if own}


def doubts(row: Mapping[str, Any]) -> list[str]:
    """Why no finding may rest on a row, as ``STAGE MARK``.

    That an earlier stage might have gone on is no reason: the next one goes on from it.
    """
    last = parse_chain(row["objective"])[-1]
    return [
        f"{stage} {mark}"
        for stage, own in marks(row).items()
        for mark in own
        if mark != FALLING or stage in (last, "head")
    ]


def letters(rows: Sequence[Mapping[str, Any]]) -> str:
    """Marks that any of these rows has, as a table shows them behind a score: `` (e, f)``, or nothing."""
    seen = {mark for row in rows for own in marks(row).values() for mark in own}
    return f" ({', '.join(LETTERS[mark] for mark in LETTERS if mark in seen)})" if seen else ""


def legend(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the letters mean, where any of these rows has one."""
    said = {
        EDGE: "a stage took the lowest or the highest of the rates tried",
        START: "a stage changed nothing",
        FALLING: "a stage was best at the last epoch allowed",
    }
    seen = {mark for row in rows for own in marks(row).values() for mark in own}
    told = "; ".join(f"({LETTERS[mark]}) {mark}: {what}" for mark, what in said.items() if mark in seen)
    return f"{told}." if told else ""
