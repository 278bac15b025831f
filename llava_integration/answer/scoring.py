"""How good answers are, beside what is had without looking at the picture."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llava_integration.answer.ask import Question

_ARTICLE = re.compile(r"(?<!\S)(?:a|an|the)\s+(?=\S)")  # only before a word: "a" alone may be an answer
_ROOM = 2_000_000  # drawn groups that are held at once


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval.

    Attributes:
        mean: observed difference.
        low, high: ends of the interval.
    """

    mean: float
    low: float
    high: float


def normalise(text: str) -> str:
    """Reduce an answer to what is compared.

    Args:
        text: an answer as the model gave it or as a dataset has it.

    Returns:
        Its first line in lower case, with single spaces, without articles before a word and without punctuation at
        the end.
    """
    line = text.strip().partition("\n")[0].lower()
    return " ".join(_ARTICLE.sub("", line.rstrip(".,;:!? \t\r")).split())


def correct(answers: Sequence[str], questions: Sequence[Question]) -> np.ndarray:
    """Tell which answers are the expected ones, after :func:`normalise` of both.

    Returns:
        bool ``[questions]``.

    Raises:
        ValueError: there are not as many answers as questions, or a question expects none.
    """
    if len(answers) != len(questions):
        raise ValueError(f"There are {len(answers)} answers to {len(questions)} questions; give one to each.")
    if odd := next((q for q in questions if not normalise(q.answer)), None):
        raise ValueError(
            f"The answer expected to {odd.question!r} is {odd.answer!r}, so that saying nothing would be right; give "
            "questions with answers."
        )
    pairs = zip(answers, questions, strict=True)
    return np.array([normalise(answer) == normalise(q.answer) for answer, q in pairs], dtype=bool)


def majority(questions: Sequence[Question]) -> tuple[np.ndarray, dict[str, str]]:
    """Answer every question with the most frequent answer of its kind.

    The frequencies are those of these very questions, not of a training set: an oracle, so no constant answer to each
    kind can do better. Whoever stays below it has not been shown to look at the picture.

    Returns:
        Which questions that gets right, bool ``[questions]``, and the (normalised) answer by kind. Of answers that are
        equally frequent it is the one that comes first.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for q in questions:
        counts[q.kind][normalise(q.answer)] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
    return correct([best[q.kind] for q in questions], questions), best


def paired_bootstrap(
    better: np.ndarray | Sequence[bool],
    worse: np.ndarray | Sequence[bool],
    groups: Sequence[Hashable],
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Difference of two accuracies over the same questions, with a 95 % percentile interval.

    Whole groups are drawn with replacement, as many as there are, because questions about one picture are not
    independent; an interval over single questions would be too narrow. The two vectors are drawn together.

    Args:
        better, worse: which questions are right, bool ``[questions]`` each; the difference is the first's accuracy
            minus the second's.
        groups: of each question, here its picture.
        resamples: draws.
        seed: of the draws.

    Returns:
        The difference, -1..1. Of one group alone nothing is known about others: its interval is -1..1.

    Raises:
        ValueError: there are no questions, the three differ in length, or ``resamples`` is below 1.
    """
    if not len(better) == len(worse) == len(groups) or len(groups) == 0:
        raise ValueError(
            f"better, worse and groups have {len(better)}, {len(worse)} and {len(groups)} entries, but need the same "
            "number, at least 1."
        )
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, but must be at least 1.")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    of = np.array([places[group] for group in groups])
    gains = np.bincount(of, weights=np.asarray(better, dtype=float) - np.asarray(worse, dtype=float))
    sizes = np.bincount(of)
    mean = float(gains.sum() / sizes.sum())
    if len(places) == 1:
        return Difference(mean, -1.0, 1.0)
    rng = np.random.default_rng(seed)
    at_once = max(1, _ROOM // len(places))
    means = []
    for start in range(0, resamples, at_once):
        drawn = rng.integers(len(places), size=(min(at_once, resamples - start), len(places)))
        means.append(gains[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(mean, float(low), float(high))


def score(questions: Sequence[Question], answers: Sequence[str], blank_answers: Sequence[str]) -> dict[str, Any]:
    """Score answers beside the majority answer and the answers to blanked pictures.

    Args:
        questions: at least one.
        answers: of the model, one to each question.
        blank_answers: of the same model to the same questions, with every picture blanked.

    Returns:
        Numbers for JSON: ``n`` and ``pictures``; ``accuracy``, ``majority`` and ``blank`` (0..1); ``over_majority`` and
        ``over_blank``, the accuracy minus the other, as ``mean``, ``low`` and ``high`` (95 %, over pictures); and
        ``kinds``: by kind ``n``, ``accuracy``, ``majority``, ``majority_answer`` and ``blank``.

    Raises:
        ValueError: there are no questions, or not one answer to each.
    """
    if not questions:
        raise ValueError("There are no questions, so there is nothing to score; give at least one.")
    right, blank = correct(answers, questions), correct(blank_answers, questions)
    often, best = majority(questions)
    pictures = [q.image for q in questions]
    kinds = np.array([q.kind for q in questions])
    table = {}
    for kind, answer in best.items():
        of = kinds == kind
        table[kind] = {
            "n": int(of.sum()),
            "accuracy": float(right[of].mean()),
            "majority": float(often[of].mean()),
            "majority_answer": answer,
            "blank": float(blank[of].mean()),
        }
    return {
        "n": len(questions),
        "pictures": len(set(pictures)),
        "accuracy": float(right.mean()),
        "majority": float(often.mean()),
        "blank": float(blank.mean()),
        "over_majority": asdict(paired_bootstrap(right, often, pictures)),
        "over_blank": asdict(paired_bootstrap(right, blank, pictures)),
        "kinds": table,
    }
