"""Cards and pages that show generated clips."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from foley.core.files import one_line
from foley.reporting.plots import draw_spectrogram

SHEET_FILE = "spectrograms.png"
PAGE_FILE = "index.html"
MAX_SHEET_CLIPS = 24
"""A larger folder has a sheet of evenly spread clips."""
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


def draw_card(directory: Path, stem: str, prompt: str, seed: int, audio: Tensor, sample_rate_hz: int) -> Card:
    """Draw the spectrogram of a clip, `[T]` or `[channels, T]`, beside its WAV and JSON; returns its card."""
    draw_spectrogram(directory / f"{stem}.png", audio, sample_rate_hz)
    facts = f"{audio.shape[-1] / sample_rate_hz:.2f} s · seed {seed}"
    return Card(one_line(prompt), f"{stem}.wav", f"{stem}.png", f"{stem}.json", facts)
