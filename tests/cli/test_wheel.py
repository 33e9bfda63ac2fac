"""The wheel, installed where there is no checkout: `foley sample`, help, and Python work offline with what ships."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from foley.core.config import PROJECT_ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # it starts Python six times, and builds 30 MB

# Ends the process where it opens a file of the checkout; the environment that lends its packages may lie in there.
_NO_CHECKOUT = """\
import sys

def refuse(event, arguments):
    path = str(arguments[0]) if event == "open" else ""
    if path.startswith({checkout!r}) and not path.startswith({lender!r}):
        raise RuntimeError(f"the installed package reads the checkout: {{path}}")

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(PROJECT_ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("foley-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel alone; what it depends on is taken from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin/python")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    guard = _NO_CHECKOUT.format(checkout=f"{PROJECT_ROOT}{os.sep}", lender=f"{sys.prefix}{os.sep}")
    (packages / "sitecustomize.py").write_text(guard)
    return folder


def run(installed: Path, folder: Path, *command: str) -> str:
    """Run a command of the environment in an empty folder, offline; returns what it says."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "FOLEY_SHARED")}
    environment = {**clean, "HF_HUB_OFFLINE": "1", "PATH": f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    line = [str(installed / "bin" / command[0]), *command[1:]]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_a_user_needs_and_stays_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("train.py", "configs/sample.yaml", "scripts/bench/caching.py", "data/demo/student/system.json"):
        assert f"foley/shipped/{name}" in names
    assert not [name for name in names if name.endswith((".pyc", ".wav", ".flac", ".png"))]
    assert wheel.stat().st_size < 32 * 2**20


def test_a_sound_is_made_from_the_command_line(installed, tmp_path):
    run(installed, tmp_path, "foley", "sample", "prompt=a dog barks, twice", "steps=2", "duration_seconds=0.5")
    assert len(list(tmp_path.glob("outputs/samples/*/*.wav"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_sound_is_made_and_scored_from_python(installed, tmp_path):
    code = (
        "from foley import TextToAudio\n"
        "TextToAudio.load().generate(['rain', 'a bell'], 0.5, num_steps=2).write('clips')\n"
    )
    run(installed, tmp_path, "python", "-c", code)
    run(
        installed, tmp_path, "foley", "evaluate", "samples=clips", "reference=clips", "resamples=0", "output_dir=scores"
    )
    assert (tmp_path / "scores/evaluation.json").is_file()


def test_help_and_completion_work_there(installed, tmp_path):
    assert "  sample " in run(installed, tmp_path, "foley")
    assert "Options (key=value):" in run(installed, tmp_path, "foley", "prepare", "--help")
    assert "calibrate" in run(installed, tmp_path, "foley", "--complete", "cal")
    assert list(tmp_path.iterdir()) == []
