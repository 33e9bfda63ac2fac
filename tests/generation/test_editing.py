"""The window of an edit and what is pasted back, sample by sample; then edits and variations through a whole system."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from small_system import CONFIGS, STEPS, CountingAccelerator
from stirring_parts import stir

from foley.accel.caching.fora import Fora
from foley.core.hashing import hash_file
from foley.core.seeding import torch_generator
from foley.data.audio import PEAK_CEILING, read_audio
from foley.data.dataset import PeakLevel
from foley.diffusion.guidance import ClassifierFreeGuidance
from foley.diffusion.solver import SOLVERS
from foley.generation.editing import EditMask, EditWindow, Recording, Variation, paste, paste_fitted
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import System, build_system

RATE, HOP = 2000, 40
FAST = {"num_steps": 4}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator("editing", seed))


def recording(num_samples: int) -> Recording:
    return Recording(noise(num_samples), RATE, "some.wav", "0")


def pcm(num_samples: int, seed: int = 0) -> np.ndarray:
    """Noise over the whole range of 16 bits, the extremes included."""
    values = np.random.default_rng(seed).integers(-(2**15), 2**15, num_samples).astype(np.int16)
    values[:2] = -(2**15), 2**15 - 1
    return values


@pytest.fixture(scope="module")
def pipeline() -> TextToAudio:
    torch.manual_seed(0)
    system: System = build_system(CONFIGS)
    stir(system.modules["denoiser"])
    return TextToAudio(system, max_duration_seconds=5.0)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "in put, it's.wav"
    soundfile.write(path, pcm(2 * RATE), RATE, subtype="PCM_16")
    return path


@pytest.mark.parametrize(
    ("length", "mask", "window"),
    [
        (4000, (0.5, 0.5, 0.25), (500, 1000, 2000, 2500, 4000)),  # start, mask_start, mask_end, end, total
        (4000, (0.5, 0.5, 9), (0, 1000, 2000, 4000, 4000)),
        (4000, (0.5, 0.5, 0), (1000, 1000, 2000, 2000, 4000)),
        (4000, (2, 1, 0.5), (3000, 4000, 6000, 6000, 6000)),
        (4000, (1.5, 1, 0.5), (2000, 3000, 5000, 5000, 5000)),
        (4000, (0, 3, 1), (0, 0, 6000, 6000, 6000)),
    ],
)
def test_the_window_is_the_mask_and_its_boundaries(length, mask, window):
    found = EditMask(*mask).window(recording(length))
    assert (found.start, found.mask_start, found.mask_end, found.end, found.total) == window
    cropped = found.crop(recording(length).samples)
    assert len(cropped) == found.end - found.start
    assert not cropped[length - found.start :].any()


def test_every_frame_with_a_masked_sample_is_hidden_and_no_other():
    generator = np.random.default_rng(0)
    for _ in range(100):
        start, first, last, end = np.sort(generator.choice(500, 4, replace=False)).tolist()
        window = EditWindow(start, first, last, end, 500, 5)
        samples = torch.zeros(math.ceil((end - start) / HOP) * HOP, dtype=torch.bool)
        samples[first - start : last - start] = True
        assert torch.equal(window.hidden_mask(HOP)[0], samples.view(-1, HOP).any(dim=1))


@pytest.mark.parametrize(
    "mask", [(0.5, 0.5, 0.25), (0, 0.5, 0.2), (1.9, 0.1, 1), (2, 1, 1), (0.5, 0.001, 1), (1, 1, 0)]
)
def test_pasting_touches_nothing_outside_the_mask(mask):
    source = recording(2 * RATE)
    window = EditMask(*mask).window(source)
    generated = noise(3, 1, window.end - window.start + 17, seed=1)
    out = paste(source.samples, generated, window)
    assert out.shape == (3, 1, window.total)
    kept = torch.ones(window.total, dtype=torch.bool)
    kept[window.mask_start : window.mask_end] = False
    assert torch.equal(out[..., kept], source.samples[kept[: len(source.samples)]].expand(3, 1, -1))
    deep = slice(window.mask_start + window.fade, window.mask_end - window.fade)
    inside = generated[
        ..., window.mask_start - window.start + window.fade : window.mask_end - window.start - window.fade
    ]
    assert torch.equal(out[..., deep], inside)


def test_the_cross_fade_takes_the_step_out_of_both_borders():
    source = Recording(torch.zeros(2 * RATE), RATE, "some.wav", "0")
    window = EditMask(0.5, 0.5, 0.25).window(source)
    out = paste(source.samples, torch.ones(1, 1, window.end - window.start), window)[0, 0]
    fade = 40  # 20 ms
    assert out.diff().abs().max() < 1.01 * math.pi / 2 / fade
    assert torch.equal(out[1000 + fade : 2000 - fade], torch.ones(1000 - 2 * fade))
    torch.testing.assert_close(out, out.flip(0).roll(-1000))


def test_a_perfect_model_gives_the_recording_back():
    source = recording(2 * RATE)
    window = EditMask(0.5, 0.5, 0.25).window(source)
    assert torch.equal(paste(source.samples, window.crop(source.samples)[None, None], window)[0, 0], source.samples)


@pytest.mark.parametrize("mask", [(0.5, 0.5, 0.5), (0.5137, 0.333, 0.4321), (1.75, 1, 0.5), (2, 0.5, 1), (0, 0.3, 0.2)])
def test_an_edit_keeps_all_else_in_memory_and_in_the_16_bit_file(pipeline, file, tmp_path, mask):
    edit = EditMask(*mask)
    result = pipeline.edit(["rain", "a dog"], file, edit, seeds=[3, 4], **FAST)
    source = torch.from_numpy(read_audio(file, RATE))
    window = edit.window(Recording.read(file, RATE, "edit"))
    assert result.audio.shape == (2, 1, window.total)
    kept = np.ones(window.total, dtype=bool)
    kept[window.mask_start : window.mask_end] = False
    assert torch.equal(result.audio[..., kept], source[kept[: len(source)]].expand(2, 1, -1))
    assert not torch.equal(result.audio[0], result.audio[1])
    result.write(tmp_path / "out")
    for wave in sorted((tmp_path / "out").glob("*.wav")):
        written, rate = soundfile.read(wave, dtype="int16")
        assert rate == RATE
        assert np.array_equal(written[kept], pcm(2 * RATE)[kept[: 2 * RATE]])


def test_a_file_of_another_rate_and_channel_count_is_converted_first(pipeline, tmp_path):
    path = tmp_path / "stereo.flac"
    soundfile.write(path, np.stack([pcm(6000), pcm(6000, 1)], axis=1), 3000)
    result = pipeline.edit(["rain"], path, EditMask(0.5, 0.5), **FAST)
    converted = torch.from_numpy(read_audio(path, RATE))
    assert torch.equal(result.audio[0, 0, :1000], converted[:1000])
    assert torch.equal(result.audio[0, 0, 2000:], converted[2000:])


@pytest.mark.parametrize("seconds", [2.0, 2.5])
def test_a_mask_over_everything_is_plain_generation(pipeline, file, seconds):
    plain = pipeline.generate(["rain"], seconds, seeds=[5], **FAST)
    edited = pipeline.edit(["rain"], file, EditMask(0, seconds), seeds=[5], **FAST)
    assert torch.equal(edited.audio, plain.audio)


def test_the_model_sees_the_boundary_and_nothing_beyond_it(pipeline, tmp_path):
    def edited(change: slice) -> torch.Tensor:
        samples = pcm(2 * RATE).copy()
        samples[change] = 0
        soundfile.write(tmp_path / "changed.wav", samples, RATE)
        return pipeline.edit(["rain"], tmp_path / "changed.wav", EditMask(1, 0.4, 0.3), **FAST).audio[..., 2000:2800]

    plain = edited(slice(0, 0))
    assert torch.equal(edited(slice(0, 1400)), plain)
    assert torch.equal(edited(slice(3400, 4000)), plain)
    assert not torch.allclose(edited(slice(1400, 1600)), plain, atol=1e-5)


@pytest.mark.parametrize("mask", [(0.5, 0.5, 0.25), (0, 0.5, 0.2), (2, 1, 1), (0.5, 0.001, 1)])
@pytest.mark.parametrize("loudest", [0.5, 3.0])
def test_what_is_generated_fits_beside_what_is_kept(mask, loudest):
    samples = recording(2 * RATE).samples
    source = Recording(loudest * samples / samples.abs().max(), RATE, "some.wav", "0")
    window = EditMask(*mask).window(source)
    generated = torch.stack([noise(1, window.end - window.start, seed=1) * gain for gain in (0.01, 40.0)])
    out, gains = paste_fitted(source.samples, generated, window)
    assert torch.equal(out, paste(source.samples, gains[:, None, None] * generated, window))
    ceiling = max(PEAK_CEILING, float(window.kept(source.samples).abs().max()))
    inside = out[..., window.mask_start : window.mask_end].abs().amax(dim=(1, 2))
    assert gains[0] == 1 > gains[1] > 0
    assert inside[1] == pytest.approx(ceiling, rel=1e-5)


class Recorder:
    """Stands for `encode` of a codec: keeps what it was given."""

    def __init__(self, encode):
        self.encode, self.peaks = encode, []

    def __call__(self, audio):
        self.peaks.append(float(audio.abs().max()))
        return self.encode(audio)


@pytest.mark.parametrize("peak", [1.0, 0.005])
def test_the_codec_sees_the_level_of_training_and_the_result_has_that_of_the_recording(
    pipeline, tmp_path, monkeypatch, peak
):
    wave = 0.4 * noise(2 * RATE).clamp(-2, 2).numpy()
    for name, gain in (("loud", 1.0), ("quiet", peak)):
        soundfile.write(tmp_path / f"{name}.wav", gain * wave, RATE, subtype="FLOAT")
    recorder = Recorder(pipeline.codec.encode)
    monkeypatch.setattr(pipeline.codec, "encode", recorder)
    for start in (
        lambda file: pipeline.edit(["rain"], file, EditMask(0.5, 0.5, 1.5), **FAST),
        lambda file: pipeline.vary(["rain"], file, 0.5, **FAST),
    ):
        loud, quiet = (start(tmp_path / f"{name}.wav") for name in ("loud", "quiet"))
        torch.testing.assert_close(quiet.audio, peak * loud.audio, atol=1e-6, rtol=1e-3)
        assert quiet.settings["level_gain_db"] == pytest.approx(20 * math.log10(PEAK_CEILING / (0.8 * peak)), abs=1e-3)
    assert recorder.peaks == pytest.approx([PEAK_CEILING] * 4)


@pytest.mark.parametrize("silence", [0.0, 1e-7])
def test_a_silent_recording_has_no_level_to_bring_to(pipeline, tmp_path, silence):
    soundfile.write(tmp_path / "silent.wav", np.full(2 * RATE, silence), RATE, subtype="FLOAT")
    edited = pipeline.edit(["rain"], tmp_path / "silent.wav", EditMask(0.5, 0.5), **FAST)
    varied = pipeline.vary(["rain"], tmp_path / "silent.wav", **FAST)
    assert edited.settings["level_gain_db"] == varied.settings["level_gain_db"] == 0
    assert edited.audio.isfinite().all()


def test_a_part_that_is_too_loud_is_attenuated_and_said_to_be(pipeline, tmp_path, monkeypatch, caplog):
    tone = 0.5 * np.sin(2 * np.pi * 50 * np.arange(2 * RATE) / RATE)
    soundfile.write(tmp_path / "tone.wav", tone, RATE)
    decode = pipeline._decode
    monkeypatch.setattr(pipeline, "_decode", lambda latent, chunk: 20 * torch.ones_like(decode(latent, chunk)))
    result = pipeline.edit(["a siren"], tmp_path / "tone.wav", EditMask(0.5, 0.5), **FAST)
    assert float(result.audio.abs().max()) == pytest.approx(PEAK_CEILING, rel=1e-5)
    result.write(tmp_path / "out")
    assert "what was generated in 1 of 1 edits is attenuated" in caplog.text
    sidecar = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert sidecar["generated_gain_db"] < -20
    assert (sidecar["gain_db"], sidecar["samples_over_full_scale"]) == (0, 0)
    assert sidecar["peak"] == pytest.approx(PEAK_CEILING, abs=1e-5)
    written, _ = soundfile.read(next((tmp_path / "out").glob("*.wav")), dtype="int16")
    kept, _ = soundfile.read(tmp_path / "tone.wav", dtype="int16")
    assert np.array_equal(written[:1000], kept[:1000])
    assert np.array_equal(written[2000:], kept[2000:])


def test_an_edit_keeps_peaks_beyond_full_scale(pipeline, shared, tmp_path, caplog):
    file = shared / "cases" / "audio" / "float_peaks_at_3.wav"
    if not file.is_file():
        pytest.skip(f"no {file}")
    result = pipeline.edit(["rain"], file, EditMask(0.5, 0.5), **FAST)
    result.write(tmp_path / "out")
    kept = read_audio(file, RATE)
    written, _ = soundfile.read(next((tmp_path / "out").glob("*.wav")), dtype="float32")
    assert np.abs(kept).max() > 2.5
    assert np.array_equal(written[:1000], kept[:1000])
    assert np.array_equal(written[2000:], kept[2000:])
    sidecar = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert sidecar["samples_over_full_scale"] == int((np.abs(written) > 1).sum()) > 0
    assert sidecar["peak"] == pytest.approx(float(np.abs(written).max()), abs=1e-5)
    assert "exceed full scale (a file holds 32-bit floats)" in caplog.text


def test_a_plain_clip_beyond_full_scale_is_warned_of_with_peak_and_count(pipeline, tmp_path, caplog, monkeypatch):
    loud = torch.zeros(1, 1, 2 * RATE)
    loud[..., :7] = -4.09
    monkeypatch.setattr(pipeline, "_decode", lambda latent, chunk: loud)
    pipeline.generate(["a siren"], 2.0, **FAST).write(tmp_path)
    assert "'a siren' with seed 0 peaks at 4.09, 7 samples beyond it" in caplog.text
    sidecar = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert (sidecar["peak"], sidecar["samples_over_full_scale"], sidecar["generated_gain_db"]) == (4.09, 7, 0)
    assert sidecar["gain_db"] == pytest.approx(20 * math.log10(PEAK_CEILING / 4.09), abs=1e-3)


@pytest.mark.parametrize("start", [lambda p, *a, **k: p.edit(*a, EditMask(0.5, 0.5), **k), TextToAudio.vary])
def test_stereo_in_antiphase_is_warned_of_and_kept_by_another_down_mix(pipeline, shared, caplog, start):
    file = shared / "cases" / "audio" / "stereo_antiphase.wav"
    if not file.is_file():
        pytest.skip(f"no {file}")
    mean = start(pipeline, ["rain"], file, **FAST)
    assert "its 2 channels cancel out" in caplog.text
    loudest = start(pipeline, ["rain"], file, downmix="loudest", **FAST)
    about = mean.settings.get("edit") or mean.settings["init"]
    assert about["downmix"] == "mean"
    assert "cancel out" in about["downmix_warning"]
    assert (loudest.settings.get("edit") or loudest.settings["init"])["downmix"] == "loudest"
    assert mean.audio[..., :1000].abs().max() < 0.01 < 0.1 < loudest.audio[..., :1000].abs().max()


def test_an_unknown_down_mix_is_refused(pipeline, file):
    with pytest.raises(ValueError, match="downmix must be one of mean, loudest, refuse, got 'left'"):
        pipeline.vary(["rain"], file, downmix="left")


def test_an_edit_is_the_same_alone_and_in_a_batch(pipeline, file):
    edit = EditMask(0.5, 0.5)
    together = pipeline.edit(["rain", "a dog barks", "rain"], file, edit, seeds=[1, 2, 3], batch_size=2, **FAST)
    alone = pipeline.edit(["rain"], file, edit, seeds=[3], **FAST)
    torch.testing.assert_close(together.audio[2:], alone.audio, atol=1e-4, rtol=1e-3)


def test_the_json_says_what_was_edited(pipeline, file, tmp_path):
    pipeline.edit(["rain"], file, EditMask(0.5, 0.5), **FAST).write(tmp_path / "out")
    settings = json.loads(next((tmp_path / "out").glob("*.json")).read_text())["settings"]
    assert settings["edit"] == {
        "file": str(file),
        "sha256": hash_file(file),
        "mask_start_seconds": 0.5,
        "mask_length_seconds": 0.5,
        "boundary_seconds": 2.0,
        "cross_fade_seconds": 0.02,
    }
    assert settings["duration_seconds"] == 2.0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((-1, 1), "mask_start_seconds must be a number of seconds from 0 to 1e\\+09, for an edit; got -1"),
        ((None, 1), "mask_start_seconds must be .* got None"),
        ((1, "x"), "mask_length_seconds must be .* got 'x'"),
        ((1, float("nan")), "mask_length_seconds"),
        ((1, 1, -0.1), "boundary_seconds"),
        ((2.1, 1), "mask_start_seconds=2.1 lies outside .* lasts 2.0 s"),
        ((1, 0), "mask_length_seconds=0 holds no sample"),
        ((1, 1e308), r"mask_length_seconds must be .* got 1e\+308"),
        ((1, 1e9), "mask and its boundaries must be above 0 and at most 5.0"),
    ],
)
def test_impossible_masks_are_refused(pipeline, file, mask, message):
    with pytest.raises(ValueError, match=message):
        pipeline.edit(["rain"], file, EditMask(*mask), **FAST)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"", "is empty"), (b"no audio" * 99, "cannot be decoded")]
)
def test_unreadable_files_are_refused_by_their_option(pipeline, tmp_path, content, message):
    path = tmp_path / "bad.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"edit=.*{message}"):
        pipeline.edit(["rain"], path, EditMask(0, 1))
    with pytest.raises(ValueError, match=f"init=.*{message}"):
        pipeline.vary(["rain"], path)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if "flow" not in name])
def test_full_strength_is_plain_generation_bit_by_bit(pipeline, file, solver):
    plain = pipeline.generate(["rain"], 2.0, seeds=[5], solver=solver, **FAST)
    assert torch.equal(pipeline.vary(["rain"], file, 1.0, seeds=[5], solver=solver, **FAST).audio, plain.audio)


def test_no_strength_is_the_codec_and_a_little_is_near_it(pipeline, file):
    audio = torch.from_numpy(read_audio(file, RATE))[None, None]
    with torch.no_grad():
        reconstruction = pipeline.codec.reconstruct(PeakLevel()(audio)) / PeakLevel().gain(audio)
    torch.testing.assert_close(pipeline.vary(["rain"], file, 0.0, **FAST).audio, reconstruction)
    distance = [
        (pipeline.vary(["rain"], file, strength, num_steps=50).audio - reconstruction).norm()
        for strength in (0.02, 0.2, 1.0)
    ]
    assert distance[0] < 0.2 * distance[2]
    assert distance[0] < distance[1] < distance[2]


@pytest.mark.parametrize(("solver", "evaluations"), [("ddim", 3), ("heun", 5), ("dpmpp_3m", 3), ("unipc", 3)])
def test_a_variation_takes_its_share_of_the_steps(pipeline, file, solver, evaluations):
    accelerator = CountingAccelerator()
    result = pipeline.vary(["rain"], file, 0.3, num_steps=10, solver=solver, accelerator=accelerator)
    assert accelerator.evaluations == evaluations
    assert result.settings["init"] == {
        "file": str(file),
        "sha256": hash_file(file),
        "strength": 0.3,
        "first_step": 7,
    }
    assert result.audio.shape == (1, 1, 2 * RATE)


def test_a_cached_variation_computes_before_it_reuses(pipeline, file):
    cached = pipeline.vary(["rain"], file, 0.5, num_steps=10, accelerator=Fora(4))
    assert not torch.equal(cached.audio, pipeline.vary(["rain"], file, 0.5, num_steps=10).audio)
    never_reused = pipeline.vary(["rain"], file, 0.1, num_steps=10, accelerator=Fora(10))
    assert torch.equal(never_reused.audio, pipeline.vary(["rain"], file, 0.1, num_steps=10).audio)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_impossible_strengths_are_refused(pipeline, file, strength):
    with pytest.raises(ValueError, match=r"strength must lie between 0 .*through the codec"):
        pipeline.vary(["rain"], file, strength)


def test_a_recording_beyond_the_longest_duration_cannot_be_varied_but_edited(pipeline, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, pcm(6 * RATE), RATE)
    with pytest.raises(ValueError, match=r"init=.* at most 5.0"):
        pipeline.vary(["rain"], path)
    assert pipeline.edit(["rain"], path, EditMask(1, 0.5, 0.5), **FAST).audio.shape[-1] == 6 * RATE


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_a_negative_prompt_that_is_the_prompt_leaves_the_conditional_model(pipeline, scale):
    prompt = "rain on a tin roof while someone speaks"
    plain = pipeline.generate([prompt], guidance=ClassifierFreeGuidance(1.0), **STEPS)
    same = pipeline.generate([prompt], negative_prompt=prompt, guidance=ClassifierFreeGuidance(scale), **STEPS)
    torch.testing.assert_close(same.audio, plain.audio, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "negative"), [("rain", "a man speaks while a dog barks"), ("a dog barks twice", "hum")]
)
def test_scale_0_is_the_negative_prompt_whatever_its_length(pipeline, prompt, negative):
    guided = pipeline.generate([prompt], negative_prompt=negative, guidance=ClassifierFreeGuidance(0.0), **STEPS)
    plain = pipeline.generate([negative], guidance=ClassifierFreeGuidance(1.0), **STEPS)
    torch.testing.assert_close(guided.audio, plain.audio, atol=1e-4, rtol=1e-3)


def test_a_negative_prompt_without_guidance_is_warned_of(pipeline, caplog):
    pipeline.generate(["rain"], negative_prompt="speech", guidance=ClassifierFreeGuidance(1.0), **STEPS)
    assert "no effect" in caplog.text


@pytest.mark.parametrize(
    ("strength", "num_steps", "steps_taken", "said"),
    [
        (0.0, 10, 0, "takes no step"),
        (0.001, 10, 1, "rounds to none: one is taken"),
        (0.3, 10, 3, None),
        (0.97, 10, 10, "takes all 10 steps"),
        (0.5, 1, 1, "takes all 1 steps"),
        (1.0, 10, 10, "takes all 10 steps"),
    ],
)
def test_a_strength_that_rounds_to_no_step_or_to_all_says_so(
    pipeline, file, caplog, strength, num_steps, steps_taken, said
):
    accelerator, fresh = CountingAccelerator(), TextToAudio(pipeline.system)
    for _ in range(2):
        fresh.vary(["rain"], file, strength, num_steps=num_steps, accelerator=accelerator)
    assert accelerator.evaluations == 2 * steps_taken
    assert Variation(file, strength).first_step(num_steps) == num_steps - steps_taken
    messages = [record.getMessage() for record in caplog.records if "strength=" in record.getMessage()]
    assert len(messages) == (said is not None)  # once, however many batches there are
    assert said is None or said in messages[0]
