"""The VFM Stitch Tree: several vision foundation models behind one shared trunk."""

from vst.fit.config import FitConfig, FitResult
from vst.fit.heldout import StitchReport, evaluate_stitches, evaluate_trunk
from vst.fit.loop import fit_stitches
from vst.fit.tuning import TuneConfig
from vst.models.checkpoints import load_vfm
from vst.models.spec import VFMSpec
from vst.models.vfm import VFM
from vst.tree.config import BranchConfig, VSTConfig
from vst.tree.encoder import Features, VSTEncoder

__version__ = "0.1.0"
__all__ = [
    "BranchConfig",
    "Features",
    "FitConfig",
    "FitResult",
    "StitchReport",
    "TuneConfig",
    "VFM",
    "VFMSpec",
    "VSTConfig",
    "VSTEncoder",
    "evaluate_stitches",
    "evaluate_trunk",
    "fit_stitches",
    "load_vfm",
]
