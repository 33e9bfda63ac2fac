"""An option that changes nothing in a request is named; the length of a system's training is what it generates."""

import logging
from dataclasses import replace

import pytest
from commands import compose_command
from small_system import CONFIGS

from foley.cli.sampling_checks import EFFECT, warn_without_effect
from foley.core.config import shipped
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.generation.editing import Variation
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system, load_system, save_system

IDLE = {
    "duration_seconds=3": ["init=a.wav"],
    "negative_prompt=wind": ["guidance_scale=1"],
    "guidance_rescale=0.5": ["guidance_scale=1"],
    "overlap_seconds=2": [],
    "window_seconds=10": ["duration_seconds=5"],
    "strength=0.3": [],
    "control_scale=0.5": ["init=a.wav"],
    "boundary_seconds=1": ["init=a.wav"],
    "trained_seconds=2": [],
    "caption_seed=3": ["captions=first"],
    "caption_column=text": [],
    "id_column=id": [],
    "clip_column=id": [],
    "split_column=fold": [],
    "split=test": [],
    "captions=first": [],
    "hub_dir=hub": [],
    "+system_overrides.published.dtype=float16": [],
    "ddp_strategy=fsdp": [],
    "downmix=loudest": [],
    "accel.seed=3": ["accel=local_global", "accel.ratio=0"],
    "accel.double_count=true": ["accel=litefocus", "accel.same_frequency=false"],
    "accel.max_lookahead=2": ["accel=smoothcache", "accel.alpha=0"],
    "accel.reuse=taylor": ["accel=fora", "accel.interval=1"],
}
EFFECTIVE = {
    "duration_seconds=3": [],
    "negative_prompt=wind": [],
    "guidance_rescale=0.5": ["guidance_scale=4"],
    "overlap_seconds=2": ["window_seconds=5"],
    "window_seconds=10": ["duration_seconds=20"],
    "strength=0.3": ["init=a.wav"],
    "control_scale=0.5": ["control=a.wav"],
    "boundary_seconds=1": ["edit=a.wav"],
    "trained_seconds=2": ["rotary_extension=ntk"],
    "caption_seed=3": ["captions=random"],
    "captions=first": ["prompts=a.csv"],
    "hub_dir=hub": ["system=ezaudio_xl"],
    "downmix=loudest": ["init=a.wav"],
    "accel.seed=3": ["accel=local_global"],
    "accel.double_count=true": ["accel=litefocus"],
    "accel.reuse=taylor": ["accel=fora"],
}


def warnings(caplog, typed, others):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        warn_without_effect(compose_command("sample", typed, *others), [typed.lstrip("+").partition("=")[0]])
    return [record.getMessage() for record in caplog.records]


@pytest.mark.slow
def test_typed_options_that_change_nothing_are_named(caplog):
    names = [typed.lstrip("+").partition("=")[0] for typed in IDLE]
    assert [option for option in EFFECT if not any(f"{name}.".startswith(f"{option}.") for name in names)] == []
    for typed, others in IDLE.items():
        (message,) = warnings(caplog, typed, others)
        named = next(option for option in EFFECT if typed.lstrip("+").startswith((f"{option}=", f"{option}.")))
        assert message.startswith(f"{named} has no effect ")


@pytest.mark.slow
def test_options_with_an_effect_pass_without_a_word(caplog):
    for typed, others in EFFECTIVE.items():
        assert warnings(caplog, typed, others) == []


def test_defaults_are_not_looked_at(caplog):
    warn_without_effect(compose_command("sample", "init=a.wav", "guidance_scale=1"), ["init", "guidance_scale"])
    assert caplog.records == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"guidance": ClassifierFreeGuidance(1.0, 0.5)}, "guidance_rescale"),
        ({"guidance": ClassifierFreeGuidance(1.0), "negative_prompt": "wind"}, "negative_prompt"),
        ({"source": Variation("a.wav"), "duration_seconds": 3.0}, "duration_seconds"),
        ({"overlap_seconds": 2.0}, "overlap_seconds"),
    ],
)
def test_settings_of_the_library_say_the_same(caplog, settings, name):
    GenerationSettings(**settings).warn_without_effect()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{name} has no effect")


def test_settings_that_all_have_an_effect_say_nothing(caplog):
    GenerationSettings(window_seconds=5.0, overlap_seconds=2.0, negative_prompt="wind").warn_without_effect()
    assert caplog.records == []


@pytest.fixture(scope="module")
def two_seconds(tmp_path_factory):
    directory = tmp_path_factory.mktemp("system")
    save_system(replace(build_system(CONFIGS), trained_seconds=2.0), directory)
    return TextToAudio.load(directory)


def test_the_length_of_training_is_the_default(two_seconds, caplog):
    assert two_seconds.generate(["rain"], num_steps=1).audio.shape[-1] == 2 * two_seconds.sample_rate_hz
    assert caplog.records == []
    assert TextToAudio(build_system(CONFIGS)).default_duration_seconds == 5.0


def test_longer_than_training_is_warned_of_once(two_seconds, caplog):
    for _ in range(2):
        two_seconds.generate(["rain"], 2.5, num_steps=1)
    (record,) = caplog.records
    assert "2.5 s at once are longer than the 2 s that this system was trained on" in record.getMessage()
    caplog.clear()
    two_seconds.generate(["rain"], 3.0, num_steps=1, window_seconds=2.0)
    assert caplog.records == []


def test_what_ships_says_what_it_was_trained_on():
    assert load_system(shipped("demo")).trained_seconds == 2.0
    assert load_system(shipped("demo/student")).trained_seconds == 2.0


def test_a_length_of_training_that_is_none_is_refused():
    with pytest.raises(ValueError, match="trained_seconds=0: give a number > 0"):
        replace(build_system(CONFIGS), trained_seconds=0)
