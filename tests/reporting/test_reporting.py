import json
from html.parser import HTMLParser

import pytest
import soundfile
import torch

from foley.core.files import sample_stem, slug
from foley.data.audio import PEAK_CEILING, write_wav
from foley.generation.prompts import Clip
from foley.generation.result import Generation, Timings
from foley.reporting.plots import draw_sheet, log_mel
from foley.reporting.samples import Card

RATE = 24000
HOSTILE = [
    "../../etc/passwd",
    "a/b\\c",
    "line\nbreak",
    "🐕🔥",
    "",
    "<script>alert('x')</script> & \"q\"",
    "$x_{1$",
    "CON",
]


def tone(peak: float, seconds: float = 0.5, hertz: float = 440.0) -> torch.Tensor:
    return peak * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


@pytest.mark.parametrize("prompt", [*HOSTILE, "x" * 1_000_000])
def test_names_are_safe(prompt):
    assert set(slug(prompt)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert 1 <= len(slug(prompt)) <= 48


def test_names_are_unique_for_the_same_prompt_and_seed():
    assert sample_stem("dog", 0, 1) != sample_stem("dog", 1, 1)


def test_loud_audio_is_attenuated_and_quiet_audio_is_left_alone(tmp_path):
    assert write_wav(tmp_path / "quiet.wav", tone(0.25), RATE) == 1.0
    gain = write_wav(tmp_path / "loud.wav", tone(2.0), RATE)
    assert gain == pytest.approx(PEAK_CEILING / 2, rel=1e-3)
    loud, rate = soundfile.read(tmp_path / "loud.wav")
    quiet, _ = soundfile.read(tmp_path / "quiet.wav")
    assert (rate, len(loud)) == (RATE, RATE // 2)
    assert abs(loud).max() == pytest.approx(PEAK_CEILING, abs=1e-3)
    assert abs(quiet).max() == pytest.approx(0.25, abs=1e-3)
    assert soundfile.info(tmp_path / "loud.wav").subtype == "PCM_16"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_audio_that_is_not_finite_leaves_no_file(tmp_path, value):
    with pytest.raises(ValueError, match="NaN or infinity"):
        write_wav(tmp_path / "bad.wav", torch.tensor([0.0, value]), RATE)
    assert list(tmp_path.iterdir()) == []


def test_a_tone_is_brightest_at_its_own_band():
    low, high = (int(log_mel(tone(0.5, hertz=hertz), RATE).mean(dim=1).argmax()) for hertz in (300.0, 3000.0))
    assert low < high
    mel = [2595 * torch.log10(torch.tensor(1 + hertz / 700)) for hertz in (300.0, RATE / 2)]
    assert low == pytest.approx(float(mel[0] / mel[1]) * 96, abs=1.5)


@pytest.mark.parametrize("audio", [torch.zeros(RATE), torch.zeros(1), tone(1e-4)])
def test_silence_and_single_samples_have_a_spectrogram(audio):
    assert log_mel(audio, RATE).isfinite().all()


def test_a_sheet_of_awkward_captions_is_drawn(tmp_path):
    draw_sheet(tmp_path / "sheet.png", [tone(0.3, 0.1)] * len(HOSTILE), HOSTILE, RATE)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.sources = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_a_folder_of_samples_is_complete(tmp_path):
    clips = [Clip(prompt, seed) for seed, prompt in enumerate(HOSTILE)]
    audio = torch.stack([tone(0.3 * clip.seed, 0.1) for clip in clips])[:, None]
    made = Generation(clips, audio, RATE, {"num_steps": 50}, Timings(denoise_seconds=1.0))
    page_file, _ = made.write(tmp_path)
    page = Page()
    page.feed(page_file.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.tags.count("audio") == page.tags.count("img") == len(HOSTILE)
    assert len(set(page.sources)) == 3 * len(HOSTILE)
    assert all((tmp_path / source).is_file() and "/" not in source for source in page.sources)
    sidecars = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(tmp_path.glob("*.json"))]
    assert [sidecar["prompt"] for sidecar in sidecars] == HOSTILE
    assert sidecars[0]["settings"] == {"num_steps": 50}
    assert sidecars[-1]["gain_db"] < 0
    assert {file.stem for file in tmp_path.glob("*.wav")} == {file.stem for file in tmp_path.glob("*.json")}
    assert len(list(tmp_path.iterdir())) == 3 * len(HOSTILE) + 2


def test_a_card_can_be_put_on_the_page_above():
    card = Card("rain", "a.wav", "a.png", "a.json", "1.00 s").inside("folder")
    assert (card.audio_file, card.image_file, card.sidecar_file) == ("folder/a.wav", "folder/a.png", "folder/a.json")
    assert card.prompt == "rain"
