"""Runs notebooks from top to bottom, offline, and keeps what they print and draw: ``python notebooks/run.py [01 03 …]``.

Each runs in an empty folder. Numbers choose some of them.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
DATA = FOLDER.parents[1] / "shared/data"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ADAPTERS_DATA": str(DATA)}


def execute(notebook: Any, folder: str, seconds: int) -> None:
    """Runs all cells in `folder`, each in so many seconds at most; what they give is kept in the notebook."""
    NotebookClient(notebook, timeout=seconds, resources={"metadata": {"path": folder}}).execute()


def run(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        execute(notebook, folder, 900)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # progress bars and warnings say nothing to a reader
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, file)


def main() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for file in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or file.name.split("_")[0] in sys.argv[1:]:
            print(file.name, flush=True)
            run(file)


if __name__ == "__main__":
    main()
