"""What each protocol's preprocessing makes of a clip."""

from dataclasses import replace

import pytest
import torch

from foley.core.channels import lossy_mixes
from foley.metrics.features import LabelledAudio, extract_audio
from foley.metrics.preprocessing import (
    PEAK,
    RESAMPLERS,
    Clap16kHzPreprocessing,
    ClapPreprocessing,
    EmbeddedPreprocessing,
    OpenL3Preprocessing,
    PannsPreprocessing,
    PasstPreprocessing,
    Preprocessing,
    VggishPreprocessing,
)
from foley.metrics.protocols import EvaluationProtocol

ALL = [
    EmbeddedPreprocessing,
    PannsPreprocessing,
    VggishPreprocessing,
    OpenL3Preprocessing,
    PasstPreprocessing,
    ClapPreprocessing,
    Clap16kHzPreprocessing,
]


def tone(rate_hz: int, seconds: float, hertz: float = 440.0) -> torch.Tensor:
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(round(rate_hz * seconds)) / rate_hz).unsqueeze(0)


@pytest.mark.parametrize("kind", ALL)
def test_each_states_itself_and_takes_any_rate_channels_and_length(kind: type[Preprocessing]) -> None:
    stated = kind().describe()
    assert stated["resampler"] in RESAMPLERS
    assert all(stated.values())
    for audio in (torch.zeros(1, 1), tone(22050, 0.3), tone(44100, 2.1).expand(6, -1)):
        assert kind()(audio, 22050).isfinite().all()


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_resamplers_keep_a_tone_and_remove_what_would_alias(resampler: str) -> None:
    inner = slice(2000, -2000)
    kept = RESAMPLERS[resampler](tone(44100, 1.0), 44100, 16000)
    torch.testing.assert_close(kept[:, inner], tone(16000, 1.0)[:, inner], atol=2e-3, rtol=0)
    aliased = RESAMPLERS[resampler](tone(44100, 1.0, 12000.0), 44100, 16000)
    assert aliased[:, inner].abs().max() < 5e-3


def test_embedded_pads_to_whole_seconds_and_at_least_two() -> None:
    for samples, padded in ((1, 48000), (48000, 48000), (48001, 72000)):
        audio = EmbeddedPreprocessing()(torch.ones(1, samples), 24000)
        assert audio.shape == (padded,)
        assert audio.sum() == samples


def test_panns_takes_the_first_channel_without_its_mean() -> None:
    audio = PannsPreprocessing()(torch.stack([tone(16000, 3)[0] + 0.25, torch.ones(48000)]), 16000)
    torch.testing.assert_close(audio, tone(16000, 3)[0], atol=1e-4, rtol=0)


def test_vggish_has_at_least_one_example() -> None:
    assert VggishPreprocessing()(torch.ones(1, 10), 16000).shape == (15600,)
    assert VggishPreprocessing()(torch.ones(1, 20000), 16000).shape == (20000,)


def test_openl3_doubles_mono_and_windows_every_half_second() -> None:
    audio = OpenL3Preprocessing()(tone(44100, 2), 44100)
    assert audio.shape == (2, 3 * 24000 + 48000)
    assert torch.equal(audio[0], audio[1])
    assert audio[:, :24000].abs().max() == 0
    assert audio.abs().max() == pytest.approx(PEAK, abs=1e-2)
    stereo = OpenL3Preprocessing()(torch.cat([tone(44100, 2), 0.1 * tone(44100, 2)]), 44100)
    assert stereo[1].abs().max() == pytest.approx(PEAK / 5 / 2, abs=1e-2) or stereo[1].abs().max() < PEAK / 4


def test_passt_windows_begin_every_five_seconds() -> None:
    for seconds, windows in ((1, 1), (10, 1), (10.1, 2), (15, 2), (16, 3)):
        assert PasstPreprocessing()(tone(32000, seconds), 32000).shape == (windows, 320000)
    assert PasstPreprocessing()(torch.zeros(1, 32000), 32000).abs().max() == 0


def share_above(audio: torch.Tensor, rate_hz: int, hertz: float) -> float:
    power = torch.fft.rfft(audio.double() * torch.hann_window(len(audio))).abs().square()
    return float(power[round(hertz * len(audio) / rate_hz) :].sum() / power.sum())


@pytest.mark.parametrize("rate_hz", [24000, 44100, 48000])
def test_clap_at_16_khz_hears_nothing_above_8_khz_and_all_below(rate_hz: int) -> None:
    noise = 0.1 * torch.randn(1, 10 * rate_hz, generator=torch.Generator().manual_seed(0))
    wide, narrow = (kind()(noise, rate_hz)[0] for kind in (ClapPreprocessing, Clap16kHzPreprocessing))
    # White noise has as much energy above 8 kHz as there is bandwidth, less what resampling rolls off.
    assert share_above(wide, 48000, 8000) == pytest.approx(1 - 8000 / (rate_hz / 2), abs=0.04)
    assert share_above(narrow, 48000, 8000) < 1e-12
    low, kept = (torch.fft.rfft(audio)[:70000] for audio in (wide, narrow))  # up to 7 kHz
    assert (low - kept).norm() / low.norm() < 5e-3  # the clip's edges
    assert Clap16kHzPreprocessing().describe() == {**ClapPreprocessing().describe(), "through_hz": 16000}


@pytest.mark.parametrize("kind", [PannsPreprocessing, OpenL3Preprocessing])
def test_silence_in_the_first_channels_never_stands_for_the_others(kind: type[Preprocessing]) -> None:
    sound, silence = tone(16000, 3), torch.zeros(2, 48000)
    torch.testing.assert_close(kind()(torch.cat([silence, sound]), 16000), kind()(sound, 16000))
    assert "loudest" in kind.channel_rule


def test_a_mean_that_loses_the_sound_is_warned_of_where_a_protocol_takes_the_mean(
    protocol: EvaluationProtocol, caplog: pytest.LogCaptureFixture
) -> None:
    lossy_mixes.count = 0
    sound = tone(100, 3, 7.0)
    extract_audio([LabelledAudio(torch.cat([sound, -sound]), id="antiphase")], protocol)
    assert "antiphase: its 2 channels cancel out" in caplog.text
    caplog.clear()
    panns = replace(protocol, preprocessing=PannsPreprocessing())
    extract_audio([LabelledAudio(torch.cat([sound, -sound]), id="antiphase")], panns)
    assert not caplog.records
