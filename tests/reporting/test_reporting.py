import json
from html.parser import HTMLParser

import pytest
import soundfile
import torch
from matplotlib.image import imread

from foley.core.files import sample_stem, slug
from foley.data.audio import PEAK_CEILING, write_wav
from foley.generation.prompts import Clip
from foley.generation.result import Generation, Timings
from foley.reporting.plots import draw_sheet, draw_spectrogram, log_mel, waveform_outline
from foley.reporting.samples import Card, count_sounds, render_comparison, render_page
from foley.reporting.words import describe_settings

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


SETTINGS = {
    "num_steps": 50,
    "duration_seconds": 5.0,
    "sample_rate_hz": 24000,
    "mac_speedup": 4.415783759499831,
    "macs": 22148736000,
    "negative_prompt": "",
    "compile": False,
    "model_hash": "ab" * 32,
    "accelerator": {
        "_target_": "foley.accel.caching.audiocache.AudioCache",
        "threshold": 0.30000000000000004,
        "calibration_dir": {"_target_": "foley.accel.caching.calibration.calibration_directory"},
    },
    "ckpt": "/home/someone/systems/demo",
    "model": None,
}


def test_settings_are_told_in_words():
    assert [(fact.name, fact.text) for fact in describe_settings(SETTINGS)] == [
        ("steps", "50"),
        ("duration", "5 s"),
        ("sample rate", "24 kHz"),
        ("speed-up in multiply-accumulates", "4.42x"),
        ("multiply-accumulates", "22.1 G"),
        ("model hash", "abababababab…"),
        ("accelerator", "AudioCache, threshold 0.3"),
        ("system", "demo"),
    ]


def test_a_page_of_one_clip_dumps_no_settings(tmp_path):
    Generation([Clip("rain", 0)], tone(0.3, 0.1)[None, None], RATE, SETTINGS, Timings()).write(tmp_path)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>1 generated sound</h1>" in text
    assert not any(raw in text for raw in ("_target_", "4.4157", "/home/someone", "num_steps"))
    assert text.count("ab" * 32) == 2  # to copy, and as the title of its beginning
    assert '<code title="' in text
    assert "prefers-color-scheme: dark" in text
    assert "data-scheme" in text
    assert '<path d="M0.000,' in text


def test_a_long_page_is_split_and_loads_as_it_is_scrolled():
    cards = [Card(str(n), f"{n}.wav", f"{n}.png", f"{n}.json", "1.00 s") for n in range(300)]
    page = Page()
    page.feed(text := render_page(count_sounds(300), {}, cards))
    assert page.tags.count("section") == 7
    assert [source for source in page.sources if source.startswith("#")] == [
        "#1",
        *(f"#{48 * n + 1}" for n in range(1, 7)),
    ]
    assert text.count('loading="lazy"') == text.count('preload="none"') == page.tags.count("figure") == 300


def test_pages_refer_to_nothing_outside_their_folder(tmp_path):
    cards = [Card("rain", "a.wav", "a.png", "a.json", "1.00 s")]
    for text in (render_page("one", SETTINGS, cards), render_comparison("two", "facts", {"a\n1 s": cards, "b": cards})):
        assert "//" not in text
        assert "@import" not in text


def test_a_comparison_has_a_row_for_each_prompt_and_names_its_columns():
    columns = {
        name: [Card(prompt, f"{n}.wav", "", "", "") for n, prompt in enumerate(("rain", "<wind>"))]
        for name in ("uncached\n10 s", "cached\n3 s, 3.3x")
    }
    page = Page()
    page.feed(text := render_comparison("two ways", "facts", columns))
    assert page.tags.count("section") == 2
    assert text.index(">rain<") < text.index(">&lt;wind&gt;<")
    assert text.count("<figcaption>uncached\n") == text.count("<figcaption>cached\n") == 2
    assert "<p>cached\n3 s, 3.3x</p>" in text


def test_an_outline_keeps_every_channel_and_stays_inside():
    antiphase = torch.stack([tone(0.5, 0.1), -tone(0.5, 0.1)])
    for audio, low, high in ((antiphase, 0.25, 0.75), (tone(7.0, 0.1), 0.0, 1.0), (torch.zeros(3), 0.5, 0.5)):
        heights = [float(point.split(",")[1]) for point in waveform_outline(audio)[1:-1].split("L")]
        assert (min(heights), max(heights)) == pytest.approx((low, high), abs=0.01)


def test_a_long_recording_has_a_spectrogram_of_bounded_width(tmp_path):
    draw_spectrogram(tmp_path / "long.png", tone(0.5, 30.0), RATE)
    assert imread(tmp_path / "long.png").shape[:2] == (96, 1000)


def test_a_card_can_be_put_on_the_page_above():
    card = Card("rain", "a.wav", "a.png", "a.json", "1.00 s").inside("folder")
    assert (card.audio_file, card.image_file, card.sidecar_file) == ("folder/a.wav", "folder/a.png", "folder/a.json")
    assert card.prompt == "rain"
