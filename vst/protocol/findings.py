"""Whether the paper's first three findings hold in a grid: computed from its rows, by stated rules.

Scores are compared over the seeds that both sides have. A difference of means is *clear* when it is larger than twice
the spread of a score: the root mean square of the two standard deviations over seeds, and for accuracies at least that
of their binomial sampling errors on the test pictures. With fewer than two seeds in common nothing is clear.

1. *How a stitch is trained decides, above all at shallow depths.* FFM-then-TLT minus TLT at the shallowest depth, from
   the same start, for every direction between two models that has rows of this start. Holds: clearly positive in all.
   Does not hold: clearly negative in any.
2. *So trained, different models stitch reliably.* The target's self-stitch where the target is entered minus the
   cross-stitch (both FFM-then-TLT), for every direction between two models and every depth. Holds: the drop plus twice
   the spread is within the tolerated drop everywhere. Does not hold: the drop minus twice the spread is beyond it
   anywhere.
3. *A deep stitch gains from both models.* The cross-stitch minus each of the two self-stitches (the source's at its
   depth, the target's where it is entered) at the deepest depth, all FFM-then-TLT. Holds: clearly positive against both
   in any direction between two models. Does not hold: clearly negative against one of them in all directions.

Anything else *cannot be told here*: rows are missing, or the difference is within the spread. Nor is a difference told
where a row's training hardly happened (:func:`vst.protocol.marks.doubts`), or where its better side is not clearly
above the majority class: at chance all models are alike. The second finding asks that of the target alone and of its
self-stitch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vst.protocol.chains import is_closed, name_of, needs_labels, parse_chain, start_of
from vst.protocol.marks import doubts

HOLDS, NOT, UNKNOWN = "holds", "does not hold", "cannot be told here"
CLAIMS = {
    1: "How a stitch is trained decides, above all at shallow depths",
    2: "Trained by FFM and then TLT, different models stitch reliably",
    3: "A deep stitch gains from both models",
}
Scores = Mapping[int, float]
Place = tuple[str, str, int, str]


@dataclass(frozen=True)
class Verdict:
    """One finding in one part of the grid.

    Attributes:
        finding: 1 to 3. claim: in words.
        task, family, start: the part; start is that of the chains compared (random, or ridge).
        verdict: ``holds``, ``does not hold`` or ``cannot be told here``.
        reasons: the differences that it rests on.
    """

    finding: int
    claim: str
    task: str
    family: str
    start: str
    verdict: str
    reasons: list[str]

    @property
    def sentence(self) -> str:
        """As a report shows it."""
        return (
            f"{self.claim}: {self.verdict} ({self.task}, {self.family}, {self.start} start). {'; '.join(self.reasons)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dict, with the sentence."""
        return {**asdict(self), "sentence": self.sentence}


def findings(rows: Sequence[Mapping[str, Any]], tolerated_drop: float = 0.02) -> list[Verdict]:
    """Verdicts for every task, family and start that has rows of chains ending in tlt.

    Args:
        rows: of the grid; those of models alone tell how many test pictures there are, and what the majority class has.
        tolerated_drop: of score, for the second finding.
    """
    alone: dict[str, _Alone] = {}
    for row in rows:
        if row["kind"] == "model":
            alone.setdefault(row["task"], _Alone()).add(row)
    parts: dict[tuple[str, str, str], _Part] = {}
    for row in rows:
        if row["kind"] == "stitched":
            start = start_of(parse_chain(row["objective"]))
            name = (row["task"], row["family"], start)
            parts.setdefault(name, _Part(tolerated_drop, alone.get(row["task"], _Alone()))).add(row)
    return [
        Verdict(number, CLAIMS[number], *name, *rule(part))
        for name, part in parts.items()
        if part.scores
        for number, rule in ((1, _training), (2, _reliable), (3, _fusion))
    ]


@dataclass(frozen=True)
class Difference:
    """Of two mean scores.

    Attributes:
        value: of the means, over the seeds that both have.
        spread: of a score (None with fewer than two such seeds).
        sampled: the spread is that of the test pictures, larger than that over seeds.
        doubts: why it tells nothing, however large it is.
    """

    value: float
    spread: float | None
    sampled: bool = False
    doubts: tuple[str, ...] = ()

    @property
    def sign(self) -> int:
        """1 for clearly positive, -1 for clearly negative, 0 for what cannot be told."""
        if self.doubts or self.spread is None or abs(self.value) <= 2 * self.spread:
            return 0
        return 1 if self.value > 0 else -1

    def __str__(self) -> str:
        if self.spread is None:
            noise = "one seed, no spread"
        else:
            noise = f"{'sampling error' if self.sampled else 'pooled spread'} {100 * self.spread:.1f}"
        return f"{100 * self.value:+.1f} points ({'; '.join([noise, *self.doubts])})"


def difference(a: Scores | None, b: Scores | None, pictures: int | None = None) -> Difference | None:
    """Of mean scores over common seeds; None where there are none.

    Args:
        a, b: score by seed.
        pictures: test pictures of each, where scores are accuracies: the spread is at least their sampling error.
    """
    common = sorted(set(a or ()) & set(b or ()))
    if a is None or b is None or not common:
        return None
    sides = [[s[seed] for seed in common] for s in (a, b)]
    value = statistics.mean(sides[0]) - statistics.mean(sides[1])
    if len(common) < 2:
        return Difference(value, None)
    spread = math.sqrt(statistics.mean(statistics.variance(side) for side in sides))
    if pictures is not None:
        means = [statistics.mean(side) for side in sides]
        least = math.sqrt(statistics.mean(m * (1 - m) / pictures for m in means))
        if least > spread:
            return Difference(value, least, sampled=True)
    return Difference(value, spread)


@dataclass
class _Alone:
    """The models alone on one task: scores by name and seed, the majority class by seed, how many test pictures."""

    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    majority: dict[int, float] = field(default_factory=dict)
    pictures: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        if row["metric"] == "accuracy":
            self.pictures = min(row["pictures"]["test"], self.pictures or row["pictures"]["test"])
        if _told_score(row) and row.get("majority") is not None:
            self.scores.setdefault(row["model"], {})[row["seed"]] = row["score"]
            self.majority[row["seed"]] = row["majority"]

    def lost(self, scores: Scores | None) -> bool:
        """Whether scores are known not to be clearly above the majority class."""
        found = difference(scores, self.majority, self.pictures)
        return found is not None and found.spread is not None and found.sign < 1


@dataclass
class _Part:
    """Rows of one task, family and start."""

    tolerated: float
    alone: _Alone
    doubts: dict[Place, dict[int, list[str]]] = field(default_factory=dict)
    scores: dict[Place, dict[int, float]] = field(default_factory=dict)
    enters: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        a, b, depth = row["source"], row["target"], row["depth"]
        self.enters[a, b, depth] = row["enter"]
        chain = parse_chain(row["objective"])
        if needs_labels(chain) and _told_score(row):
            trained = name_of(tuple(stage for stage in chain if not is_closed(stage)))
            self.scores.setdefault((a, b, depth, trained), {})[row["seed"]] = row["score"]
            self.doubts.setdefault((a, b, depth, trained), {})[row["seed"]] = doubts(row)

    def crossed(self) -> dict[tuple[str, str], list[int]]:
        """Depths by direction between two models."""
        out: dict[tuple[str, str], list[int]] = {}
        for a, b, depth in sorted(self.enters):
            if a != b:
                out.setdefault((a, b), []).append(depth)
        return out

    def minus(self, place: Place, other: Place) -> Difference | None:
        """Of two places; with what speaks against telling anything by it."""
        found = difference(self.scores.get(place), self.scores.get(other), self.alone.pictures)
        if found is None:
            return None
        common = self.scores[place].keys() & self.scores[other].keys()
        against = {d: None for p in (place, other) for seed in sorted(common) for d in self.doubts[p][seed]}
        if self.alone.lost(self.scores[place if found.value > 0 else other]):
            against["neither is clearly above the majority class"] = None
        return replace(found, doubts=tuple(against))


def _training(part: _Part) -> tuple[str, list[str]]:
    signs, reasons = [], []
    for (a, b), depths in part.crossed().items():
        found = part.minus((a, b, depths[0], "ffm+tlt"), (a, b, depths[0], "tlt"))
        signs.append(0 if found is None else found.sign)
        reasons.append(f"{a} into {b} at {depths[0]}, FFM then TLT minus TLT{_told(found)}")
    return _all_or_any(signs), reasons or ["no direction between two models has rows"]


def _reliable(part: _Part) -> tuple[str, list[str]]:
    signs, reasons = [], []
    for (a, b), depths in part.crossed().items():
        for depth in depths:
            enter = part.enters[a, b, depth]
            found = part.minus((b, b, enter, "ffm+tlt"), (a, b, depth, "ffm+tlt"))
            sign = 0
            if found is not None:
                at_chance = [
                    f"{name} is not clearly above the majority class"
                    for name, scores in (
                        (f"{b} alone", part.alone.scores.get(b)),
                        (f"{b} into itself", part.scores[b, b, enter, "ffm+tlt"]),
                    )
                    if part.alone.lost(scores)
                ]
                found = replace(found, doubts=(*found.doubts, *at_chance))
            if found is not None and found.spread is not None and not found.doubts:
                low, high = found.value - 2 * found.spread, found.value + 2 * found.spread
                sign = 1 if high <= part.tolerated else -1 if low > part.tolerated else 0
            signs.append(sign)
            reasons.append(f"{b} into itself{_at(enter, depth)} minus {a} into {b} at {depth}{_told(found)}")
    if reasons:
        reasons[-1] += f"; tolerated: {100 * part.tolerated:.1f} points"
    return _all_or_any(signs), reasons or ["no direction between two models has rows"]


def _fusion(part: _Part) -> tuple[str, list[str]]:
    signs, reasons = [], []
    for (a, b), depths in part.crossed().items():
        depth = depths[-1]
        cross = (a, b, depth, "ffm+tlt")
        selves = {m: (m, m, at, "ffm+tlt") for m, at in ((a, depth), (b, part.enters[a, b, depth]))}
        gains = {m: part.minus(cross, place) for m, place in selves.items()}
        signs.append(min(0 if gain is None else gain.sign for gain in gains.values()))
        smallest_first = sorted(gains.items(), key=lambda pair: math.inf if pair[1] is None else pair[1].value)
        told = [f"{m} into itself{_at(selves[m][2], depth)}{_told(gain)}" for m, gain in smallest_first]
        reasons.append(f"{a} into {b} at {depth} minus {', minus '.join(told)}")
    if any(s > 0 for s in signs):
        return HOLDS, reasons
    verdict = NOT if signs and all(s < 0 for s in signs) else UNKNOWN
    return verdict, reasons or ["no direction between two models has rows"]


def _told_score(row: Mapping[str, Any]) -> bool:
    """Whether a row has a score; one that was not finite is null on disk."""
    return row.get("score") is not None and math.isfinite(row["score"])


def _at(enter: int, depth: int) -> str:
    return "" if enter == depth else f" at {enter}"


def _told(found: Difference | None) -> str:
    return ": rows are missing (no seed has both)" if found is None else f" {found}"


def _all_or_any(signs: Sequence[int]) -> str:
    if signs and all(s > 0 for s in signs):
        return HOLDS
    return NOT if any(s < 0 for s in signs) else UNKNOWN
