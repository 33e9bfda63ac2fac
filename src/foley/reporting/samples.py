"""Cards and pages that show generated clips; a page refers to nothing but the files beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from torch import Tensor

from foley.core.files import one_line
from foley.metrics.latency import RealTimeFactor
from foley.reporting.pages import read_asset
from foley.reporting.plots import draw_spectrogram, waveform_outline
from foley.reporting.words import Fact, describe_settings

SHEET_FILE = "spectrograms.png"
PAGE_FILE = "index.html"
MAX_SHEET_CLIPS = 24
"""A larger folder has a sheet of evenly spread clips."""
_CLIPS_A_PART = 48  # of a page, with a link to each part

_SWITCH = (
    "const root = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)').matches; "
    "root.dataset.scheme = (root.dataset.scheme || (dark ? 'dark' : 'light')) == 'dark' ? 'light' : 'dark'"
)
_COPY = "navigator.clipboard.writeText(this.dataset.copy).then(() => this.textContent = 'copied')"


@dataclass(frozen=True)
class Card:
    """One clip on the page; the file names are relative to the page.

    `waveform` is its outline, as `foley.reporting.plots.waveform_outline` draws it; `link` is what the page calls the
    sidecar. A clip that cannot be drawn has no image.
    """

    prompt: str
    audio_file: str
    image_file: str
    sidecar_file: str
    facts: str
    waveform: str = ""
    link: str = "settings"

    def inside(self, folder: str) -> "Card":
        """The card for a page that lies beside `folder`, which holds the files."""
        files = {"audio_file": self.audio_file, "image_file": self.image_file, "sidecar_file": self.sidecar_file}
        return replace(self, **{field: f"{folder}/{file}" for field, file in files.items()})


def count_sounds(count: int, shown: range | None = None) -> str:
    """The title of a page, which says which of the clips it shows, where it is one of several.

    >>> count_sounds(1), count_sounds(24), count_sounds(4000, range(1000, 2000))
    ('1 generated sound', '24 generated sounds', '4000 generated sounds, 1001 to 2000')
    """
    title = f"{count} generated sound{'' if count == 1 else 's'}"
    return title if shown is None or len(shown) == count else f"{title}, {_span(shown)}"


def page_file(number: int) -> str:
    """Of the pages of a large set, the first of which is number 0.

    >>> page_file(0), page_file(12)
    ('index.html', 'index_0012.html')
    """
    return f"index_{number:04d}.html" if number else PAGE_FILE


def render_page(
    title: str,
    settings: Mapping[str, Any],
    cards: Sequence[Card],
    pages: Sequence[range] = (),
    number: int = 0,
    rtf: RealTimeFactor | None = None,
) -> str:
    """A page of clips under their `settings` in words; many clips are split into parts that load as they are seen.

    Args:
        pages: of a set that has several pages, which clips each of them shows, to link them; this one is `number`.
        rtf: of the clips on the page.
    """
    first = pages[number].start if pages else 0
    chunks = [cards[start : start + _CLIPS_A_PART] for start in range(0, len(cards), _CLIPS_A_PART)]
    ends = accumulate(map(len, chunks), initial=first)
    parts = [(range(start, start + len(chunk)), chunk) for start, chunk in zip(ends, chunks, strict=False)]
    others = [f'<a href="{page_file(i)}">{_span(shown)}</a>' for i, shown in enumerate(pages) if i != number]
    links = [f'<a href="#{shown.start + 1}">{_span(shown)}</a>' for shown, _ in parts]
    body = f"<nav>{''.join(others)}</nav>\n" if others else ""
    body += f"<nav>{''.join(links)}</nav>\n" if len(parts) > 1 else ""
    sections = [f'<section id="{shown.start + 1}">{_grid(map(_render_card, part))}</section>' for shown, part in parts]
    speed = [] if rtf is None else [Fact("RTF", rtf.in_words())]
    return _document(title, _fact_list([*speed, *describe_settings(settings)]), body + "\n".join(sections))


def _span(shown: range) -> str:
    return f"{shown.start + 1} to {shown.stop}"


def render_comparison(title: str, facts: str, columns: Mapping[str, Sequence[Card]]) -> str:
    """A page that shows the same clips made in several ways, the columns, side by side, a row for each prompt.

    Args:
        columns: heading to the clips in the same order; the first line of a heading is its name.
    """
    heads = "".join(f"<p>{escape(heading)}</p>" for heading in columns)
    names = [heading.partition("\n")[0] for heading in columns]
    rows = "\n".join(_comparison_row(names, row) for row in zip(*columns.values(), strict=True))
    style = _column_style(len(names))
    return _document(title, f"<p>{escape(facts)}</p>", f'<div class="grid columns heads"{style}>{heads}</div>\n{rows}')


def _comparison_row(names: Sequence[str], cards: Sequence[Card]) -> str:
    shown = [_render_card(card, name) for name, card in zip(names, cards, strict=True)]
    return f"<section><h2>{_prompt(cards[0])}</h2>{_grid(shown, len(names))}</section>"


def _column_style(count: int) -> str:
    return f' style="grid-template-columns: repeat({count}, minmax(0, 1fr))"'


def _grid(figures: Iterator[str] | Sequence[str], columns: int | None = None) -> str:
    kind, style = (" columns", _column_style(columns)) if columns else ("", "")
    return "\n".join(chain([f'<div class="grid{kind}"{style}>'], figures, ["</div>"]))


def _fact_list(facts: Sequence[Fact]) -> str:
    rows = [f"<div><dt>{escape(fact.name)}</dt><dd>{_value(fact)}</dd></div>" for fact in facts]
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _value(fact: Fact) -> str:
    if not fact.whole:
        return escape(fact.text)
    whole = escape(fact.whole)
    copy = f'<button type="button" data-copy="{whole}" onclick="{_COPY}">copy</button>'
    return f'<code title="{whole}">{escape(fact.text)}</code> {copy}'


def _document(title: str, facts: str, body: str) -> str:
    """A complete HTML document."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{read_asset("page.css", "samples.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><button type="button" onclick="{_SWITCH}">light / dark</button></header>
{facts}
{body}
</body>
</html>
"""


def _prompt(card: Card) -> str:
    return escape(card.prompt) or "<em>(empty prompt: unconditional)</em>"


def _render_card(card: Card, name: str | None = None) -> str:
    """A figure under the clip's prompt, or under a `name` where the prompt stands above."""
    wave = f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true"><path d="{card.waveform}"/></svg>'
    image = f'<img src="{escape(card.image_file)}" alt="log-mel spectrogram" loading="lazy" decoding="async">'
    return f"""<figure>
{wave if card.waveform else ""}
{image if card.image_file else ""}
<figcaption>{_prompt(card) if name is None else escape(name)}
<small>{escape(card.facts)} · <a href="{escape(card.sidecar_file)}">{escape(card.link)}</a></small>
<audio controls preload="none" src="{escape(card.audio_file)}"></audio>
</figcaption>
</figure>"""


def draw_card(directory: Path, stem: str, prompt: str, seed: int, audio: Tensor, sample_rate_hz: int) -> Card:
    """Draw the spectrogram of a clip, `[T]` or `[channels, T]`, beside its WAV and JSON; returns its card.

    One that is younger than the WAV is that of the clip already.
    """
    image, wave = directory / f"{stem}.png", directory / f"{stem}.wav"
    if not (image.is_file() and wave.is_file() and image.stat().st_mtime_ns > wave.stat().st_mtime_ns):
        draw_spectrogram(image, audio, sample_rate_hz)
    facts = f"{audio.shape[-1] / sample_rate_hz:.2f} s · seed {seed}"
    return Card(one_line(prompt), f"{stem}.wav", f"{stem}.png", f"{stem}.json", facts, waveform_outline(audio))
