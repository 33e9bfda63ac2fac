"""Drawings, made without a display: lines of measured series, histograms, and log-mel spectrograms of clips."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor
from torch.nn.functional import adaptive_max_pool1d
from torchaudio.functional import melscale_fbanks

from foley.core.files import one_line
from foley.reporting.fewer_steps import FEWER_STEPS
from foley.reporting.tables import Row, format_cell

_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 6.0, 3.6, 160
_PANEL_WIDTH_INCHES, _PANEL_HEIGHT_INCHES = 5.0, 3.6
_FFT_SAMPLES = 1024
_HOP_SAMPLES = 256
_MEL_BANDS = 96
_DYNAMIC_RANGE_DB = 80.0
_LOWEST_REFERENCE_DB = -40.0
_MAX_TITLE_CHARACTERS = 60
_MAX_IMAGE_COLUMNS = 1000
_BACKGROUND = "#0f1117"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; the folder is made where it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def draw_histogram(
    path: Path, values: Sequence[float], x_label: str, limits: Mapping[float, str], bins: int = 60
) -> None:
    """Counts of `values`, with a line at each of `limits` and what it means in the legend."""
    figure = Figure(figsize=(_WIDTH_INCHES, _HEIGHT_INCHES), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=bins, color="0.7")
    for number, (limit, name) in enumerate(sorted(limits.items())):
        axes.axvline(limit, color=f"C{number}", linewidth=1.2, label=name)
    axes.set(xlabel=x_label, ylabel="clips")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


@dataclass(frozen=True)
class Panel:
    """One pair of axes: `lines` maps a name to its points `(x, y)`."""

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False


def plot_rows(
    rows: Sequence[Row],
    x: str,
    measures: Mapping[str, str],
    line: str,
    path: Path,
    log_x: bool = False,
    x_label: str = "",
    log_y: bool = False,
) -> bool:
    """A panel for each measure that all rows have, with a line for each group of rows; tells whether it drew any.

    Args:
        x: the key of the horizontal axis, whose words are the label unless `x_label` is given.
        measures: keys of vertical axes, and their labels.
        line: the name of a row's line, as a format: "k {k}".
    """
    panels = []
    for measure, title in measures.items():
        if rows and all(row.get(measure) is not None for row in rows):
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in rows:
                lines.setdefault(format_cell(line, row), []).append((row[x], row[measure]))
            panels.append(Panel(x_label or x.replace("_", " "), title, lines, log_x, log_y))
    if panels:
        plot_panels(panels, path)
    return bool(panels)


def plot_panels(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, with a marker at each point; a line has the same colour in all of them.

    That of fewer steps, which others are held against, is black.
    """
    width = _PANEL_WIDTH_INCHES * len(panels)
    figure = Figure(figsize=(width, _PANEL_HEIGHT_INCHES), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            style = {"color": "black", "linewidth": 2.0} if name == FEWER_STEPS else {}
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name, **style)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale=_scale(panel.log_x), yscale=_scale(panel.log_y))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, path)


def _scale(logarithmic: bool) -> str:
    return "log" if logarithmic else "linear"


def log_mel(audio: Tensor, sample_rate_hz: int) -> Tensor:
    """Mel power in dB, `[bands, frames]`, of `audio` `[T]`, or of the mean of its channels `[channels, T]`.

    Clipped 80 dB below the loudest point.
    """
    audio = audio.mean(dim=0) if audio.ndim == 2 else audio
    window = torch.hann_window(_FFT_SAMPLES)
    spectrum = torch.stft(
        audio.float().cpu(), _FFT_SAMPLES, _HOP_SAMPLES, window=window, pad_mode="constant", return_complex=True
    )
    bins = _FFT_SAMPLES // 2 + 1
    bank = melscale_fbanks(bins, 0.0, sample_rate_hz / 2, _MEL_BANDS, sample_rate_hz)
    power = bank.T @ (spectrum.abs() / window.sum()).square()
    decibels = 10 * torch.log10(power.clamp(min=1e-12))
    loudest = max(float(decibels.max()), _LOWEST_REFERENCE_DB)
    return decibels.clamp(loudest - _DYNAMIC_RANGE_DB, loudest)


def draw_spectrogram(path: Path, audio: Tensor, sample_rate_hz: int) -> None:
    """A bare image of one clip, as `log_mel` takes it, without title or frame: a pixel a band, and a frame or more."""
    decibels = log_mel(audio, sample_rate_hz)
    if decibels.shape[1] > _MAX_IMAGE_COLUMNS:
        decibels = adaptive_max_pool1d(decibels, _MAX_IMAGE_COLUMNS)
    path.parent.mkdir(parents=True, exist_ok=True)
    loudest = float(decibels.max())
    imsave(path, decibels.numpy(), origin="lower", cmap="magma", vmin=loudest - _DYNAMIC_RANGE_DB, vmax=loudest)


def waveform_outline(audio: Tensor, columns: int = 160) -> str:
    """The outline of `audio` `[T]` or `[channels, T]` as the data of an SVG path in the unit square.

    Full scale fills it, and louder audio is scaled to it: clips can be compared.

    >>> waveform_outline(torch.tensor([0.0, 1.0, -0.5]), columns=3)
    'M0.000,0.50L0.500,0.00L1.000,0.75L1.000,0.75L0.500,0.00L0.000,0.50Z'
    """
    channels = torch.atleast_2d(audio).float().cpu()
    columns = min(columns, channels.shape[1])
    scaled = channels / channels.abs().max().clamp(min=1.0)
    highest = adaptive_max_pool1d(scaled, columns).amax(dim=0).tolist()
    lowest = (-adaptive_max_pool1d(-scaled, columns)).amin(dim=0).tolist()
    places = [index / max(columns - 1, 1) for index in range(columns)]
    there = list(zip(places, highest, strict=True))
    back = list(zip(places, lowest, strict=True))[::-1]
    return f"M{'L'.join(f'{x:.3f},{0.5 - y / 2:.2f}' for x, y in there + back)}Z"


def draw_sheet(path: Path, clips: Sequence[Tensor], titles: Sequence[str], sample_rate_hz: int) -> None:
    """A grid of clips, as `log_mel` takes them, with their captions as titles, mel axis in kHz and time in seconds."""
    columns = min(3, len(clips))
    rows = math.ceil(len(clips) / columns)
    with matplotlib.style.context("dark_background"), warnings.catch_warnings():
        # A caption may hold characters that the font lacks; it is drawn with boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(5.2 * columns, 2.3 * rows + 0.3), facecolor=_BACKGROUND, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes in grid[len(clips) :]:
            axes.set_visible(False)
        for axes, clip, title in zip(grid, clips, titles, strict=False):
            _show(axes, clip, sample_rate_hz)
            _label(axes, title, sample_rate_hz)
        figure.savefig(path, dpi=110)


def _show(axes: Axes, audio: Tensor, sample_rate_hz: int) -> None:
    decibels = log_mel(audio, sample_rate_hz).numpy()
    extent = (0.0, audio.shape[-1] / sample_rate_hz, 0.0, float(_MEL_BANDS))
    axes.imshow(decibels, origin="lower", aspect="auto", cmap="magma", extent=extent, interpolation="bilinear")


def _label(axes: Axes, title: str, sample_rate_hz: int) -> None:
    text = one_line(title) or "(no caption)"
    short = text if len(text) <= _MAX_TITLE_CHARACTERS else text[: _MAX_TITLE_CHARACTERS - 1] + "…"
    axes.set_title(short, fontsize=9, loc="left", parse_math=False)
    kilohertz = np.array([k for k in (0.25, 1.0, 4.0, 10.0) if 2000 * k < sample_rate_hz])
    axes.set_yticks(_mel(1000 * kilohertz) / _mel(np.array(sample_rate_hz / 2)) * _MEL_BANDS)
    axes.set_yticklabels([f"{k:g}k" for k in kilohertz])
    axes.tick_params(labelsize=7, length=2, color="#666666")
    axes.set_xlabel("seconds", fontsize=7)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _mel(hertz: np.ndarray) -> np.ndarray:
    return 2595 * np.log10(1 + hertz / 700)
