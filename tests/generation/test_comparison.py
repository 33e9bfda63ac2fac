"""The demo's prompts with and without acceleration: `python sample.py accel=...` with nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from small_system import CONFIGS, STEPS, CountingAccelerator

from foley.accel.caching.fora import Fora
from foley.generation.comparison import compare, compare_with_uncached, heading, spectral_convergence
from foley.generation.prompts import Clip
from foley.generation.settings import GenerationSettings
from foley.generation.text_to_audio import TextToAudio
from foley.system.system import build_system

CLIPS = [Clip("rain", 3), Clip("wind", 4)]


@pytest.fixture(scope="module")
def generator():
    return TextToAudio(replace(build_system(CONFIGS), trained_seconds=0.5))


def test_one_page_shows_both_ways_beside_each_other(generator, tmp_path, caplog):
    caplog.set_level("INFO")
    page = compare_with_uncached(generator, CLIPS, GenerationSettings(**STEPS, accelerator=Fora(4)), tmp_path)
    rows = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert list(rows)[:2] == ["no acceleration", "Fora"]
    (fewer,) = list(rows)[2:]
    assert fewer.startswith("fewer steps, ")
    assert 0 < rows[fewer]["tmacs"] < rows["no acceleration"]["tmacs"]
    assert rows["no acceleration"]["speedup"] == 1
    assert rows["no acceleration"]["spectral_convergence"] == 0
    assert rows["Fora"]["real_time_factor"] == pytest.approx(rows["Fora"]["seconds"] / 1.0)  # two clips of 0.5 s
    assert 0 < rows["Fora"]["tmacs"] < rows["no acceleration"]["tmacs"]
    html = page.read_text(encoding="utf-8")
    for folder in ("no-acceleration", "fora"):
        names = sorted(file.name for file in (tmp_path / folder).glob("*.wav"))
        assert names == ["000_rain_seed3.wav", "001_wind_seed4.wav"]  # the same seeds
        assert all(f"{folder}/{name}" in html for name in names)
    assert any("speed-up" in record.getMessage() and "Fora" in record.getMessage() for record in caplog.records)


def test_an_accelerator_that_changes_nothing_is_at_no_distance(generator, tmp_path):
    settings = GenerationSettings(**STEPS, accelerator=CountingAccelerator())
    compare_with_uncached(generator, CLIPS, settings, tmp_path)
    rows = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert rows["CountingAccelerator"]["spectral_convergence"] == 0


def test_clips_of_an_earlier_comparison_are_removed(generator, tmp_path):
    settings = GenerationSettings(**STEPS, accelerator=Fora(4))
    for clips in (CLIPS, CLIPS[:1]):
        compare_with_uncached(generator, clips, settings, tmp_path)
    assert [file.name for file in (tmp_path / "fora").glob("*.wav")] == ["000_rain_seed3.wav"]


def test_spectral_convergence_is_the_relative_distance_of_magnitudes():
    audio = torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0))
    assert spectral_convergence(audio, audio) == spectral_convergence(-audio, audio) == 0
    assert spectral_convergence(torch.zeros_like(audio), audio) == pytest.approx(1)
    assert spectral_convergence(3 * audio, audio) == pytest.approx(2, rel=1e-5)
    assert spectral_convergence(audio[..., :10], audio[..., :10]) == 0  # shorter than a frame


def test_headings_say_seconds_speedup_and_factor(generator):
    result = generator.generate(["rain"], **STEPS)
    row = compare({"plain": result})["plain"] | {"seconds": 2.0, "speedup": 1.5, "real_time_factor": 0.25}
    assert heading("plain", row, "label accuracy 90%") == "plain\n2.0 s, 1.5x, RTF 0.25, label accuracy 90%"
    assert heading("plain", row | {"tmacs": 0.5}) == "plain\n0.5 TMACs, 2.0 s, 1.5x, RTF 0.25"


def test_the_clips_of_a_generation_cost_what_one_costs_each(generator):
    assert generator.generate(["rain"], **STEPS).tmacs is None  # nobody looked on
    one, two = (generator.generate(names, **STEPS, accelerator=Fora(4)) for names in (["rain"], ["rain", "rain"]))
    assert one.tmacs == one.settings["macs"] / 1e12
    assert two.tmacs == pytest.approx(2 * one.tmacs)
