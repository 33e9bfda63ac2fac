"""The notebook of the first five minutes: kept without outputs, and it runs."""

import nbformat
import pytest
from nbclient import NotebookClient

from foley.core.config import PROJECT_ROOT

NOTEBOOK = PROJECT_ROOT / "notebooks" / "first_steps.ipynb"


def test_notebook_is_kept_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.docs
@pytest.mark.timeout(600)
def test_notebook_runs() -> None:
    """In a kernel of its own; few steps are enough for that."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_steps=25", "num_steps=2")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
