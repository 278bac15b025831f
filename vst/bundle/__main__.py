"""``python -m vst.bundle FOLDER``: a bundle is put in place, on a machine whose packages may come in the bundle.

Run by its path, ``python PATH/TO/vst/bundle FOLDER``, it needs torch and numpy alone: the package ``vst`` is then known
by its folder, and what that imports for its users is not imported.
"""

import sys
from pathlib import Path
from types import ModuleType

if not __package__:
    sys.path.pop(0)  # this folder, whose files are no modules at the top
    library = ModuleType("vst")
    library.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["vst"] = library

from vst.bundle.unbundle import main

if __name__ == "__main__":
    main()
