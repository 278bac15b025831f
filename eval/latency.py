"""Measure a tree at every split: ``python eval/latency.py --config FILE`` (as ``vst latency``)."""

from vst.cli import latency
from vst.parsing import command

if __name__ == "__main__":
    command(latency)
