"""The stage runner, and the configs of `make train-demo` and `make results`: what runs, what is kept and left out."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from foley.core.config import PROJECT_ROOT
from foley.core.files import write_json
from foley.reporting.pages import write_page

STAGES = [f"denoiser stage={stage}" for stage in ("pretrain", "align", "finetune")]
EXPERIMENTS = ["vae", *STAGES, "student", "ablation"]


def config(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(PROJECT_ROOT / "scripts/run_stages.py"), run_name="stages")["main"]


@pytest.fixture
def stages(tmp_path):
    """Two stages: the second reads what the first makes, and both count how often they ran."""
    script = tmp_path / "count.py"
    script.write_text("import sys\nwith open(sys.argv[1], 'a') as file: file.write(sys.argv[2])\n")
    first, second = tmp_path / "work/a/first.txt", tmp_path / "work/second.txt"
    first.parent.mkdir(parents=True)
    return OmegaConf.create(
        {
            "only": None,
            "work_dir": str(tmp_path / "work"),
            "keep_dir": str(tmp_path / "kept"),
            "stages": {
                "first": {"command": f"{script} {first} x", "product": str(first), "keep": ["a/*.txt"]},
                "second": {"command": f"{script} {second} y", "inputs": [str(first)], "product": str(second)},
                "unwanted": {"command": "none.py", "when": None, "product": "none"},
                "impossible": {"command": "none.py", "needs": [str(tmp_path / "none")], "product": "none"},
            },
            "then": [f"{script} {tmp_path}/then.txt z"],
        }
    )


def counts(tmp_path: Path) -> list[int]:
    return [len((tmp_path / name).read_text()) for name in ("work/a/first.txt", "work/second.txt", "then.txt")]


def test_a_stage_runs_once_its_product_is_kept_and_its_command_noted(main, stages, tmp_path):
    for _ in range(2):
        main.__wrapped__(stages)
    assert counts(tmp_path) == [1, 1, 2]
    assert (tmp_path / "kept/a/first.txt").read_text() == "x"
    note = json.loads((tmp_path / "kept/stages/second.json").read_text())
    assert note["command"].startswith("python ")
    assert note["seconds"] >= 0
    assert not (tmp_path / "kept/stages/unwanted.json").exists()


def test_stages_can_be_chosen_by_name(main, stages, tmp_path):
    stages.only = ["first"]
    main.__wrapped__(stages)
    assert (tmp_path / "work/a/first.txt").read_text() == "x"
    assert not (tmp_path / "work/second.txt").exists()


def test_a_stage_runs_again_with_another_command_or_another_input(main, stages, tmp_path):
    main.__wrapped__(stages)
    stages.stages.second.command += "y"
    main.__wrapped__(stages)
    assert counts(tmp_path)[:2] == [1, 3]
    (tmp_path / "work/a/first.txt").write_text("other")
    main.__wrapped__(stages)
    assert counts(tmp_path)[:2] == [5, 5]


def test_the_folder_of_another_way_is_removed_but_not_that_of_an_interruption(main, stages, tmp_path):
    left = tmp_path / "work/a/left.txt"
    stages.only, stages.stages.first.fresh = ["first"], str(left.parent)

    def fail() -> None:  # without its folder
        with pytest.raises(SystemExit, match="status 1"):
            main.__wrapped__(stages)
        assert not left.parent.exists()

    left.write_text("of another way")
    fail()
    left.parent.mkdir()
    left.write_text("by the interrupted run")
    main.__wrapped__(stages)
    assert left.exists()
    stages.stages.first.command += "y"
    fail()


def test_a_stage_that_fails_or_lacks_its_input_ends_the_run(main, stages, tmp_path):
    stages.stages.first.command = "none.py"
    with pytest.raises(SystemExit, match="stage 'first' failed with status 2"):
        main.__wrapped__(stages)
    del stages.stages["first"]
    with pytest.raises(SystemExit, match=r"first.txt: no such file, but an input"):
        main.__wrapped__(stages)


CONFIGS = {"": "", "scripts": "script/", "scripts/bench": "bench/"}


def compose_first_job(script: Path, arguments: list[str]) -> None:
    """Compose a script's config, of a sweep the first job; hydra's own settings are not for composing."""
    name = CONFIGS["" if script.parent == Path() else script.parent.as_posix()] + script.stem
    jobs = "-m" in arguments
    overrides = [argument for argument in arguments if argument != "-m" and not argument.startswith("hydra.")]
    sweeps = [o for o in overrides if jobs and "," in o and not set("[{") & set(o)]
    firsts = [o.split(",")[0] if o in sweeps else o for o in overrides]
    config(name, *(["name=test"] if name == "train" else []), *firsts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [("train_demo", []), ("results", []), ("results", ["effort=quick", "dac_weights=w.pth"])],
)
def test_every_stage_names_a_command_of_the_repository(name, overrides):
    cfg = config(f"script/{name}", *overrides)
    commands = [stage.command for stage in cfg.stages.values()]
    for command in [*commands, *cfg.then]:
        script, *arguments = shlex.split(command)
        assert (PROJECT_ROOT / script).is_file(), command
        compose_first_job(Path(script), arguments)
    assert all(stage.product for stage in cfg.stages.values())


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiments_of_the_demo_compose(experiment):
    latents = [] if experiment == "vae" else ["data.cache_dir=latents"]
    cfg = config("train", "name=test", *f"experiment=demo/{experiment}".split(), *latents)
    assert cfg.trainer.max_time is None
    assert cfg.trainer.max_steps > 0


def test_alignment_may_start_from_pre_training():
    assert "ckpt=" not in config("script/train_demo").stages.align.command
    assert "pretrain/checkpoints/last.ckpt" in config("script/train_demo", "start=pretrained").stages.align.command


def test_the_page_stands_before_anything_is_measured_and_fills_up(tmp_path):
    template = PROJECT_ROOT / "docs/results/templates/demo-model.md"
    write_page(template, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().count("Not measured yet.") > 5
    accuracy = {"accuracy": 0.5, "n": 2, "choices": 25, "per_class": {"rain": [0.5, 2]}}
    generated = {"scores": {"frechet_distance": {"value": 9.0}}, "accuracy": {"all": accuracy, "effects": accuracy}}
    real = {"splits": ["test"], "labels": {"rain": 13}, "accuracy": {"effects": accuracy, "fsdd": accuracy}}
    for name, results in {
        "effects/evaluation.json": {"embedded": generated},
        "recordings/recordings.json": {**real, "provenance": {"date": "today"}},
    }.items():
        write_json(tmp_path / "page" / name, results)
    write_page(template, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| real effect labels | 2 | 50.0% | 50.0% |" in page
    assert "| rain | 13 | 50% | 2 | 50% | 2 |" in page
