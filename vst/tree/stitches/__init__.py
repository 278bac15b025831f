"""Stitch layers, by family; importing this makes the library's own known."""

from vst.tree.stitches import lora, mapped
from vst.tree.stitches.base import DEFAULT_STITCH, STITCHES, Calibration, Stitch, StitchSpec, joined, register

__all__ = ["DEFAULT_STITCH", "STITCHES", "Calibration", "Stitch", "StitchSpec", "joined", "lora", "mapped", "register"]
