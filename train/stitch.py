"""Fit the stitches of a tree: ``python train/stitch.py --config FILE``, or under torchrun / accelerate launch."""

from vst.cli import fit
from vst.parsing import command

if __name__ == "__main__":
    command(fit)
