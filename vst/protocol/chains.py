"""How a stitch is trained, as a chain of stages: ``tlt``, ``ffm+tlt``, ``ridge+ffm+tlt``.

ridge, procrustes   closed forms at the seam (no gradient steps); only ever the first stage
lfm                 layer feature matching: the stitch's output to the target's own tokens at the seam; no labels
ffm                 final feature matching: the end of the target's tail to the target's own patch tokens; no labels
tlt                 task loss training: stitch and linear head together, through the frozen tail

A chain that begins with lfm, ffm or tlt begins from a random map between standardised spaces.
"""

from __future__ import annotations

CLOSED = ("ridge", "procrustes")
STAGES = (*CLOSED, "lfm", "ffm", "tlt")
Chain = tuple[str, ...]


def parse_chain(objective: str) -> Chain:
    """``"ffm+tlt"`` to ``("ffm", "tlt")``.

    Raises:
        ValueError: an unknown or repeated stage, a closed form that is not first, or a stage after tlt.
    """
    chain = tuple(objective.split("+"))
    if unknown := [stage for stage in chain if stage not in STAGES]:
        raise ValueError(
            f"Objective {objective!r} has stages {unknown}; expected {', '.join(STAGES)} joined by +, as in ffm+tlt."
        )
    if len(set(chain)) < len(chain) or any(s in CLOSED for s in chain[1:]) or "tlt" in chain[:-1]:
        raise ValueError(
            f"Objective {objective!r} repeats a stage, has a closed form that is not first, or goes on after tlt: "
            "name each stage once, ridge or procrustes first, tlt last."
        )
    return chain


def name_of(chain: Chain) -> str:
    """Inverse of :func:`parse_chain`; the empty chain is the random start."""
    return "+".join(chain) or "random"


def place_of(chain: Chain) -> tuple[int, ...]:
    """Where a chain stands in tables and legends: short ones first, then by their stages; a sort key."""
    return len(chain), *(STAGES.index(stage) for stage in chain)


def needs_labels(chain: Chain) -> bool:
    """Whether the chain's stitch depends on the task's labels."""
    return "tlt" in chain


def start_of(chain: Chain) -> str:
    """What a chain's first trained stage begins from: ``ridge``, ``procrustes`` or ``random``."""
    return chain[0] if chain and chain[0] in CLOSED else "random"
