"""A folder of generated clips: WAV and JSON for each, a sheet of spectrograms, and a page to listen on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, log10
from pathlib import Path
from typing import Any

from torch import Tensor

from foley.checkpoint import write_json, write_text
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
    directory.mkdir(parents=True, exist_ok=True)
    common = {"settings": dict(settings), "timings_of_all_samples": dict(timings), "num_samples": len(samples)}
    cards = [
        _write_sample(directory, index, sample, sample_rate_hz, common, peak_ceiling)
        for index, sample in enumerate(samples)
    ]
    shown = samples[:: ceil(len(samples) / MAX_SHEET_CLIPS)]
    clips, titles = [sample.audio for sample in shown], [sample.prompt for sample in shown]
    draw_sheet(directory / SHEET_FILE, clips, titles, sample_rate_hz)
    page = directory / PAGE_FILE
    write_text(page, render_page(title or f"{len(samples)} generated sounds", settings, cards))
    return page, cards


def _write_sample(
    directory: Path,
    index: int,
    sample: Sample,
    sample_rate_hz: int,
    common: Mapping[str, Any],
    peak_ceiling: float,
) -> Card:
    stem = sample_stem(sample.prompt, index, sample.seed)
    gain = write_wav(directory / f"{stem}.wav", sample.audio, sample_rate_hz, peak_ceiling)
    draw_spectrogram(directory / f"{stem}.png", sample.audio, sample_rate_hz)
    sidecar = {
        "index": index,
        "prompt": sample.prompt,
        "seed": sample.seed,
        "gain_db": round(20 * log10(gain), 3),
        **sample.notes,
        **common,
    }
    write_json(directory / f"{stem}.json", sidecar)
    facts = f"{sample.audio.shape[-1] / sample_rate_hz:.2f} s · seed {sample.seed}"
    return Card(one_line(sample.prompt), f"{stem}.wav", f"{stem}.png", f"{stem}.json", facts)
