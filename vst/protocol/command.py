"""The command ``vst protocol``."""

from __future__ import annotations

from vst.protocol.config import ProtocolConfig
from vst.protocol.grid import run_protocol
from vst.results.stopping import goes_on


@goes_on
def protocol(protocol: ProtocolConfig, out: str = "runs/protocol", overwrite: bool = False) -> None:
    """Ask which models stitch, where, how, and against which control: a grid of stitched models and its report.

    A second call goes on where the first was stopped; the grid's axes may have grown. With every row there it draws the
    report anew.

    Examples:
        vst protocol --config configs/stitch/protocol.yaml
        vst protocol --config configs/stitch/protocol.yaml --protocol.seeds '[0,1,2]'

    Args:
        protocol: the grid.
        out: run folder: rows/, results.json, tables.md, pictures and index.html.
        overwrite: start the run in out again.
    """
    run_protocol(out, protocol, overwrite=overwrite)
