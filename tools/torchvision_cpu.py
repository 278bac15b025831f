"""Make torchvision importable beside a CPU build of torch, in this virtual environment only.

The torchvision wheel of the package index is built for CUDA. Beside a CPU torch its compiled operators do not load, and
``import torchvision`` stops where it describes two of them that were never declared. This script (run once by the
set-up) tests the import and, only where it fails for that reason, leaves a ``.pth`` that declares the two operators
just before torchvision is imported. Models here never call them.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

NAME = "_declare_torchvision_ops"
MODULE = '''"""Declares two torchvision operators beside a CPU torch; see vfm-stitch-tree's tools/torchvision_cpu.py."""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.modules[__name__].kept = self  # a library that is collected takes its operators along
        return None


sys.meta_path.insert(0, _Declare())
'''


def works() -> tuple[bool, str]:
    """Whether torchvision imports in a fresh interpreter, and what it said."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stderr


def main() -> None:
    """Test, mend if needed, test again."""
    good, said = works()
    if good:
        return
    if "torchvision::nms does not exist" not in said:
        sys.exit(f"torchvision cannot be imported, for a reason that is not known here:\n{said}")
    if sys.prefix == sys.base_prefix:
        sys.exit("torchvision cannot be imported; this mend is for virtual environments only: make one first.")
    site = Path(sysconfig.get_paths()["purelib"])
    (site / f"{NAME}.py").write_text(MODULE)
    (site / f"{NAME}.pth").write_text(f"import {NAME}\n")
    good, said = works()
    if not good:
        sys.exit(f"torchvision still cannot be imported:\n{said}")
    print("torchvision: operators declared for the CPU build of torch")


if __name__ == "__main__":
    main()
