"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest

from foley.core.config import PROJECT_ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden tensors and real audio; tests that need it are skipped in a clone that has none."""
    path = Path(os.environ.get("FOLEY_SHARED", PROJECT_ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set FOLEY_SHARED")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is marked `gpu` where there is none, and no FOLEY_TEST_DEVICE stands for it."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or "FOLEY_TEST_DEVICE" in os.environ:
        return
    import torch  # which most selections of tests load anyway

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA here; FOLEY_TEST_DEVICE=cpu tries it on the CPU"))
