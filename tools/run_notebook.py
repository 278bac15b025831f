"""Run a notebook and keep its outputs in it: ``python tools/run_notebook.py notebooks/first-tree.ipynb``.

As ``jupyter execute --inplace`` does, but without the times of each cell, which that command cannot leave out and which
would change with every run.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

if __name__ == "__main__":
    path = Path(sys.argv[1])
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": path.parent}}).execute()
    nbformat.write(notebook, path)
