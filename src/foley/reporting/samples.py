"""A folder of generated clips: file names, WAV and JSON, spectrograms, and the page that shows them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from math import ceil, log10
from pathlib import Path
from typing import Any

import soundfile
from torch import Tensor, from_numpy

from foley.core.files import one_line, sample_stem, write_json, write_text
from foley.data.audio import PEAK_CEILING, write_wav
from foley.reporting.plots import draw_sheet, draw_spectrogram

_STYLE = """
:root { color-scheme: dark; }
body { margin: 0 auto; padding: 2rem 1.5rem; max-width: 76rem; background: #0f1117; color: #e8e8ea;
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: 1rem; font-weight: 500; margin: 0; white-space: pre-line; }
.settings { color: #9a9ca5; font-size: .85rem; margin: 0 0 1.5rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; background: #181b24; border-radius: .6rem; overflow: hidden; }
figure img { display: block; width: 100%; height: 8rem; object-fit: fill; }
figcaption { padding: .7rem .9rem .9rem; overflow-wrap: anywhere; }
figcaption small { display: block; color: #9a9ca5; margin: .1rem 0 .5rem; }
audio { width: 100%; height: 2.2rem; }
a { color: #f6a56b; }
"""


@dataclass(frozen=True)
class Card:
    """One clip on the page; the file names are relative to the page."""

    prompt: str
    audio_file: str
    image_file: str
    sidecar_file: str
    facts: str

    def inside(self, folder: str) -> "Card":
        """The card for a page that lies beside `folder`, which holds the files."""
        files = {"audio_file": self.audio_file, "image_file": self.image_file, "sidecar_file": self.sidecar_file}
        return replace(self, **{field: f"{folder}/{file}" for field, file in files.items()})


def render_page(title: str, settings: Mapping[str, Any], cards: Sequence[Card]) -> str:
    """A page of clips; it refers to nothing but the files beside it."""
    facts = " · ".join(f"{key} {value}" for key, value in settings.items())
    return _document(title, facts, _grid(cards))


def render_comparison(title: str, facts: str, columns: Mapping[str, Sequence[Card]]) -> str:
    """A page that shows the same clips made in several ways, the columns, side by side."""
    heads = "".join(f"<h2>{escape(name)}</h2>" for name in columns)
    rows = "\n".join(_grid(row, len(columns)) for row in zip(*columns.values(), strict=True))
    return _document(title, facts, f'<div class="grid" style="{_columns(len(columns))}">{heads}</div>\n{rows}')


def _columns(count: int) -> str:
    return f"grid-template-columns: repeat({count}, 1fr); margin-bottom: 1.2rem"


def _grid(cards: Sequence[Card], columns: int | None = None) -> str:
    style = f' style="{_columns(columns)}"' if columns else ""
    body = "\n".join(_render_card(card) for card in cards)
    return f'<div class="grid"{style}>\n{body}\n</div>'


def _document(title: str, facts: str, body: str) -> str:
    """A complete HTML document."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="settings">{escape(facts)}</p>
{body}
</body>
</html>
"""


def _render_card(card: Card) -> str:
    prompt = escape(card.prompt) or "<em>(empty prompt: unconditional)</em>"
    return f"""<figure>
<img src="{escape(card.image_file)}" alt="log-mel spectrogram">
<figcaption>{prompt}
<small>{escape(card.facts)} · <a href="{escape(card.sidecar_file)}">settings</a></small>
<audio controls preload="none" src="{escape(card.audio_file)}"></audio>
</figcaption>
</figure>"""


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
