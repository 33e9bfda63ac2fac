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
