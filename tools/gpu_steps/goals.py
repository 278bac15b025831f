"""What a tree is to reach on a GPU, judged on the cells that were measured: each reached or not, with its number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

OVER = 0.03  # time over that of all in full may lie this much above the same ratio in FLOPs, at batch 32
MFU = 0.55  # of VST-14 of the pair at batch 128, over the matrix product
SHARE = 0.6  # of the matrix product's rate, that time at batch 1 is compared with
SLOWER = 1.5  # how much slower than that VST-14 of the pair may be there, with graphs, at 576 tokens
OVER_ONE = 1.3  # VST-14 of four ViT-L over one ViT-L, at batch 1 with graphs
_MIDDLE, _ALL = "VST-14", "all in full"


def judged(cells: Sequence[Mapping[str, Any]], matmul_tflops: float) -> list[dict[str, Any]]:
    """Every goal that the cells can tell of.

    Args:
        cells: ``tree``, ``tokens``, ``batch``, ``execution`` and ``towers``: rows of ``measure_tree`` with ``mfu``.
        matmul_tflops: what a matrix product reaches on the same device, in TFLOP/s.

    Returns:
        ``goal`` (in words), ``found`` (the number), ``at_most`` or ``at_least`` (the bound), ``reached``.
    """
    found = []
    for cell in cells:
        for goal in _goals(cell, matmul_tflops):
            bound, most = goal.get("at_most", goal.get("at_least")), "at_most" in goal
            found.append({**goal, "reached": goal["found"] <= bound if most else goal["found"] >= bound})
    return found


def _goals(cell: Mapping[str, Any], rate: float) -> Iterator[dict[str, Any]]:
    rows = {row["name"]: row for row in cell["towers"]}
    where = f"{cell['tree']}, {cell['tokens']} tokens, batch {cell['batch']}, {cell['execution']}"
    middle, graphs = rows.get(_MIDDLE), cell["execution"] in ("graphs", "compiled-graphs")
    if cell["batch"] == 32:
        full = rows.get(f"{_ALL}, {cell['execution']}", rows[_ALL])
        for name, row in rows.items():
            if name.startswith("VST-"):
                over = row["ratio"] / full["ratio"] / row["flops_ratio"] - 1
                yield {"goal": f"{name} over its FLOPs: {where}", "found": over, "at_most": OVER}
    if middle is None:
        return
    if cell["batch"] == 128 and cell["tree"] == "pair":
        yield {"goal": f"MFU of {_MIDDLE}: {where}", "found": middle["mfu"], "at_least": MFU}
    if cell["batch"] == 1 and graphs and cell["tree"] == "pair" and cell["tokens"] == 576:
        least = middle["gflops"] / (SHARE * rate)  # GFLOP over TFLOP/s: milliseconds
        told = f"{_MIDDLE} over its FLOPs at {100 * SHARE:.0f} % of the matrix product's rate: {where}"
        yield {"goal": told, "found": middle["median_ms"] / least, "at_most": SLOWER}
    if cell["batch"] == 1 and graphs and cell["tree"] == "four" and "trunk_ratio" in middle:
        told = f"{_MIDDLE} over the trunk alone: {where}"
        yield {"goal": told, "found": middle["trunk_ratio"], "at_most": OVER_ONE}


def lines(goals: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of a table: the goal, what was found, the bound, whether it is reached."""
    return [
        [
            goal["goal"],
            f"{goal['found']:.3f}",
            f"at most {goal['at_most']:g}" if "at_most" in goal else f"at least {goal['at_least']:g}",
            "yes" if goal["reached"] else "no",
        ]
        for goal in goals
    ]
