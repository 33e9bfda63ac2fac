"""A browser, for the pages that are used in one."""

import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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
