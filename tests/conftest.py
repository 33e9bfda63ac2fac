"""Fixtures that every test may use."""

import os
import shutil
from pathlib import Path

import pytest

from foley.core.config import PROJECT_ROOT

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden tensors and real audio; tests that need it are skipped in a clone that has none."""
    path = Path(os.environ.get("FOLEY_SHARED", PROJECT_ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set FOLEY_SHARED")
    return path


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window. `pip install foley[browser]` and a browser (Debian: `apt-get install chromium`)."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'foley[browser]'")
    path = os.environ.get("FOLEY_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)}, or set FOLEY_BROWSER to its path")
    with playwright.sync_playwright() as driver:
        # As root, which containers often are, Chromium refuses its sandbox.
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--mute-audio"]
        chromium = driver.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is marked `gpu` where there is none, and no FOLEY_TEST_DEVICE stands for it."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or "FOLEY_TEST_DEVICE" in os.environ:
        return
    import torch  # which most selections of tests load anyway

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA here; FOLEY_TEST_DEVICE=cpu tries it on the CPU"))
