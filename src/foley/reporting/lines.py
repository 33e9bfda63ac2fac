"""Plots of measured series; drawn without a display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foley.reporting.tables import Row, format_cell

_PANEL_WIDTH_INCHES, _PANEL_HEIGHT_INCHES, _DPI = 5.0, 3.6, 160


@dataclass(frozen=True)
class Panel:
    """One pair of axes: `lines` maps a name to its points `(x, y)`."""

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False


def plot_rows(
    rows: Sequence[Row],
    x: str,
    measures: Mapping[str, str],
    line: str,
    path: Path,
    log_x: bool = False,
    x_label: str = "",
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
            panels.append(Panel(x_label or x.replace("_", " "), title, lines, log_x))
    if panels:
        plot_panels(panels, path)
    return bool(panels)


def plot_panels(panels: Sequence[Panel], path: Path) -> None:
    """Panels side by side, with a marker at each point; a line has the same colour in all of them."""
    width = _PANEL_WIDTH_INCHES * len(panels)
    figure = Figure(figsize=(width, _PANEL_HEIGHT_INCHES), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, points in panel.lines.items():
            axes.plot(*zip(*sorted(points), strict=True), "o-", label=name)
        axes.set(xlabel=panel.x_label, ylabel=panel.y_label, xscale="log" if panel.log_x else "linear")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
