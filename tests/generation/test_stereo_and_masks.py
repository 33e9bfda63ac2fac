"""Edits of several parts at once, and edits and variations of stereo by a system whose codec has two channels."""

import copy
import io

import numpy as np
import pytest
import soundfile
import torch
from commands import compose_command
from small_system import CONFIGS

from foley.cli.sampling import chosen_source
from foley.core.seeding import torch_generator
from foley.data.audio import read_channels
from foley.generation.editing import Edit, EditMask, EditMasks, Recording, paste, paste_fitted
from foley.generation.pipeline_to_audio import check_pipeline_settings
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.serving.sounds import MEDIA_TYPES, encode
from foley.system.published.stable_audio_3 import StableAudio3
from foley.system.system import build_system

RATE, HOP = 2000, 40
MASKS = ((0.2, 0.3), (1.0, 0.25), (1.4, 0.1))
FAST = {"num_steps": 2}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch_generator("masks", seed))


def recording(channels=1, num_samples=2 * RATE):
    return Recording(noise(channels, num_samples).squeeze(0), RATE, "some.wav", "0")


def system_of(channels):
    torch.manual_seed(0)
    configs = copy.deepcopy(CONFIGS)
    if channels == 2:
        configs["codec"] |= {"audio_channels": 2, "mid_side": True}
    return TextToAudio(build_system(configs), max_duration_seconds=5.0)


@pytest.fixture(scope="module")
def systems():
    return {channels: system_of(channels) for channels in (1, 2)}


@pytest.fixture
def files(tmp_path):
    """16-bit files of one and of two channels."""
    found = {}
    for channels in (1, 2):
        values = np.random.default_rng(channels).integers(-9000, 9000, (2 * RATE, channels)).astype(np.int16)
        soundfile.write(found.setdefault(channels, tmp_path / f"{channels}.wav"), values, RATE)
    return found


def outside(masks, total):
    kept = torch.ones(total, dtype=torch.bool)
    for start, length in masks:
        kept[round(start * RATE) : round((start + length) * RATE)] = False
    return kept


# ---------------------------------------------------------------- windows and pasting


def test_one_of_several_masks_is_an_edit_mask():
    one, alone = EditMasks([(0.5, 0.4)], 0.25), EditMask(0.5, 0.4, 0.25)
    assert one.window(recording()) == alone.window(recording())


@pytest.mark.parametrize(
    ("masks", "spans"),
    [
        (((1.0, 0.2), (0.2, 0.3)), [(400, 1000), (2000, 2400)]),  # in any order
        (((0.2, 0.3), (0.5, 0.1)), [(400, 1200)]),  # they touch
        (((0.2, 0.3), (0.4, 0.3)), [(400, 1400)]),  # they overlap
        (((0.2, 1.0), (0.4, 0.1), (1.3, 0.1)), [(400, 2400), (2600, 2800)]),  # one lies in another
        (((0.2, 0.1), (1.9, 0.6)), [(400, 600), (3800, 5000)]),  # the last goes on past the end
    ],
)
def test_parts_are_put_in_order_and_joined(masks, spans):
    window = EditMasks(masks, 0.1).window(recording())
    assert window.masked_spans == spans
    assert (window.start, window.total) == (spans[0][0] - 200, max(4000, spans[-1][1]))
    assert window.end == min(window.total, spans[-1][1] + 200)


def test_frames_of_any_part_are_hidden_and_no_other():
    window = EditMasks(MASKS, 0.1).window(recording())
    samples = ~outside(MASKS, window.total)[window.start : window.end]
    frames = torch.nn.functional.pad(samples, (0, -len(samples) % HOP)).view(-1, HOP)
    assert torch.equal(window.hidden_mask(HOP)[0], frames.any(dim=1))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("paste_as", [paste, lambda *given: paste_fitted(*given)[0]])
def test_pasting_several_parts_touches_nothing_else(channels, paste_as):
    source = recording(channels)
    window = EditMasks(MASKS, 0.1).window(source)
    out = paste_as(source.samples, noise(3, channels, window.end - window.start, seed=1), window)
    kept = outside(MASKS, window.total)
    assert torch.equal(out[..., kept], torch.atleast_2d(source.samples)[:, kept].expand(3, -1, -1))
    assert bool((out[..., ~kept] != torch.atleast_2d(source.samples)[:, ~kept]).any(dim=-1).all())
    exact = window.crop(torch.atleast_2d(source.samples))[None]
    assert torch.equal(paste(source.samples, exact, window)[0], torch.atleast_2d(source.samples))


def test_each_part_is_pasted_as_it_would_be_alone():
    source, masks = recording(), ((0.2, 0.3), (1.0, 0.25))
    window = EditMasks(masks, 0.1).window(source)
    generated = noise(1, 1, window.end - window.start, seed=1)
    together = paste(source.samples, generated, window)
    for start, length in masks:
        alone = EditMask(start, length, 0.1).window(source)
        own = generated[..., alone.start - window.start : alone.end - window.start]
        part = slice(alone.mask_start, alone.mask_end)
        torch.testing.assert_close(together[..., part], paste(source.samples, own, alone)[..., part])


def test_what_no_recording_could_have_is_refused_in_words():
    for given in (0.5, [0.5, 0.4], [[0.5]], [], "[[1, 2]]"):
        with pytest.raises(ValueError, match=r"masks=.*: give one pair of seconds for each part, \[\[START, LENGTH\]"):
            EditMasks(given)
    with pytest.raises(ValueError, match=r"mask_length_seconds must be a number of seconds from 0 .* got -1"):
        EditMasks([(0.5, -1)])
    with pytest.raises(ValueError, match=r"mask_start_seconds=3 lies outside some.wav, which lasts 2.0 s"):
        EditMasks([(0.5, 0.1), (3, 0.1)]).window(recording())
    settings = GenerationSettings(source=Edit("dog.wav", EditMasks(MASKS)))
    with pytest.raises(ValueError, match="masks: a pipeline replaces one part of a recording at a time"):
        check_pipeline_settings(settings, StableAudio3)


def test_the_command_line_takes_one_way_to_say_what_is_replaced():
    source = chosen_source(compose_command("sample", "edit=dog.wav", "masks=[[0.5,0.4],[1.2,0.3]]"))
    assert source == Edit("dog.wav", EditMasks([[0.5, 0.4], [1.2, 0.3]]))
    with pytest.raises(ValueError, match="masks= stands in the place of mask_start_seconds= and mask_length_seconds="):
        chosen_source(compose_command("sample", "edit=dog.wav", "masks=[[0.5,0.4]]", "mask_start_seconds=1"))
    with pytest.raises(ValueError, match=r"say what to replace: give edit=FILE too"):
        chosen_source(compose_command("sample", "masks=[[0.5,0.4]]"))


# ---------------------------------------------------------------- through whole systems


@pytest.mark.parametrize("channels", [1, 2])
def test_an_edit_keeps_both_channels_bit_by_bit_in_the_file_too(systems, files, tmp_path, channels):
    masks = EditMasks(MASKS, 0.1)
    result = systems[channels].edit(["rain", "a dog"], files[channels], masks, **FAST)
    source, _ = read_channels(files[channels])
    kept = outside(MASKS, 2 * RATE)
    assert result.audio.shape == (2, channels, 2 * RATE)
    assert torch.equal(result.audio[..., kept], torch.from_numpy(source.T)[:, kept].expand(2, -1, -1))
    assert not torch.equal(result.audio[0], result.audio[1])
    stem = result.write_clip(tmp_path, 0, 0)
    written, original = (soundfile.read(file, dtype="int16", always_2d=True)[0] for file in (
        tmp_path / f"{stem}.wav", files[channels]
    ))  # fmt: skip
    np.testing.assert_array_equal(written[kept], original[kept])
    assert result.describe(0, 0)["settings"]["edit"]["masks"] == [list(mask) for mask in MASKS]


def test_a_stereo_system_generates_and_varies_stereo(systems, files, tmp_path):
    made = systems[2].generate(["rain"], 0.5, **FAST)
    assert made.audio.shape == (1, 2, 1000)
    assert soundfile.info(tmp_path / f"{made.write_clip(tmp_path, 0, 0)}.wav").channels == 2
    assert not torch.equal(made.audio[:, 0], made.audio[:, 1])
    through = systems[2].vary(["rain"], files[2], strength=0.0).audio
    source = torch.from_numpy(read_channels(files[2])[0].T)
    gain = 10 ** (-1 / 20) / float(source.abs().amax())
    with torch.no_grad():
        expected = systems[2].codec.reconstruct(gain * source[None]) / gain
    torch.testing.assert_close(through, expected, atol=1e-4, rtol=1e-3)


def test_a_mono_file_is_the_same_on_both_sides_and_a_stereo_one_is_mixed_or_refused_for_mono(systems, files):
    mask = EditMask(0.5, 0.5, 0.2)
    kept = outside([(0.5, 0.5)], 2 * RATE)
    both = systems[2].edit(["rain"], files[1], mask, **FAST).audio[..., kept]
    assert torch.equal(both[:, 0], both[:, 1])
    mixed = systems[1].edit(["rain"], files[2], mask, **FAST)
    source = read_channels(files[2])[0]
    assert torch.equal(mixed.audio[0, 0, kept], torch.from_numpy(source.mean(axis=1, dtype=np.float32))[kept])
    assert mixed.describe(0, 0)["settings"]["edit"]["downmix"] == "mean"
    with pytest.raises(ValueError, match=r"edit=.*2.wav: holds 2 channels, and downmix=refuse mixes none"):
        systems[1].edit(["rain"], files[2], mask, downmix="refuse", **FAST)
    assert systems[2].edit(["rain"], files[2], mask, downmix="refuse", **FAST).audio.shape == (1, 2, 2 * RATE)


@pytest.mark.parametrize("name", MEDIA_TYPES)
def test_every_format_of_the_server_has_both_channels(systems, name):
    sound = encode(systems[2].generate(["rain"], 0.5, **FAST), 0, name)
    assert soundfile.info(io.BytesIO(sound.content)).channels == 2
