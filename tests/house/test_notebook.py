"""docs/tutorial.ipynb runs from top to bottom, and its text says what happens."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from places import ROOT

FILE = ROOT / "docs" / "tutorial.ipynb"
LINES_WANTED = 10
"""Lines that a cell of one's own may take."""


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(FILE, as_version=4)


def run(notebook: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, updates: int | None) -> str:
    """What its cells print, in a folder of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if updates is not None:
        monkeypatch.setenv("NVAE_TUTORIAL_STEPS", str(updates))
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_the_tutorial_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(notebook, tmp_path, monkeypatch, updates=3)
    assert "Warning" not in printed and "group 2: 4 × 4 × 4" in printed
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {"tutorial", "tutorial_narrow"}
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 2


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_tutorial_runs_at_its_full_length(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(notebook, tmp_path, monkeypatch, updates=None)
    bounds = [float(line.split()[2]) for line in printed.splitlines() if line.startswith(("paper's", "narrow"))]
    assert len(bounds) == 2 and max(bounds) < 30  # nats; 44.4 by tossing coins


def test_the_cell_of_ones_own_is_short(notebook: Any) -> None:
    (source,) = (cell.source for cell in notebook.cells if "ARCHITECTURES[" in cell.source)
    assert len([line for line in source.splitlines() if line]) <= LINES_WANTED
