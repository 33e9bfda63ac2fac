"""The stage runner, and the configs of `make train-demo` and `make results`: what runs, what is kept and left out."""

import json
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from foley.cli.stages import command_line
from foley.core.config import PROJECT_ROOT
from foley.core.files import write_json
from foley.core.parcels import take_up
from foley.reporting.pages import write_page
from foley.system.checkpoint import read_training_checkpoint

STAGES = [f"denoiser stage={stage}" for stage in ("pretrain", "align", "finetune")]
EXPERIMENTS = ["vae", *STAGES, "student", "denoiser_long", "ablation"]


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"only": ["secnd"]}, "only must be one of first, second, unwanted, impossible, got 'secnd'"),
        ({"only": "second"}, r"only=second: give a list, only=\[second\]"),
        ({"minutes": float("nan")}, "minutes=nan: give a number >= 0"),
        ({"minutes": "abc"}, "minutes=abc: give a number >= 0"),
        ({"reserve_seconds": -1}, "reserve_seconds=-1: give a number >= 0"),
        ({"max_file_megabytes": 0, "packed_dir": "packed"}, "max_file_megabytes=0: give a number > 0"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(main, stages, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        main(OmegaConf.merge(stages, options))
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


@pytest.fixture
def sliced(stages, tmp_path):
    """The first stage needs three calls for its product, each of which goes on with what the one before has packed."""
    script = tmp_path / "slice.py"
    script.write_text(SLICE)
    first, stages.work_dir = stages.stages.first, "${keep_dir}"
    first.command, first.fresh, first.keep = f"{script} {first.product}", str(Path(first.product).parent), []
    stages.keep_dir = str(tmp_path / "work")
    stages.minutes, stages.packed_dir, stages.max_file_megabytes = 10, str(tmp_path / "packed"), 1
    stages.earlier_dir = stages.packed_dir
    return stages


SLICE = """
import pathlib, sys, time
time.sleep(0.11)  # notes round seconds to a tenth
product = pathlib.Path(sys.argv[1])
product.parent.mkdir(parents=True, exist_ok=True)
product.write_text(product.read_text() + 'x' if product.exists() else 'x')
sys.exit(0 if product.read_text() == 'xxx' else 75)
"""


def test_a_stage_goes_on_in_another_place_until_it_is_done(main, sliced, tmp_path, caplog):
    """Each call finds what the one before has packed, and nothing else."""
    caplog.set_level("INFO")
    for expected in ("x", "xx", "xxx"):
        shutil.rmtree(tmp_path / "work")
        main.__wrapped__(sliced)
        assert (tmp_path / "work/a/first.txt").read_text() == expected
        assert (tmp_path / "work/second.txt").exists() == (expected == "xxx")
        assert (tmp_path / "then.txt").exists() == (expected == "xxx")
    assert caplog.text.count("first: not done, but the time is over; the same command goes on with it") == 2
    seconds = [
        json.loads((tmp_path / f"work/{name}.json").read_text())["seconds"] for name in ("a.begun", "stages/first")
    ]
    assert 0 < seconds[0] < seconds[1]
    shutil.rmtree(tmp_path / "work")
    main.__wrapped__(sliced)
    assert counts(tmp_path) == [3, 1, 2]  # done before, but for what comes at the end


def test_what_a_slice_leaves_may_be_lean(main, sliced, tmp_path):
    product = tmp_path / "work/a/first.txt"
    weights = {"weight": torch.ones(3)}
    torch.save({"foley": {}, "state_dict": weights, "current_weights": weights}, tmp_path / "whole.ckpt")
    script = f"import shutil; shutil.copy({str(tmp_path / 'whole.ckpt')!r}, {str(product)!r}); raise SystemExit(75)"
    (tmp_path / "slice.py").write_text(script)
    sliced.stages.first.fresh, sliced.stages.first.lean = str(tmp_path / "other"), True
    main.__wrapped__(sliced)
    left = read_training_checkpoint(product)
    assert left.keys() == {"foley", "state_dict"}
    assert left["state_dict"]["weight"].dtype == torch.float16


def test_without_time_what_was_packed_is_unpacked_and_nothing_runs(main, sliced, tmp_path):
    main.__wrapped__(sliced)
    shutil.rmtree(tmp_path / "work")
    sliced.minutes = 0
    main.__wrapped__(sliced)
    assert (tmp_path / "work/a/first.txt").read_text() == "x"


def test_a_stage_that_outlasts_the_time_is_ended_and_tried_again(main, stages, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "sleep.py").write_text("import time; time.sleep(60)")
    stages.minutes, stages.stages.first.command = 0.02, f"{tmp_path}/sleep.py"
    main.__wrapped__(stages)
    assert "first: not done" in caplog.text
    assert not (tmp_path / "kept/stages").exists()


def test_what_failed_is_packed_too(main, sliced, tmp_path):
    main.__wrapped__(sliced)
    sliced.stages.first.command += " --"
    (tmp_path / "slice.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="status 3"):
        main.__wrapped__(sliced)
    shutil.rmtree(tmp_path / "work")
    take_up(tmp_path / "packed", tmp_path / "work")
    assert (tmp_path / "work/a.begun.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["overwrite=true"]),
        ({"goes_on": True}, ["ckpt_path=auto"]),
        ({"goes_on": True, "slice_minutes": 7.12}, ["ckpt_path=auto", "slice_minutes=7.12"]),
    ],
)
def test_a_training_begins_anew_or_goes_on_for_a_time(options, words):
    assert command_line("train.py experiment=tiny", **options)[2:] == ["experiment=tiny", *words]
    encoding = command_line("scripts/encode_latents.py data=demo", **options)[2:]
    assert encoding == ["data=demo", *(word for word in words if word == "overwrite=true")]


def test_a_note_holds_whatever_spaces_its_command_was_written_with(main, stages, tmp_path):
    main.__wrapped__(stages)
    stages.stages.second.command = stages.stages.second.command.replace(" ", "   ")
    main.__wrapped__(stages)
    assert counts(tmp_path)[:2] == [1, 1]


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
    [
        ("train_demo", []),
        ("train_demo", ["effort=gpu"]),
        ("train_demo", ["effort=quick", "device=cuda", "start=pretrained"]),
        ("results", []),
        ("results", ["effort=quick", "dac_weights=w.pth"]),
    ],
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


def test_what_a_recipe_is_stands_in_one_place():
    cfg = config("script/train_demo", "recipes={codec: c, decoder: e, denoiser: d, student: s}")
    commands = " ".join(stage.command for stage in cfg.stages.values())
    assert "experiment=" not in commands
    assert commands.count("train.py c ") == commands.count("train.py e ") == commands.count("train.py s ") == 1
    assert commands.count("train.py d stage=") == 3


@pytest.mark.slow
def test_a_codec_trained_in_slices_on_fresh_machines_is_the_codec_trained_at_once(tmp_path):
    """By the clock: however many slices there are, the run is one."""
    options = [
        "effort=quick",
        "only=[codec]",
        "more=trainer.max_steps=40 codec.width=32",
        "then=[]",
        "reserve_seconds=30",
    ]
    command = [sys.executable, "scripts/run_stages.py", "--config-name=train_demo", *options]

    def call(name: str, minutes: float) -> Path:
        folders = [f"work_dir={tmp_path}/{name}", f"packed_dir={tmp_path}/{name}_packed"]
        folders.append(f"earlier_dir={tmp_path}/{name}_packed")
        subprocess.run([*command, *folders, f"minutes={minutes}"], cwd=PROJECT_ROOT, check=True, timeout=300)
        return tmp_path / name / "codec/checkpoints/last.ckpt"

    whole, steps = read_training_checkpoint(call("whole", 9)), [0]
    while steps[-1] < 40:
        shutil.rmtree(tmp_path / "sliced", ignore_errors=True)
        sliced = read_training_checkpoint(call("sliced", 0.55))
        steps.append(sliced["global_step"])
        assert steps[-1] > steps[-2]
    for key in ("state_dict", "current_weights"):
        assert all(torch.equal(sliced[key][name], value) for name, value in whole[key].items())


def test_alignment_may_start_from_pre_training():
    assert "ckpt=" not in config("script/train_demo").stages.align.command
    assert "pretrain/checkpoints/last.ckpt" in config("script/train_demo", "start=pretrained").stages.align.command


def test_the_page_stands_before_anything_is_measured_and_fills_up(tmp_path):
    template = PROJECT_ROOT / "docs/results/templates/demo-model.md"
    write_page(template, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text().count("Not measured yet.") > 5
    accuracy = {"accuracy": 0.5, "n": 2, "choices": 25, "per_class": {"rain": [0.5, 2]}}
    distance = {"value": 9.0, "low": 8.0, "high": 10.0, "n": "47 / 2"}
    generated = {"scores": {"frechet_distance": distance}, "accuracy": {"all": accuracy, "effects": accuracy}}
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
