"""The notebooks run from the first cell to the last, and are stored with what they printed and drew, small."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient

from pipelines import stack
from tests.docs.modules import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SERVERS = {"serving"}
"""Those that start Ray, with a local stack of their own."""
RUNS = [
    pytest.param(path, id=path.stem, marks=pytest.mark.integration if path.stem in SERVERS else pytest.mark.heavy)
    for path in NOTEBOOKS
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", RUNS)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    try:
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finally:
        for record in tmp_path.rglob("stack.json"):  # a cell has failed before the one that ends the stack
            stack.down(record.parent)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_small_with_its_outputs_and_nothing_of_the_machine(path):
    text = path.read_text()
    assert len(text) < 300_000
    assert not re.search(r"/home/|/root/|/tmp/|Traceback", text)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in output.data for output in drawn)
    assert notebook.cells[0].source.startswith("# ")


def test_the_page_of_notebooks_names_every_one():
    page = (FOLDER / "index.md").read_text()
    assert len(NOTEBOOKS) >= 3
    assert {path.name for path in NOTEBOOKS} == set(re.findall(r"\]\(([a-z]+\.ipynb)\)", page))
