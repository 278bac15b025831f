"""Make the API reference from the docstrings, with pdoc: ``python tools/api_reference.py build/docs``.

pdoc shows a package's modules only where the package names them in ``__all__``. Here ``__all__`` is what ``from vst
import *`` gives, so this script adds the modules to it, in this process alone, and then lets pdoc do its work. A module
that cannot be imported, and any other warning but one about a type that is not resolved, ends it with an error: a page
that is missing is noticed here and not by a reader.
"""

import argparse
import os
import pkgutil
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pdoc
import pdoc.render

PACKAGES = ("vst", "llava_integration")
HARMLESS = "Error parsing type annotation"  # of a parent class elsewhere: the annotation is shown as it is written


def name_modules(package_name: str) -> int:
    """Add a package's public modules to its ``__all__``, and so on below; returns how many pages that makes."""
    package = import_module(package_name)
    found = [m for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    if hasattr(package, "__all__"):
        package.__all__ = [*package.__all__, *(m.name for m in found if m.name not in package.__all__)]
    return 1 + sum(name_modules(f"{package_name}.{m.name}") if m.ispkg else 1 for m in found)


def main() -> None:
    """Make all pages anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pages go; what pdoc left there before is removed")
    folder = parser.parse_args().folder
    if folder.exists():
        shutil.rmtree(folder)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        expected = sum(name_modules(name) for name in PACKAGES)
        pdoc.render.configure(docformat="google", search=True, show_source=True)
        pdoc.pdoc(*PACKAGES, output_directory=folder)
    pages = len([path for path in folder.rglob("*.html") if path != folder / "index.html"])
    wrong = [str(w.message) for w in said if "pdoc" in w.filename and not str(w.message).startswith(HARMLESS)]
    if pages != expected:
        wrong.append(f"{pages} pages were made for {expected} modules.")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"API reference of {pages} modules: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
