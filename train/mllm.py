"""Train a language model on a stitch tree (``--help`` tells all options)."""

from llava_integration.train.training import train
from vst.parsing import command

if __name__ == "__main__":
    command(train)
