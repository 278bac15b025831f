"""Measure a tree at every split: ``python eval/latency.py --config FILE`` (as ``vst latency``)."""

from vst.cli import command, latency

if __name__ == "__main__":
    command(latency)
