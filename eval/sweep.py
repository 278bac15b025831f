"""Run the stitching protocol: ``python eval/sweep.py --config configs/stitch/protocol.yaml`` (as ``vst protocol``)."""

from vst.parsing import command
from vst.protocol.command import protocol

if __name__ == "__main__":
    command(protocol)
