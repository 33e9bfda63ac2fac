"""`foley gpu-check`: stages within their time, one failure not ending the others, what passed kept, and its configs."""

import json
import runpy
import shlex
import time
from pathlib import Path

import pytest
import torch
from commands import compose_command
from omegaconf import DictConfig, OmegaConf
from test_stages import compose_first_job

from foley.core.config import PROJECT_ROOT
from foley.reporting.pages import write_page

TEMPLATES = PROJECT_ROOT / "docs/results/templates"
CHILD = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {!r}]); time.sleep(60)"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(PROJECT_ROOT / "scripts/gpu_check.py"), run_name="gpu_check")


@pytest.fixture
def check(tmp_path: Path) -> DictConfig:
    """Stages of every fate: each that runs adds a letter to its product."""
    add = tmp_path / "add.py"
    add.write_text("import sys\nwith open(sys.argv[1], 'a') as file: file.write('x')\nsys.exit(int(sys.argv[2]))\n")
    late = tmp_path / "late.txt"
    grandchild = f"import time; time.sleep(3); open({str(late)!r}, 'w')"
    slow = tmp_path / "slow.py"
    slow.write_text(CHILD.format(grandchild))

    def stage(name: str, script: Path = add, status: int = 0, limit: float = 30, **more) -> dict:
        product = str(tmp_path / f"{name}.txt")
        return {"command": f"{script} {product} {status}", "product": product, "limit_seconds": limit, **more}

    stages = {
        "failing": stage("failing", status=3, proves=True),
        "slow": stage("slow", slow, limit=1),
        "lacking": stage("lacking", packages=["no_such_package"], proves=True),
        "good": stage("good", proves=True),
        "of_the_failing": stage("of_the_failing", inputs=[str(tmp_path / "absent.txt")]),
    }
    folders = {"work_dir": str(tmp_path / "work"), "results_dir": str(tmp_path / "results")}
    sizes = {"budget_seconds": 100, "patience": 1, "code": ["tests/gpu"], "environment": {"FOLEY_TEST": "1"}}
    pages = {"pages": ["gpu"], "templates_dir": str(TEMPLATES)}
    return OmegaConf.create({"device": "cpu", "only": None, "stages": stages, **folders, **sizes, **pages})


def outcomes(cfg: DictConfig) -> dict[str, str]:
    rows = json.loads((Path(cfg.results_dir) / "gpu/stages.json").read_text())["stages"]
    return {row["name"]: row["status"] for row in rows}


def run(script, cfg: DictConfig) -> str:
    """What the command ends with."""
    with pytest.raises(SystemExit) as ended:
        script["main"].__wrapped__(cfg)
    return str(ended.value)


def test_a_stage_that_fails_does_not_end_the_others(script, check, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run(script, check) == "not proved: failing, lacking"
    fates = {"failing": "failed", "slow": "timed out", "lacking": "left out", "good": "passed"}
    assert outcomes(check) == {**fates, "of_the_failing": "left out"}
    assert "it needs no_such_package: pip install no_such_package" in caplog.text
    assert "| good | passed |" in caplog.text
    assert (tmp_path / "results/gpu.md").is_file()


def test_what_a_stage_started_ends_with_its_time(script, check, tmp_path):
    check.only = ["slow"]
    script["main"].__wrapped__(check)  # it proves nothing
    time.sleep(3)
    assert not (tmp_path / "late.txt").exists()


def test_what_passed_is_kept_until_its_command_or_the_code_changes(script, check, tmp_path, monkeypatch):
    check.only = ["good", "failing"]
    for _ in range(2):
        run(script, check)
    assert outcomes(check) == {"good": "kept", "failing": "failed"}
    assert [len((tmp_path / f"{name}.txt").read_text()) for name in check.only] == [1, 2]
    check.code = ["tests/scripts"]
    run(script, check)
    assert outcomes(check)["good"] == "passed"


def test_what_finds_no_time_waits_for_the_next_call(script, check, tmp_path):
    check.only, check.budget_seconds = ["good"], 0
    assert run(script, check) == "not proved: good"
    assert outcomes(check) == {"good": "left out"}
    check.budget_seconds = 100
    script["main"].__wrapped__(check)
    assert outcomes(check) == {"good": "passed"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_how_to_try(script, check):
    check.device = "cuda"
    with pytest.raises(ValueError, match="size=quick device=cpu tries every stage on the CPU"):
        script["main"].__wrapped__(check)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["size=full"], ["size=quick", "device=cpu"]])
def test_every_stage_names_a_command_and_has_a_limit(overrides):
    cfg = compose_command("script/gpu_check", *overrides)
    for stage in cfg.stages.values():
        script, *arguments = shlex.split(stage.command)
        if script == "-m":
            assert arguments[0] == "pytest"
            assert (PROJECT_ROOT / arguments[1]).is_file()
        else:
            compose_first_job(Path(script), arguments)
        assert stage.limit_seconds > 0
        assert stage.product
    assert all((TEMPLATES / f"{page}.md").is_file() for page in cfg.pages)
    assert compose_command("script/gpu_check").budget_seconds <= 540


def test_every_proof_is_among_the_stages():
    commands = " ".join(stage.command for stage in compose_command("script/gpu_check").stages.values())
    assert all(f"tests/gpu/{file.name}" in commands for file in (PROJECT_ROOT / "tests/gpu").glob("test_*.py"))


@pytest.mark.parametrize("page", ["gpu", "denoiser", "distillation", "acceleration"])
def test_the_pages_stand_before_anything_is_measured(page, tmp_path):
    write_page(TEMPLATES / f"{page}.md", tmp_path / f"{page}.md")
    assert "ot measured" in (tmp_path / f"{page}.md").read_text()
