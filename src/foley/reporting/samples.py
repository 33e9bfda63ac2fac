"""A folder of generated clips: WAV and JSON for each, a sheet of spectrograms, and a page to listen on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log10
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor, from_numpy

from foley.files import write_json, write_text
from foley.reporting.audio_files import PEAK_CEILING, write_wav
from foley.reporting.html import Card, render_page
from foley.reporting.names import one_line, sample_stem
from foley.reporting.spectrogram import draw_sheet, draw_spectrogram

SHEET_FILE = "spectrograms.png"
PAGE_FILE = "index.html"
MAX_SHEET_CLIPS = 24
"""A larger folder has a sheet of evenly spread clips."""


@dataclass(frozen=True)
class Sample:
    """One clip: `audio` `[T]` or `[channels, T]`; `notes`, such as a label, go into its JSON."""

    prompt: str
    seed: int
    audio: Tensor
    notes: Mapping[str, str] = field(default_factory=dict)


def write_samples(
    directory: Path,
    samples: Sequence[Sample],
    sample_rate_hz: int,
    settings: Mapping[str, Any],
    timings: Mapping[str, float],
    title: str | None = None,
    peak_ceiling: float = PEAK_CEILING,
) -> tuple[Path, list[Card]]:
    """Write everything into `directory`; returns the page and the cards on it.

    Louder clips than `peak_ceiling` are attenuated to it; each JSON states the gain. `settings` and `timings`
    (seconds for all samples together) are the same for all.
    """
    common = {"settings": dict(settings), "timings_of_all_samples": dict(timings), "num_samples": len(samples)}
    cards = []
    for index, sample in enumerate(samples):
        stem = sample_stem(sample.prompt, index, sample.seed)
        write_sample(directory, stem, sample, sample_rate_hz, {"index": index, **common}, peak_ceiling)
        cards.append(_draw_card(directory, stem, sample, sample_rate_hz))
    shown = samples[:: ceil(len(samples) / MAX_SHEET_CLIPS)]
    clips, titles = [sample.audio for sample in shown], [sample.prompt for sample in shown]
    draw_sheet(directory / SHEET_FILE, clips, titles, sample_rate_hz)
    page = directory / PAGE_FILE
    write_text(page, render_page(title or f"{len(samples)} generated sounds", settings, cards))
    return page, cards


def write_sample(
    directory: Path,
    stem: str,
    sample: Sample,
    sample_rate_hz: int,
    facts: Mapping[str, Any],
    peak_ceiling: float = PEAK_CEILING,
) -> None:
    """Write one clip's WAV and then its JSON, which also holds `facts`: where there is a JSON, the clip is whole."""
    gain = write_wav(directory / f"{stem}.wav", sample.audio, sample_rate_hz, peak_ceiling)
    described = {"prompt": sample.prompt, "seed": sample.seed, "gain_db": round(20 * log10(gain), 3)}
    write_json(directory / f"{stem}.json", {**described, **sample.notes, **facts})


def write_overview(directory: Path, stems: Sequence[str], title: str) -> Path:
    """The page of clips that `write_sample` wrote, or of evenly spread ones where there are many; returns it."""
    shown = stems[:: ceil(len(stems) / MAX_SHEET_CLIPS)]
    cards = []
    for stem in shown:
        facts = json.loads((directory / f"{stem}.json").read_text(encoding="utf-8"))
        samples, rate = soundfile.read(directory / f"{stem}.wav", dtype="float32", always_2d=True)
        cards.append(_draw_card(directory, stem, Sample(facts["prompt"], facts["seed"], from_numpy(samples.T)), rate))
    page = directory / PAGE_FILE
    write_text(page, render_page(title, facts["settings"], cards))
    return page


def _draw_card(directory: Path, stem: str, sample: Sample, sample_rate_hz: int) -> Card:
    draw_spectrogram(directory / f"{stem}.png", sample.audio, sample_rate_hz)
    facts = f"{sample.audio.shape[-1] / sample_rate_hz:.2f} s · seed {sample.seed}"
    return Card(one_line(sample.prompt), f"{stem}.wav", f"{stem}.png", f"{stem}.json", facts)
