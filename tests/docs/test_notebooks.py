"""The notebooks run from the first cell to the last, and are stored with what they printed and drew, small."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbclient import NotebookClient

from pipelines import stack
from tests.docs.modules import ROOT
from tests.docs.shortened import with_fewer, without_assertions

FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SERVERS = {"serving"}
"""Those that start Ray, with a local stack of their own."""
FEWER = {
    "guidance": {
        "total_steps=140": "total_steps=14",
        "range(140)": "range(14)",
        "passes=20": "passes=2",
        "torch.arange(256)": "torch.arange(40)",
        "torch.arange(800)": "torch.arange(60)",
    },
    "likelihood": {
        "CosineAnnealingLR(optimizer, 3000)": "CosineAnnealingLR(optimizer, 30)",
        "range(3000)": "range(30)",
    },
    "plane": {"CosineAnnealingLR(optimizer, 2500)": "CosineAnnealingLR(optimizer, 25)", "range(2500)": "range(25)"},
    "sampler": {"steps=1000": "steps=200", "torch.arange(1000)": "torch.arange(100)"},
}
"""Texts of notebooks that decide how long they take, and what stands there in the short form."""
LEARNS = {"guidance", "likelihood", "plane"}
"""Those that ask whether what they have learned is right, for which the short form learns too little."""
SLOW, ON_RAY = [pytest.mark.slow], [pytest.mark.slow, pytest.mark.integration]
RUNS = [pytest.param(path, id=path.stem, marks=ON_RAY if path.stem in SERVERS else SLOW) for path in NOTEBOOKS]


def run(notebook, folder, monkeypatch):
    """Run the cells of a notebook in a folder, and end the stacks that it has started there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(folder))
    try:
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        for record in folder.rglob("stack.json"):  # a cell has failed before the one that ends the stack
            stack.down(record.parent)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", RUNS)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    run(nbformat.read(path, as_version=4), tmp_path, monkeypatch)


@pytest.mark.heavy
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS if path.stem not in SERVERS])
def test_a_notebook_runs_with_fewer_updates_and_samples(name, tmp_path, monkeypatch):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    whole = "".join(cell.source for cell in cells)
    assert {text: whole.count(text) for text in FEWER[name]} == dict.fromkeys(FEWER[name], 1)
    for cell in cells:
        cell.source = with_fewer(cell.source, FEWER[name])
        if name in LEARNS:
            cell.source = without_assertions(cell.source)
    run(notebook, tmp_path, monkeypatch)


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
