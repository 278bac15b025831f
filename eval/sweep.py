"""Run the stitching protocol: ``python eval/sweep.py --config configs/stitch/protocol.yaml`` (as ``vst protocol``)."""

from vst.cli import command, protocol

if __name__ == "__main__":
    command(protocol)
