"""Whether the paper's first three findings hold in a grid: computed from its rows, by stated rules.

A difference of mean scores is *clear* when it is larger than twice the pooled spread, the root mean square of the two
standard deviations over seeds. With fewer than two seeds there is no spread, so nothing is clear.

1. *How a stitch is trained decides, above all at shallow depths.* FFM-then-TLT minus TLT at the shallowest depth, from
   the same start, for every direction between two models. Holds: clearly positive in all. Does not hold: clearly
   negative in any.
2. *So trained, different models stitch reliably.* The target's self-stitch minus the cross-stitch (both FFM-then-TLT),
   for every direction between two models and every depth. Holds: the drop plus twice the pooled spread is within the
   tolerated drop everywhere. Does not hold: the drop minus twice the pooled spread is beyond it anywhere.
3. *A deep stitch gains from both models.* The cross-stitch minus the better of the two self-stitches at the deepest
   depth (all FFM-then-TLT). Holds: clearly positive in any direction between two models. Does not hold: clearly
   negative in all; a self-stitch that has no row can only raise the better of the two, so one is enough for that.

Anything else *cannot be told here*: rows are missing, or the difference is within the spread.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vst.protocol.chains import CLOSED, name_of, needs_labels, parse_chain, start_of

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
    """Verdicts for every task, family and start that has rows of chains ending in tlt."""
    stitched = [r for r in rows if r["kind"] == "stitched"]
    parts: dict[tuple[str, str, str], dict[Place, dict[int, float]]] = {}
    for row in stitched:
        chain = parse_chain(row["objective"])
        start = start_of(chain)
        if needs_labels(chain):
            trained = name_of(tuple(stage for stage in chain if stage not in CLOSED))
            place = (row["source"], row["target"], row["depth"], trained)
            part = parts.setdefault((row["task"], row["family"], start), {})
            part.setdefault(place, {})[row["seed"]] = row["score"]
    out = []
    for (task, family, start), scores in parts.items():
        for number, rule in ((1, _training), (2, _reliable), (3, _fusion)):
            verdict, reasons = rule(scores, tolerated_drop)
            out.append(Verdict(number, CLAIMS[number], task, family, start, verdict, reasons))
    return out


def difference(a: Scores | None, b: Scores | None) -> tuple[float, float | None] | None:
    """Difference of mean scores and pooled spread (None with fewer than two seeds); None where a side has no row."""
    if not a or not b:
        return None
    diff = statistics.mean(a.values()) - statistics.mean(b.values())
    if min(len(a), len(b)) < 2:
        return diff, None
    spread = math.sqrt((statistics.variance(a.values()) + statistics.variance(b.values())) / 2)
    return diff, spread


def _crossed(scores: Mapping[Place, Scores]) -> list[tuple[str, str]]:
    return sorted({(a, b) for a, b, _, _ in scores if a != b})


def _told(what: str, found: tuple[float, float | None] | None) -> str:
    if found is None:
        return f"{what}: rows are missing"
    diff, spread = found
    noise = "one seed, no spread" if spread is None else f"pooled spread {100 * spread:.1f}"
    return f"{what} {100 * diff:+.1f} points ({noise})"


def _sign(found: tuple[float, float | None] | None) -> int:
    """1 for clearly positive, -1 for clearly negative, 0 for what cannot be told."""
    if found is None or found[1] is None or abs(found[0]) <= 2 * found[1]:
        return 0
    return 1 if found[0] > 0 else -1


def _training(scores: Mapping[Place, Scores], tolerated: float) -> tuple[str, list[str]]:
    signs, reasons = [], []
    for a, b in _crossed(scores):
        depth = min(d for x, y, d, _ in scores if (x, y) == (a, b))
        found = difference(scores.get((a, b, depth, "ffm+tlt")), scores.get((a, b, depth, "tlt")))
        signs.append(_sign(found))
        reasons.append(_told(f"{a} into {b} at {depth}, FFM then TLT minus TLT", found))
    return _all_or_any(signs), reasons or ["no direction between two models has rows"]


def _all_or_any(signs: Sequence[int]) -> str:
    if signs and all(s > 0 for s in signs):
        return HOLDS
    return NOT if any(s < 0 for s in signs) else UNKNOWN


def _reliable(scores: Mapping[Place, Scores], tolerated: float) -> tuple[str, list[str]]:
    signs, reasons = [], []
    for a, b, depth in sorted({(a, b, d) for a, b, d, _ in scores if a != b}):
        found = difference(scores.get((b, b, depth, "ffm+tlt")), scores.get((a, b, depth, "ffm+tlt")))
        sign = 0
        if found is not None and found[1] is not None:
            sign = 1 if found[0] + 2 * found[1] <= tolerated else -1 if found[0] - 2 * found[1] > tolerated else 0
        signs.append(sign)
        reasons.append(_told(f"{b} into itself minus {a} into {b} at {depth}", found))
    if reasons:
        reasons[-1] += f"; tolerated: {100 * tolerated:.1f} points"
    return _all_or_any(signs), reasons or ["no direction between two models has rows"]


def _fusion(scores: Mapping[Place, Scores], tolerated: float) -> tuple[str, list[str]]:
    signs, reasons = [], []
    for a, b in _crossed(scores):
        depth = max(d for x, y, d, _ in scores if (x, y) == (a, b))
        selves = {m: s for m in (a, b) if (s := scores.get((m, m, depth, "ffm+tlt")))}
        better = max(selves, key=lambda m: statistics.mean(selves[m].values()), default=None)
        found = difference(scores.get((a, b, depth, "ffm+tlt")), None if better is None else selves[better])
        sign = _sign(found)
        signs.append(sign if len(selves) == 2 or sign < 0 else 0)
        lacking = [m for m in (a, b) if m not in selves]
        reasons.append(
            _told(f"{a} into {b} at {depth} minus {f'{better} into itself' if better else 'any self-stitch'}", found)
            + (f" ({', '.join(lacking)} into itself has no row)" if lacking else "")
        )
    if any(s > 0 for s in signs):
        return HOLDS, reasons
    verdict = NOT if signs and all(s < 0 for s in signs) else UNKNOWN
    return verdict, reasons or ["no direction between two models has rows"]
