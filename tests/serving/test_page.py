"""The page: who may open it, what it gives away, and, in a browser, that sounds are made on it."""

import base64
import io
import sys
import threading
import time
from importlib.util import find_spec

import pytest
import soundfile
from commands import compose_command
from fastapi.testclient import TestClient

from foley.cli import serving
from foley.core.config import shipped
from foley.serving.app import Access, create_app
from foley.serving.engine import Engine, Served
from foley.serving.jobs import KeptJobs
from foley.serving.service import Limits, Service

# Not imported here: that takes seconds, of each run that collects this file.
pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason="pip install 'foley[page]'")

ELSEWHERE = {"Origin": "https://elsewhere.example"}


@pytest.fixture(scope="module")
def mount():
    from foley.serving.page import mount_page

    return mount_page


@pytest.fixture(scope="module")
def client(generator, mount):
    access = Access(api_key="s3cret", hosts=("testserver",))
    service = Service(
        Engine([{"tiny": Served(generator)}]),
        Limits(8, 200, max_upload_bytes=20_000, max_upload_seconds=120.0),
        KeptJobs(10, 1 << 20, 60.0),
    )
    app = create_app(service, access)
    mount(app, service, access, 1 << 20)
    yield TestClient(app)
    service.engine.close()


def basic(key):
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{key}".encode()).decode()}


def test_the_page_has_the_rules_of_the_api(client):
    key = {"X-API-Key": "s3cret"}
    assert client.get("/", follow_redirects=False).headers["location"] == "/page/"
    refused = client.get("/page/")
    assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
    for wrong in (basic("other"), {"Authorization": "Basic ???"}, {"Authorization": "Bearer other"}):
        assert client.get("/page/config", headers=wrong).status_code == 401
    for right in (basic("s3cret"), {"Authorization": "Bearer s3cret"}, key):
        assert client.get("/page/config", headers=right).status_code == 200
    assert client.get("/page/config", headers=key | ELSEWHERE).status_code == 403
    assert client.get("/page/config", headers=key | {"Host": "elsewhere.example"}).status_code == 400
    upload = client.post("/page/gradio_api/upload", files={"files": ("a.wav", bytes(30_000))}, headers=key)
    assert upload.status_code == 413
    assert client.post("/page/gradio_api/queue/join", content=iter([b"{}"]), headers=key).status_code == 411
    assert client.get("/docs").status_code == 200
    assert client.get("/v1/models", headers=key).status_code == 200
    assert client.get("/v1/models", headers=basic("s3cret")).status_code == 401  # as ever


def test_the_page_gives_no_file_and_fetches_nothing(client, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for file in ("/etc/passwd", tmp_path / "secret.txt", "pyproject.toml"):
        assert client.get(f"/page/gradio_api/file={file}", headers=basic("s3cret")).status_code == 403
    for route in ("file=http://example.org/a", "file/http://example.org/a", "proxy=http://example.org/a"):
        assert client.get(f"/page/gradio_api/{route}", headers=basic("s3cret")).status_code == 404
    for path in ("http://example.org/a.wav", "ftp://example.org/a.wav"):
        asked = {
            "data": ["rain", {"path": path, "meta": {"_type": "gradio.FileData"}}],
            "fn_index": 0,
            "session_hash": "x",
        }
        refused = client.post("/page/gradio_api/queue/join", json=asked, headers=basic("s3cret"))
        assert (refused.status_code, refused.text) == (422, "give a recording, not an address")


def test_the_page_takes_nothing_from_a_network_and_tells_nobody(client):
    page = client.get("/page/", headers=basic("s3cret")).text
    for host in ("googleapis", "gstatic", "cdnjs", "jsdelivr", "unpkg"):
        assert host not in page
    config = client.get("/page/config", headers=basic("s3cret")).json()
    assert config["analytics_enabled"] is False
    assert not [call["api_name"] for call in config["dependencies"] if call["api_visibility"] == "public"]


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "foley.serving.page", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"page=true wants gradio: pip install 'foley\[page\]'"):
        serving.page_mounter()


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def address(mount):
    """Of a server with the system that ships, and its student."""
    import uvicorn

    from foley.serving.server import DrainingServer

    cfg = compose_command("script/serve")
    cfg.system = str(shipped("demo"))
    service, access = serving.open_service(cfg), serving.chosen_access(cfg)
    app = create_app(service, access)
    mount(app, service, access, cfg.keep_bytes)
    server = DrainingServer(uvicorn.Config(app, "127.0.0.1", 0, log_config=None), service, 5.0)
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 60
    while not server.started and time.monotonic() < until:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True
    thread.join(30)


def download(page, button):
    """Name and content of what a button gives."""
    with page.expect_download() as given:
        page.click(button)
    return given.value.suggested_filename, given.value.path().read_bytes()


def wait_until(page, button, count):
    """Press a button, and wait until the history has so many sounds."""
    page.click(button)
    page.wait_for_function(f"document.querySelectorAll('#history input').length === {count}", timeout=60_000)
    page.wait_for_selector("#status:has-text('Done')")
    page.wait_for_timeout(500)  # the files follow


@pytest.mark.slow
def test_a_sound_is_made_edited_by_dragging_and_varied(browser, address, tmp_path):
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(30_000)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(address)
    page.wait_for_selector("#generate")
    page.fill("#prompt textarea", "a dog barks")
    page.check("#student input")
    page.wait_for_function("document.querySelector('#negative textarea, #negative input').disabled")
    page.uncheck("#draw input")
    page.fill("#seed input", "7")
    wait_until(page, "#generate", 1)
    page.wait_for_selector("#spectrogram img")
    page.wait_for_selector("#player >> text=0:02")
    name, wav = download(page, "#wav")
    original, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    assert (name, len(original) / rate) == ("foley_7.wav", 2.0)
    assert b'"seed": 7' in download(page, "#json")[1]

    page.click("button[role=tab]:has-text('From a recording')")
    page.click("#take")
    box = page.locator("#wave .wave").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.25 * box["width"], middle)
    page.mouse.down()
    for share in (0.3, 0.4, 0.5):
        page.mouse.move(box["x"] + share * box["width"], middle)
    page.mouse.up()
    page.wait_for_function("Math.abs(document.querySelector('#mask_start_seconds input').value - 0.5) < 0.02")
    start, length = (float(page.input_value(f"#mask_{part}_seconds input")) for part in ("start", "length"))
    assert length == pytest.approx(0.5, abs=0.02)
    page.fill("#prompt textarea", "a siren wails")
    wait_until(page, "#edit", 2)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    edited, _ = soundfile.read(io.BytesIO(download(page, "#wav")[1]), dtype="float32")
    first, last = round(start * rate), round((start + length) * rate)
    assert (edited[:first] == original[:first]).all()
    assert (edited[last:] == original[last:]).all()
    assert (edited[first:last] != original[first:last]).any()

    page.fill("#mask_start_seconds input", "1.5")  # by the keyboard
    page.press("#mask_start_seconds input", "Tab")
    page.wait_for_function("document.querySelector('#wave .span').style.left === '75%'")
    wait_until(page, "#vary", 3)
    varied, _ = soundfile.read(io.BytesIO(download(page, "#wav")[1]), dtype="float32")
    assert len(varied) == len(original)
    assert (varied != original).any()
    page.click("#history label:has-text('a dog barks')")
    page.wait_for_timeout(1000)
    assert download(page, "#wav")[1] == wav

    page.fill("#prompt textarea", "x" * 10_001)
    page.click("#vary")
    page.wait_for_selector("#status:has-text('prompt: String should have at most 10000 characters')")
    assert "Traceback" not in page.inner_text("body")
    assert page.locator("#history input").count() == 3
    page.fill("#prompt textarea", "a siren wails")
    page.click(".toast-close")

    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / "page-phone.png", full_page=True)
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    context.close()
