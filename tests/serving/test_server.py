"""The server as a process has it: options, a real socket, and what a signal does."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import uvicorn
from commands import compose_command, load_command, run_command
from gated_generators import PATIENCE_SECONDS, Held
from small_system import STEPS

from foley.accel import PredictionReuse
from foley.accel.combined import NoAcceleration
from foley.cli import serving
from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT, shipped
from foley.serving.app import LOCAL_HOSTS, create_app
from foley.serving.engine import Engine
from foley.serving.jobs import DEFAULT_ACCELERATOR, KeptJobs
from foley.serving.server import DrainingServer
from foley.serving.service import Limits, Service

BODY = {"prompt": "a dog barks", "seed": 7, "steps": STEPS["num_steps"], "duration_seconds": STEPS["duration_seconds"]}


def ask(url, body=None, method=None):
    """Status and content of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def wait_until(condition):
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def test_on_a_socket_a_lost_client_frees_its_place_and_sigterm_drains(start, generator):
    held = Held(at=1)
    engine = start(generator, {DEFAULT_ACCELERATOR: NoAcceleration(), "held": held})
    service = Service(engine, Limits(8, 200, 1 << 20, 120.0), KeptJobs(10, 1 << 20, 60.0))
    config = uvicorn.Config(create_app(service), host="127.0.0.1", port=free_port(), log_config=None)
    server = DrainingServer(config, service, drain_seconds=PATIENCE_SECONDS)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{config.port}"
        job = json.loads(ask(f"{url}/v1/jobs", {**BODY, "accelerator": "held"})[1])
        assert held.reached.wait(PATIENCE_SECONDS)
        content = json.dumps(BODY).encode()
        with socket.create_connection(("127.0.0.1", config.port)) as lost:
            head = f"POST /v1/audio/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
            lost.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            wait_until(lambda: engine.num_waiting == 1)
        wait_until(lambda: engine.num_waiting == 0)  # its connection is closed
        server.handle_exit(signal.SIGTERM, None)
        assert ask(f"{url}/v1/jobs", BODY)[0] == 503
        assert ask(f"{url}/healthz")[0] == 503
        held.gate.set()
        wait_until(lambda: engine.is_idle)
        assert thread.is_alive()  # the job's sound has not been fetched
        status, wav = ask(f"{url}/v1/jobs/{job['id']}/clips/0")
        assert (status, wav[:4]) == (200, b"RIFF")
        thread.join(PATIENCE_SECONDS)
    finally:
        held.gate.set()
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert not engine.is_alive


@pytest.fixture(scope="module")
def composed():
    return compose_command("script/serve")


def changed(composed, **options):
    cfg = composed.copy()
    cfg.merge_with(options)
    return cfg


def test_the_options_say_what_is_served(composed):
    demo, student = str(shipped("demo")), str(shipped("demo") / "student")
    assert serving.chosen_systems(composed) == {"demo": demo, "demo-student": student}
    cfg = changed(composed, student=False)
    cfg.models = {"quick": student}
    assert serving.chosen_systems(cfg) == {"demo": demo, "quick": student}
    cfg.models = {"demo": student}
    with pytest.raises(ValueError, match="models: demo is the name of system= already"):
        serving.chosen_systems(cfg)
    with pytest.raises(CheckpointError, match="holds no student"):
        serving.chosen_systems(changed(composed, system=student, student=True))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("port", 70_000, "port=70000: give a whole number"),
        ("queue_size", 0, "queue_size=0: give"),
        ("timeout_seconds", 0, "timeout_seconds=0: give a number > 0"),
        ("device", "cuda:7", "device=cuda:7: there is none here"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_loaded(composed, option, value, message):
    with pytest.raises(ValueError, match=message):
        serving.open_service(changed(composed, **{option: value}))


def test_an_engine_without_a_recipe_is_as_the_recipe_says(composed):
    own = {name: value.default for name, value in inspect.signature(Engine).parameters.items()}
    names = "queue_size", "batch_size", "batch_wait_seconds", "timeout_seconds"
    assert {name: own[name] for name in names} == {name: composed[name] for name in names}


def test_only_the_machine_itself_is_answered_unless_told(composed, monkeypatch, caplog):
    monkeypatch.delenv(serving.KEY_VARIABLE, raising=False)
    own = serving.chosen_access(composed)
    assert (own.api_key, own.hosts, own.origins) == (None, LOCAL_HOSTS, ())
    assert caplog.text == ""
    assert serving.chosen_access(changed(composed, host="0.0.0.0")).hosts == ("*",)
    assert "whoever reaches this machine may generate; set FOLEY_API_KEY" in caplog.text
    monkeypatch.setenv(serving.KEY_VARIABLE, "s3cret")
    assert serving.chosen_access(composed).api_key == "s3cret"


def test_a_system_is_opened_with_the_options_of_sampling(composed):
    cfg = changed(composed, system=str(shipped("demo") / "student"), steps=1, max_num=2)
    cfg.accel = composed.accelerators.prediction
    service = serving.open_service(cfg)
    try:
        served = service.engine.models["student"]
        assert served.defaults.num_steps == 1
        (model,) = service.models()
        assert (model.is_student, model.max_num) == (True, 2)
        assert model.accelerators == [DEFAULT_ACCELERATOR, "none", "prediction", "fora", "local_global"]
        assert isinstance(served.accelerators[DEFAULT_ACCELERATOR], PredictionReuse)
    finally:
        service.engine.close()


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_that_wait_leave_their_cores_to_others(composed, monkeypatch, given, found):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")  # which is put back after the test
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(serving, "serve", lambda cfg: seen.append(os.environ["OMP_WAIT_POLICY"]))
    seen = []
    load_command("script/serve")["main"](composed)
    assert seen == [found]


@pytest.mark.slow
def test_a_served_wav_is_that_of_sample_and_sigterm_ends_the_process(tmp_path, monkeypatch):
    system, port = shipped("demo") / "student", free_port()
    monkeypatch.chdir(tmp_path)
    words = ["serve.py", f"system={system}", f"port={port}", f"hydra.run.dir={tmp_path / 'log'}"]
    script = [sys.executable, str(PROJECT_ROOT / "scripts" / words[0]), *words[1:]]
    process = subprocess.Popen(script, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            try:
                assert ask(f"{url}/healthz")[0] == 200
                break
            except urllib.error.URLError:
                assert time.monotonic() < until
                assert process.poll() is None
                time.sleep(0.5)
        status, wav = ask(f"{url}/v1/audio/generate", {"prompt": "a dog barks", "seed": 3})
        assert status == 200
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "nothing waits or runs any more" in said
    run_command("sample", f"system={system}", "prompt=a dog barks", "seed=3", f"output_dir={tmp_path / 'own'}")
    (own,) = (tmp_path / "own").glob("*.wav")
    assert own.read_bytes() == wav
