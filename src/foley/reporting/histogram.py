"""A histogram with the limits that divide it; drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_WIDTH_INCHES, _HEIGHT_INCHES, _DPI = 6.0, 3.6, 160


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
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
