"""From vision width to language width: one projector for the fused tokens, or one a branch and then the fusion.

linear  one matrix            mlp  matrix, GELU, matrix (LLaVA-1.5's mlp2x_gelu)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from vst.tree.fusion import FUSIONS, Fusion

KINDS = ("linear", "mlp")


@dataclass(frozen=True)
class ProjectorSpec:
    """What stands between the tower and the language model.

    Attributes:
        kind: linear or mlp (LLaVA-1.5's, the default).
        fusion: None is one projector for the tower's fused tokens; interleave, sequence or additive gives every branch
            a projector of its own and fuses what comes out, so that branches of any width can be joined (the tower's
            own fusion is then channel: the branches side by side).

    Raises:
        ValueError: an unknown kind or fusion.
    """

    kind: str = "mlp"
    fusion: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"projector kind is {self.kind!r}; expected one of {', '.join(KINDS)}.")
        known = sorted(name for name, rule in FUSIONS.items() if not rule.widens)
        if self.fusion is not None and self.fusion not in known:
            raise ValueError(
                f"projector fusion is {self.fusion!r}; expected null (one projector) or one of {', '.join(known)} "
                "(one a branch)."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProjectorSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: unknown keys or values.
        """
        if unknown := set(values) - {"kind", "fusion"}:
            raise ValueError(f"A projector has no field {sorted(unknown)}; expected kind and fusion.")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        return asdict(self)

    def tokens(self, tower_tokens: int, branches: int) -> int:
        """Tokens out for one picture, from what the tower gives."""
        return tower_tokens * (branches if self.fusion is not None and FUSIONS[self.fusion].multiplies else 1)

    def build(self, widths: Sequence[int], out: int) -> Projector:
        """The module.

        Args:
            widths: of the branches, in the order of fusion; for one projector the fused width alone.
            out: width of the language model.
        """
        return Projector(self, widths, out)


class Projector(nn.Module):
    """``[B, N, sum of widths]`` to ``[B, tokens, out]``; see :class:`ProjectorSpec`."""

    def __init__(self, spec: ProjectorSpec, widths: Sequence[int], out: int) -> None:
        super().__init__()
        self.spec, self.widths = spec, list(widths) if spec.fusion is not None else [sum(widths)]
        self.maps = nn.ModuleList(_map(spec.kind, width, out) for width in self.widths)

    def forward(self, x: Tensor) -> Tensor:
        """Project, and where there is one projector a branch fuse (no normalisation after it)."""
        parts = [m(part) for m, part in zip(self.maps, x.split(self.widths, dim=-1), strict=True)]
        if self.spec.fusion is None:
            return parts[0]
        widths = {str(i): part.shape[-1] for i, part in enumerate(parts)}
        return Fusion(self.spec.fusion, widths, normalise="none")(parts)


def _map(kind: str, width: int, out: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, out)
    return nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
