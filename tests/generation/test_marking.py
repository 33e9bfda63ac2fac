"""What a generated file says of its origin: its tags, in every format, and its watermark."""

import json
import runpy
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from omegaconf import OmegaConf

from foley.cli.main import Verb
from foley.core.config import PROJECT_ROOT
from foley.data.audio import FORMATS, encode_audio, read_tags, write_wav
from foley.data.ordering import evenly_spaced
from foley.generation import marking
from foley.generation.comparison import write_comparison
from foley.generation.marking import Marks, detect, origin_tags, read_origin, require_watermark, watermarked
from foley.generation.options import MAX_PROMPT_CHARACTERS
from foley.generation.prompts import Clip, read_prompts
from foley.generation.result import Generation, Timings
from foley.generation.settings import GenerationSettings

RATE = 24000
PROMPT = 'a dog barks, "twice"\nein Hünd bellt 犬'
SETTINGS = {"provenance": True, "model_hash": "ab" * 32, "num_steps": 2}


class LoudNetwork:
    """Stands for the network: adds a tone of 1 kHz, and is as sure of a watermark as there is of that tone."""

    def _tone(self, length):
        return 0.01 * np.sin(2 * np.pi * 1000 * np.arange(length) / marking._NETWORK_HZ).astype(np.float32)

    def apply_watermark(self, samples, sample_rate):
        assert sample_rate == marking._NETWORK_HZ
        return (samples + self._tone(len(samples)))[:-7]  # as its spectrogram ends where it ends

    def get_watermark(self, samples, sample_rate, round):
        if not samples.any():
            return np.float32("nan")
        tone = self._tone(len(samples))
        return np.float32(min(1.0, abs(samples @ tone) / (tone @ tone)))


@pytest.fixture
def loud_network(monkeypatch):
    monkeypatch.setattr(marking, "_network", LoudNetwork)
    monkeypatch.setattr(marking, "can_watermark", lambda: True)


@pytest.fixture
def audio():
    return 0.1 * torch.randn(1, 1, RATE // 2, generator=torch.Generator().manual_seed(0))


def made(audio, **settings):
    return Generation([Clip(PROMPT, seed=7)], audio, RATE, {**SETTINGS, **settings}, Timings())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_brings_its_origin_back(tmp_path, audio, name):
    (tmp_path / f"clip.{name}").write_bytes(made(audio).encode(0, name))
    origin = read_origin(tmp_path / f"clip.{name}")
    assert origin == {"software": marking.SOFTWARE, "model_hash": "ab" * 32, "prompt": PROMPT, "seed": 7}
    assert soundfile.info(tmp_path / f"clip.{name}").samplerate == RATE


def test_the_written_wav_says_what_made_it_and_its_samples_are_the_same(tmp_path, audio):
    for folder, provenance in (("with", True), ("without", False)):
        made(audio, provenance=provenance).write_clip(tmp_path / folder, 0, 0)
    [tagged], [plain] = ((tmp_path / folder).glob("*.wav") for folder in ("with", "without"))
    np.testing.assert_array_equal(*(soundfile.read(file, dtype="int16")[0] for file in (tagged, plain)))
    assert b"LIST" in tagged.read_bytes()
    assert b"LIST" not in plain.read_bytes()
    assert read_origin(tagged)["seed"] == 7
    assert read_origin(plain) is None
    assert read_tags(tagged)["title"] == 'a dog barks, "twice" ein Hünd bellt 犬'


def test_the_same_clip_is_the_same_file(audio):
    assert made(audio).encode(0) == made(audio).encode(0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("character", ["a", "🐕"])
def test_of_the_longest_prompt_the_beginning_travels(tmp_path, audio, name, character):
    clip = Clip(character * MAX_PROMPT_CHARACTERS)
    (tmp_path / "clip").write_bytes(Generation([clip], audio, RATE, SETTINGS, Timings()).encode(0, name))
    origin = read_origin(tmp_path / "clip")
    assert origin["prompt_is_cut"]
    assert len(origin["prompt"]) > 100
    assert clip.prompt.startswith(origin["prompt"])


@pytest.mark.parametrize("comment", ["", "recorded at home", "[1, 2]", '{"software": "another"}', "{" * 9000])
def test_tags_of_others_are_no_origin(tmp_path, comment):
    write_wav(tmp_path / "clip.wav", torch.zeros(100), RATE, tags={"comment": comment} if comment else {})
    assert read_origin(tmp_path / "clip.wav") is None


def test_formats_of_few_rates_are_resampled_to_the_next_above(tmp_path):
    for name, rate, stored in (("mp3", 2000, 8000), ("opus", 44100, 48000), ("mp3", 96000, 48000), ("ogg", 2000, 2000)):
        (tmp_path / "clip").write_bytes(encode_audio(0.1 * torch.randn(2, 2 * rate), rate, name))
        info = soundfile.info(tmp_path / "clip")
        assert (info.samplerate, info.channels) == (stored, 2)
        assert info.duration == pytest.approx(2.0, abs=0.1)
    with pytest.raises(ValueError, match=r"format='aac': give wav, flac, ogg, opus, mp3"):
        encode_audio(torch.zeros(10), RATE, "aac")


def test_only_wav_exceeds_full_scale(tmp_path):
    for name, peak in (("wav", 2.0), ("flac", 1.0)):
        (tmp_path / "clip").write_bytes(encode_audio(torch.full((100,), 2.0), RATE, name, peak_ceiling=float("inf")))
        assert np.abs(soundfile.read(tmp_path / "clip")[0]).max() == pytest.approx(peak, abs=1e-4)


def test_settings_say_what_is_marked(monkeypatch, audio):
    monkeypatch.setattr(marking, "can_watermark", lambda: False)
    with pytest.raises(
        ModuleNotFoundError, match=r"watermark=true wants resemble-perth: pip install 'foley\[watermark\]'"
    ):
        GenerationSettings(watermark=True)
    settings = GenerationSettings()
    assert settings.finish(audio, RATE) is audio
    assert settings.describe(settings.choose_guidance(), "ddim", 2)["provenance"] is True
    assert origin_tags("rain", 0, {}) == {}


@pytest.mark.parametrize(("provenance", "said"), [(True, "yes"), (False, "no")])
def test_the_page_says_of_both_whether_they_are_there(tmp_path, audio, provenance, said):
    settings = GenerationSettings(provenance=provenance)
    chosen = settings.describe(settings.choose_guidance(), "ddim", 2)
    page, _ = made(audio, **chosen).write(tmp_path / "one")
    both = write_comparison(tmp_path, "two", "facts.", {"a": made(audio, **chosen)}, {"a": "a"})
    assert f"<dt>origin in the tags of each file</dt><dd>{said}</dd>" in page.read_text()
    assert "<dt>inaudible watermark</dt><dd>no</dd>" in page.read_text()
    assert f"facts. Origin in the tags of each file: {said}. Inaudible watermark: no.</p>" in both.read_text()
    marked, _ = made(audio, **{**chosen, "watermark": marking.WATERMARK}).write(tmp_path / "marked")
    assert "<dt>inaudible watermark</dt><dd>resemble-perth</dd>" in marked.read_text()


@pytest.mark.usefixtures("loud_network")
@pytest.mark.parametrize("rate", [8000, 24000, 32000, 44100])
def test_what_the_network_adds_comes_at_the_rate_of_the_audio(rate):
    audio = 0.1 * torch.randn(2, 2, rate, generator=torch.Generator().manual_seed(1))
    audio[1, 1] = 0  # silence stays silent
    added = watermarked(audio, rate) - audio
    tone = 0.01 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)
    np.testing.assert_allclose(added[0, 0, 100:-100], tone[100:-100], atol=2e-4)
    torch.testing.assert_close(added[0, 0], added[0, 1])
    assert not added[1, 1].any()


@pytest.mark.usefixtures("loud_network")
def test_a_settings_watermark_is_in_audio_and_tags_and_is_found(tmp_path):
    settings = GenerationSettings(watermark=True)
    quiet = 1e-4 * torch.randn(1, 1, RATE, generator=torch.Generator().manual_seed(2))
    described = settings.describe(settings.choose_guidance(), "ddim", 2)
    marked = made(settings.finish(quiet, RATE), **described)
    for name, generation in (("marked.wav", marked), ("plain.wav", made(quiet))):
        (tmp_path / name).write_bytes(generation.encode(0))
    found = detect(tmp_path / "marked.wav")
    assert found.watermarked
    assert found.origin["watermark"] == "resemble-perth"
    assert not detect(tmp_path / "plain.wav").watermarked
    write_wav(tmp_path / "silent.wav", torch.zeros(RATE), RATE)
    assert detect(tmp_path / "silent.wav") == Marks(None, None)


def test_without_the_package_tags_are_read_and_the_command_says_so(tmp_path, audio, monkeypatch, caplog):
    monkeypatch.setattr(marking, "can_watermark", lambda: False)
    made(audio).write_clip(tmp_path, 0, 0)
    write_wav(tmp_path / "other.wav", torch.zeros(100), RATE)
    main = runpy.run_path(str(PROJECT_ROOT / "scripts/detect.py"))["main"]
    with caplog.at_level("INFO"):
        main(OmegaConf.create({"file": str(tmp_path), "output": str(tmp_path / "found.json")}))
    assert f"model {'ab' * 32}, seed 7, prompt {PROMPT!r}; no watermark was looked for" in caplog.text
    assert "other.wav: no tags of ours" in caplog.text
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(entry["origin"] is None for entry in found.values()) == [False, True]
    with pytest.raises(ModuleNotFoundError, match="foley"):
        require_watermark()


def test_words_of_a_verb_are_its_options():
    verb = Verb("scripts/push_system.py", words=("system", "repository"))
    assert verb.named(["data/demo", "me/demo", "private=true"]) == [
        "system=data/demo",
        "repository=me/demo",
        "private=true",
    ]
    assert Verb("sample.py").named(["prompt=rain", "rain"]) == ["prompt=rain", "rain"]
    with pytest.raises(SystemExit, match="a b c: give SYSTEM REPOSITORY"):
        verb.named(["a", "b", "c"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_network_finds_its_watermark_in_generated_sounds(tmp_path):
    """Its weights come with the package; the rate is not its own; MP3 keeps it. The page on sharing says this."""
    pytest.importorskip("perth")
    from foley import TextToAudio

    generator = TextToAudio.load(PROJECT_ROOT / "data/demo/student")
    prompts = read_prompts(PROJECT_ROOT / "data/prompts/demo.jsonl")
    prompts = [prompts[index] for index in evenly_spaced(len(prompts), 16)]
    plain, marked = (generator.generate(prompts, watermark=watermark) for watermark in (False, True))
    assert marked.audio.shape == plain.audio.shape
    found = Counter()
    for row in range(len(prompts)):
        for generation, kind in ((plain, "wav"), (marked, "wav"), (marked, "mp3")):
            (tmp_path / "clip").write_bytes(generation.encode(row, kind))
            found["plain" if generation is plain else kind] += detect(tmp_path / "clip").watermarked
    assert found["plain"] == 0
    assert found["wav"] == 11
    assert found["mp3"] >= 11
