"""Fit the stitches of a tree: ``python train/stitch.py --config FILE``, or under torchrun / accelerate launch."""

from vst.cli import command, fit

if __name__ == "__main__":
    command(fit)
