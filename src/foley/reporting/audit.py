"""An audit as a table on the console, as JSON, and as a page of the clips that have findings, the worst first."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from foley.core.files import json_lines, write_json, write_text
from foley.core.remote import url_of
from foley.data.audio import AudioError, read_channels
from foley.metrics.audit import FINDINGS, Audit, AuditedClip, in_words
from foley.metrics.loudness import SHORTEST_SECONDS
from foley.reporting.plots import draw_spectrogram, waveform_outline
from foley.reporting.samples import PAGE_FILE, Card, render_page

REPORT_FILE, ROWS_FILE = "audit.json", "clips.jsonl"
_PICTURES = "spectrograms"
_SHOWN_SECONDS = 30.0  # of a clip on the page
_NAMED = 3

# Measurements that explain a finding, as a format of a clip's row.
_EVIDENCE = {
    "unreadable": "{reason}",
    "not_finite": "{reason}",
    "silent": "peak {peak_dbfs} dBFS",
    "clipping": "{clipped_runs} runs at full scale, {flat_tops} flat tops",
    "click_start": "jump of {start_jump_db} dB at the start",
    "click_end": "jump of {end_jump_db} dB at the end",
    "click_inside": "{clicks_inside} inside",
    "dc_offset": "offset {dc_offset}",
    "true_peak": "{true_peak_dbtp} dBTP",
    "antiphase": "correlation {correlation}",
    "silent_channel": "{silent_channels} of {channels} channels",
    "band_limited": "{cutoff_drop_db} dB less above {cutoff_hz:g} Hz",
    "repeat": "of {repeat[of]}",
    "loop": "every {loop_seconds} s",
    "leading_silence": "{leading_silence_seconds} s",
    "trailing_silence": "{trailing_silence_seconds} s",
    "mostly_silent": "{silent_share:.0%}",
    "mono_as_stereo": "correlation {correlation}",
    "too_quiet": "{loudness_lufs} LUFS",
    "too_loud": "{loudness_lufs} LUFS",
}


def describe_findings(clip: AuditedClip) -> str:
    """The findings of a clip, each with what was measured.

    >>> describe_findings(AuditedClip("a.wav", ("too_loud",), {"loudness_lufs": -2.5}))
    'too loud (-2.5 LUFS)'
    """
    row: dict[str, Any] = dict(clip.measured)
    return "; ".join(f"{name.replace('_', ' ')} ({_EVIDENCE[name].format(**row)})" for name in clip.findings)


def show_audit(audit: Audit, console: Console | None = None) -> None:
    """Draw the counts on the console, with the first clips of each finding."""
    table = Table("finding", "what it is", "clips", "share", "such as", title=f"{len(audit.clips)} clips")
    for name, count in audit.counts.items():
        first = [clip.name for clip in audit.clips if name in clip.findings][:_NAMED]
        table.add_row(name, FINDINGS[name], str(count), f"{count / len(audit.clips):.1%}", "\n".join(first))
    console = console or Console()
    console.print(table)
    console.print(in_words(audit.summary()), markup=False, highlight=False)
    if short := audit.num_without_loudness:
        why = f"shorter than {SHORTEST_SECONDS:g} s, below its gate, or of too many channels"
        console.print(f"{short} of {len(audit.clips)} clips have no loudness: {why}", highlight=False)


def write_audit(
    audit: Audit, files: Sequence[Path], directory: Path, facts: Mapping[str, Any], most_shown: int
) -> None:
    """Write `audit.json` (counts), `clips.jsonl` (a row a clip) and `index.html` into `directory`.

    Args:
        files: of the clips, in their order; the page plays them where they lie.
        facts: what else the JSON is to say: the source, the limits.
        most_shown: clips on the page.
    """
    write_json(directory / REPORT_FILE, {**audit.summary(), **facts})
    with json_lines(directory / ROWS_FILE) as write:
        for clip in audit.clips:
            write(clip.to_json())
    places = {clip.name: file for clip, file in zip(audit.clips, files, strict=True)}
    shown = audit.worst(most_shown)
    cards = [_draw_card(clip, places[clip.name], directory, number) for number, clip in enumerate(shown)]
    less = f", the worst {len(shown)} shown" if len(shown) < audit.num_found else ""
    title = f"Audit: {audit.num_found} of {len(audit.clips)} clips have findings{less}"
    write_text(directory / PAGE_FILE, render_page(title, audit.counts, cards))


def _draw_card(clip: AuditedClip, file: Path, directory: Path, number: int) -> Card:
    """The card of a clip; without a picture where the file cannot be read."""
    heard = file if url_of(file) else Path(os.path.relpath(file, directory))
    image, found = f"{_PICTURES}/{number:04d}.png", describe_findings(clip)
    try:
        samples, rate = read_channels(file, _SHOWN_SECONDS)
    except AudioError:
        return Card(clip.name, str(heard), "", ROWS_FILE, found, link="measurements")
    audio = torch.from_numpy(samples).T
    draw_spectrogram(directory / image, audio, rate)
    return Card(clip.name, str(heard), image, ROWS_FILE, found, waveform_outline(audio), "measurements")
