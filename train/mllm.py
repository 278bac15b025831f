"""Train a language model on a stitch tree (``--help`` tells all options)."""

from llava_integration.training import train
from vst.cli import command

if __name__ == "__main__":
    command(train)
