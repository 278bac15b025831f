"""The VFM Stitch Tree: several vision foundation models behind one shared trunk."""

from vst.checkpoints import load_vfm
from vst.config import BranchConfig, VSTConfig
from vst.fit_config import FitConfig, FitResult
from vst.fitting import fit_stitches
from vst.heldout import StitchReport, evaluate_stitches
from vst.spec import VFMSpec
from vst.tree import Features, VSTEncoder
from vst.vfm import VFM

__version__ = "0.1.0"
__all__ = [
    "BranchConfig",
    "Features",
    "FitConfig",
    "FitResult",
    "StitchReport",
    "VFM",
    "VFMSpec",
    "VSTConfig",
    "VSTEncoder",
    "evaluate_stitches",
    "fit_stitches",
    "load_vfm",
]
