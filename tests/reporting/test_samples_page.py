"""The page of a folder, as a browser shows it from the disk."""

import pytest
import torch

from foley.core.files import write_text
from foley.reporting.plots import draw_spectrogram
from foley.reporting.samples import Card, count_sounds, render_page

CLIPS = 300
LOADED = "[...document.images].filter(image => image.complete && image.naturalWidth > 0).length"
GROUND = "getComputedStyle(document.body).backgroundColor"


@pytest.fixture
def address(tmp_path):
    draw_spectrogram(tmp_path / "clip.png", torch.rand(24000) - 0.5, 24000)
    # A query makes them files of their own to the browser.
    cards = [Card(f"clip {n}", "clip.wav", f"clip.png?{n}", "clip.json", "1.00 s", "M0,0L1,1Z") for n in range(CLIPS)]
    write_text(tmp_path / "index.html", render_page(count_sounds(CLIPS), {"model_hash": "ab" * 32}, cards))
    return (tmp_path / "index.html").as_uri()


def test_clips_load_as_they_are_scrolled_to(browser, address):
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto(address, wait_until="load")
    assert 0 < page.evaluate(LOADED) < CLIPS / 2
    page.click("nav a:last-child")
    page.wait_for_function("document.images[299].complete && document.images[299].naturalWidth > 0")
    assert page.evaluate(LOADED) < CLIPS
    page.close()


def test_the_scheme_is_the_systems_until_it_is_switched(browser, address):
    grounds = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(address)
        before = page.evaluate(GROUND)
        page.click("header button")
        grounds.append((before, page.evaluate(GROUND)))
        page.click("header button")
        assert page.evaluate(GROUND) == before
        page.close()
    assert grounds[0] == grounds[1][::-1]
    assert grounds[0][0] != grounds[0][1]


def test_the_whole_hash_is_copied(browser, address):
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(address)
    page.click("dd button")
    page.wait_for_selector("text=copied")
    assert page.evaluate("navigator.clipboard.readText()") == "ab" * 32
    context.close()
