"""How a stitch is trained, as a chain of stages: ``tlt``, ``ffm+tlt``, ``ridge+ffm+tlt``.

Stages are the objectives of :mod:`vst.fit.objectives`. A closed form is only ever the first stage, and one that needs
labels the last. A chain that begins otherwise begins from a random map between standardised spaces.
"""

from __future__ import annotations

from vst.fit.objectives import OBJECTIVES, closed_forms

Chain = tuple[str, ...]


def parse_chain(objective: str) -> Chain:
    """``"ffm+tlt"`` to ``("ffm", "tlt")``.

    Raises:
        ValueError: an unknown or repeated stage, a closed form that is not first, or a stage after one with labels.
    """
    chain = tuple(objective.split("+"))
    if unknown := [stage for stage in chain if stage not in OBJECTIVES]:
        raise ValueError(
            f"Objective {objective!r} has stages {unknown}; expected {', '.join(OBJECTIVES)} joined by +, as in "
            "ffm+tlt."
        )
    if len(set(chain)) < len(chain) or any(is_closed(s) for s in chain[1:]) or needs_labels(chain[:-1]):
        raise ValueError(
            f"Objective {objective!r} repeats a stage, has a closed form that is not first, or goes on after tlt: "
            f"name each stage once, {' or '.join(closed_forms())} first, tlt last."
        )
    return chain


def name_of(chain: Chain) -> str:
    """Inverse of :func:`parse_chain`; the empty chain is the random start."""
    return "+".join(chain) or "random"


def place_of(chain: Chain) -> tuple[int, ...]:
    """Where a chain stands in tables and legends: short ones first, then by their stages; a sort key."""
    stages = list(OBJECTIVES)
    return len(chain), *(stages.index(stage) for stage in chain)


def needs_labels(chain: Chain) -> bool:
    """Whether the chain's stitch depends on the task's labels."""
    return any(OBJECTIVES[stage].labels for stage in chain)


def is_closed(stage: str) -> bool:
    """Whether a stage is a closed form."""
    return OBJECTIVES[stage].closed_form


def start_of(chain: Chain) -> str:
    """What a chain's first trained stage begins from: a closed form's name or ``random``."""
    return chain[0] if chain and is_closed(chain[0]) else "random"
