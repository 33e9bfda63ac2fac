"""`sample.py` as a user runs it."""

import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from commands import compose_command, load_command, run_command
from omegaconf import OmegaConf
from small_system import CONFIGS

from foley.cli.command import renamed
from foley.cli.sampling import chosen_source, open_requested, requested_clips
from foley.core.components import CheckpointError
from foley.core.config import PROJECT_ROOT
from foley.generation.prompts import read_prompts, request_clips
from foley.generation.settings import GenerationSettings
from foley.system.system import build_system, save_system

HOSTILE = 'rain, it\'s "loud" ../../x\n🐕 ${oc.env:HOME} <b>'


def run_sample(*overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROJECT_ROOT / "sample.py"), *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def system_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("system")
    save_system(build_system(CONFIGS), directory)
    return directory


def test_a_prompt_becomes_a_folder_to_listen_to(system_dir, tmp_path):
    out = tmp_path / "out"
    done = run_sample(
        f"prompt={HOSTILE}", "num=2", "seed=7", "steps=3", "duration_seconds=0.3", "guidance_scale=4",
        "solver=dpmpp_2m", f"system={system_dir}", f"output_dir={out}", "device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(out / "index.html") in done.stdout + done.stderr
    sidecars = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(out.glob("*.json"))]
    assert [sidecar["prompt"] for sidecar in sidecars] == [HOSTILE] * 2
    assert [sidecar["seed"] for sidecar in sidecars] == [7, 8]
    settings = sidecars[0]["settings"]
    assert (settings["num_steps"], settings["guidance_scale"], settings["solver"]) == (3, 4, "dpmpp_2m")
    waves = sorted(out.glob("*.wav"))
    assert [soundfile.info(wave).frames for wave in waves] == [600, 600]
    assert (out / "spectrograms.png").is_file()
    assert not (tmp_path.parent / "x").exists()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("in") / "a dog, it's=loud.wav"
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 2000).astype(np.int16)
    soundfile.write(path, samples, 2000, subtype="PCM_16")
    return path


def test_an_edited_file_keeps_every_sample_outside_the_mask(system_dir, recording, tmp_path):
    done = run_sample(
        f"edit={recording}", "mask_start_seconds=0.4", "mask_length_seconds=1", "boundary_seconds=0.2", "prompt=rain",
        "num=2", "steps=3", f"system={system_dir}", f"output_dir={tmp_path}", "device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    clips = [soundfile.read(wave, dtype="int16")[0] for wave in sorted(tmp_path.glob("*.wav"))]
    assert [len(clip) for clip in clips] == [2800, 2800]
    for clip in clips:
        assert np.array_equal(clip[:800], soundfile.read(recording, dtype="int16")[0][:800])
    assert not np.array_equal(*clips)
    settings = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))["settings"]
    assert (settings["edit"]["mask_start_seconds"], settings["edit"]["boundary_seconds"]) == (0.4, 0.2)


@pytest.mark.slow
def test_a_variation_has_the_length_of_its_file(system_dir, recording, tmp_path):
    done = run_sample(
        f"init={recording}", "strength=0.34", "prompt=rain", "negative_prompt=a dog, barking", "steps=3",
        "duration_seconds=3",
        "solver=heun", f"system={system_dir}", f"output_dir={tmp_path}", "device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "duration_seconds has no effect with a recording" in done.stdout + done.stderr
    assert soundfile.info(next(tmp_path.glob("*.wav"))).frames == 2000
    settings = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))["settings"]
    assert (settings["init"]["first_step"], settings["negative_prompt"]) == (2, "a dog, barking")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt=rain", "steps=0"], "whole number >= 1"),
        pytest.param([], "give either prompt", marks=pytest.mark.slow),
    ],
)
def test_impossible_requests_end_with_one_clear_line(system_dir, tmp_path, overrides, message):
    done = run_sample(*overrides, f"system={system_dir}", f"output_dir={tmp_path}", "device=cpu")
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.glob("*.wav"))


def test_without_a_prompt_the_system_that_ships_generates_prompts_of_its_world():
    cfg = compose_command("sample", "seed=3")
    demo = read_prompts(PROJECT_ROOT / "data/prompts/demo.jsonl")
    clips = requested_clips(cfg)
    assert [clip.seed for clip in clips] == [3, 4, 5, 6]
    assert {clip.prompt for clip in clips} <= set(demo)
    cfg.edit = "a.wav"
    with pytest.raises(ValueError, match="give either prompt"):
        requested_clips(cfg)


def test_with_an_accelerator_alone_the_demo_is_made_with_and_without_it(tmp_path):
    run_command("sample", "accel=fora", "steps=2", "duration_seconds=0.2", "device=cpu", f"output_dir={tmp_path}")
    ways = list(json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8")))
    assert ways[:2] == ["no acceleration", "Fora"]
    plain, cached = (sorted(file.name for file in tmp_path.glob(f"{way}/*.wav")) for way in ("no-acceleration", "fora"))
    assert plain == cached
    assert len(plain) == 4


def test_an_accelerator_of_typed_steps_calibrates_by_itself(system_dir, tmp_path):
    given = [f"system={system_dir}", "steps=3", "duration_seconds=0.2", "guidance_scale=2", "accel=audiocache"]
    sample_here(*given, f"output_dir={tmp_path}")
    assert (system_dir / "calibration" / "ddim_3_w2.json").is_file()
    assert len(list(tmp_path.glob("*.wav"))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edit": "a.wav", "init": "b.wav"}, "exclude each other"),
        ({"init": "a.wav", "control": "b.wav"}, r"init=a\.wav and control=b\.wav exclude each other"),
        ({"mask_start_seconds": 1}, "give edit=FILE too"),
        (
            {"edit": "a.wav", "mask_length_seconds": 1},
            r"mask_start_seconds= and mask_length_seconds= \(now null and 1\)",
        ),
        ({"edit": "a.wav"}, r"edit=a\.wav .* mask_start_seconds= and mask_length_seconds= \(now null and null\)"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_anything_is_loaded(options, message):
    defaults = OmegaConf.load(PROJECT_ROOT / "configs" / "sample.yaml")
    with pytest.raises(ValueError, match=message):
        chosen_source(OmegaConf.merge(defaults, options))


@pytest.mark.parametrize("option", ["edit", "init", "control"])
def test_recordings_that_cannot_be_read_are_refused_before_a_model_is_opened(tmp_path, option):
    cfg = compose_command("sample", "device=cpu", f"system={tmp_path / 'no system'}")
    cfg[option] = str(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match=rf"{option}=.*absent\.wav: the file does not exist"):
        open_requested(cfg, GenerationSettings())


def test_both_ways_of_giving_prompts_are_named():
    with pytest.raises(ValueError, match=r"prompt='rain' and prompts=a\.txt are both given"):
        request_clips("rain", "a.txt", 0, 1)


def sample_here(*overrides: str) -> None:
    """`sample.py` in this process, which is faster."""
    run_command("sample", "prompt=rain", "device=cpu", *overrides)


def test_precision_windows_and_extension_reach_the_clip_and_its_record(system_dir, tmp_path):
    ways = {
        "plain": [],
        "half": ["precision=bf16"],
        "windows": ["window_seconds=0.5", "overlap_seconds=0.1"],
        "extended": ["rotary_extension=ntk", "trained_seconds=0.5"],
    }
    settings = {}
    for name, overrides in ways.items():
        sample_here(
            f"system={system_dir}", "steps=2", "duration_seconds=1", f"output_dir={tmp_path / name}", *overrides
        )
        (sidecar,) = (tmp_path / name).glob("*.json")
        settings[name] = json.loads(sidecar.read_text(encoding="utf-8"))["settings"]
        assert soundfile.info(sidecar.with_suffix(".wav")).frames == 2000
    assert (settings["plain"]["precision"], settings["plain"]["compile"]) == ("float32", False)
    assert settings["half"]["precision"] == "bf16"
    assert (settings["windows"]["window_seconds"], settings["windows"]["overlap_seconds"]) == (0.5, 0.1)
    assert (settings["extended"]["rotary_extension"], settings["extended"]["trained_seconds"]) == ("ntk", 0.5)
    assert {"window_seconds", "rotary_extension"}.isdisjoint(settings["plain"])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["edit=a.wav", "mask_start_seconds=0", "mask_length_seconds=1"], ValueError, "only generate"),
        (["init=a.wav"], ValueError, "only generate"),
        (["control=a.wav"], ValueError, "only generate"),
        (["decoder_precision=bf16"], ValueError, "only generate"),
        (["compile=true"], ValueError, "only generate"),
        (["rotary_extension=ntk"], ValueError, "only generate"),
        (["window_seconds=5"], ValueError, "window_seconds: a published pipeline"),
        (["guidance_rescale=0.5"], ValueError, "no rescale"),
        (["solver=heun"], ValueError, "solver=heun: a published pipeline keeps its own"),
        (["accel=smoothcache", "accel.calibrate=never"], FileNotFoundError, "calibrate.py system=audioldm2 hub_dir="),
        (["+system_overrides.published.pipeline=musicgen"], ValueError, "got 'musicgen'"),
        ([], CheckpointError, "must hold model_index.json"),  # what is loaded first
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_before_anything_is_loaded(tmp_path, overrides, error, message):
    places = [f"hub_dir={tmp_path}", f"cache_dir={tmp_path}", f"output_dir={tmp_path / 'out'}"]
    with pytest.raises(Exception, match=message) as caught:
        sample_here("system=audioldm2", *places, *overrides)
    assert isinstance(caught.value, error) or isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize(
    "override", ["seed=abc", "num=1.5", "steps=two", "batch_size=null", "guidance_scale=high", "window_seconds=long"]
)
def test_numbers_that_are_none_are_refused_by_name(tmp_path, override):
    with pytest.raises(ValueError, match=f"{override}: give a (whole )?number"):
        sample_here("prompt=rain", f"system={tmp_path}", f"output_dir={tmp_path}", override)


def test_a_missing_calibration_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"calibrate.py system={tmp_path}/none solver=ddim"):
        sample_here(
            *(f"system={tmp_path}/none", "solver=ddim", "accel=audiocache", "accel.calibrate=never"),
            f"output_dir={tmp_path / 'out'}",
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt=RUN/last.ckpt"], r"give system=RUN/last\.ckpt$"),
        (["model=ezaudio_xl", "prompt=rain"], r"this option is system= now: give system=ezaudio_xl$"),
        (["system=data/demo", "+published=audioldm2"], r"give only one of them, such as system=data/demo$"),
    ],
)
def test_the_old_names_of_a_system_say_what_it_is_called_now(arguments, message):
    refuse = renamed(**load_command("sample")["_OLD_NAMES"])
    with pytest.raises(SystemExit, match=message):
        refuse(["sample.py", *arguments])
    refuse(["sample.py", "prompt=model=x"])


def test_a_system_that_is_none_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="system=ezaudio_xxl names neither a published system"):
        sample_here("system=ezaudio_xxl", f"output_dir={tmp_path}")
    with pytest.raises(CheckpointError, match="ezaudio_xl is published without a student"):
        sample_here("system=ezaudio_xl", "student=true", f"output_dir={tmp_path}")


def test_help_lists_the_options():
    done = run_sample("--help")
    assert done.returncode == 0, done.stderr
    for option in (
        *("prompt", "prompts", "duration_seconds", "edit", "init", "strength", "guidance_scale"),
        *("solver", "steps", "accel", "output_dir"),
    ):
        assert option in done.stdout
