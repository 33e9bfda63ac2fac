"""Figures of calibrations and schedules; drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from foley.accel.caching.calibration import Calibration
from foley.accel.caching.schedule import CacheSchedule

_PANEL_WIDTH_INCHES, _PANEL_HEIGHT_INCHES, _DPI = 4.2, 3.2, 160


def plot_calibration(calibration: Calibration, path: Path) -> None:
    """Relative-L1 change per evaluation: a panel per kind, a line per block, one std over prompts shaded.

    After Fig. 3 of AudioCache and Fig. 2 of SmoothCache.
    """
    kinds = list(dict.fromkeys(calibration.layer_kinds))
    depth = max(calibration.layer_kinds.count(kind) for kind in kinds)  # blocks of the kind that has most
    colors = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.92, depth)))  # without viridis's palest end
    figure = Figure(figsize=(_PANEL_WIDTH_INCHES * len(kinds), _PANEL_HEIGHT_INCHES), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _plot_kind(axes, calibration, kind, colors)
    panels[0].set_ylabel("relative L1 change")
    panels[0].set_ylim(bottom=0)  # last: it fixes the top of the shared axis as well
    blocks = ScalarMappable(BoundaryNorm(np.arange(depth + 1) - 0.5, depth), colors)  # a colour for each block
    ticks = np.unique(np.linspace(0, depth - 1, min(depth, 8)).round())
    figure.colorbar(blocks, ax=panels, label="block", ticks=ticks, aspect=30, pad=0.01)
    signature = calibration.signature
    figure.suptitle(
        f"Change of each layer's output between evaluations: {signature.solver}, {signature.num_steps} steps, "
        f"guidance {signature.guidance_scale:g}, {calibration.num_prompts} prompts"
    )
    _save(figure, path)


def _plot_kind(axes: Axes, calibration: Calibration, kind: str, colors: ListedColormap) -> None:
    evaluations = np.arange(1, calibration.signature.num_evaluations)
    rows = [i for i, layer_kind in enumerate(calibration.layer_kinds) if layer_kind == kind]
    for block, row in enumerate(rows):
        # At distance 1, from evaluation 1 on.
        mean, std = (curves[row, 0, 1:].numpy() for curves in (calibration.mean, calibration.std))
        axes.plot(evaluations, mean, color=colors(block), linewidth=1.3)
        axes.fill_between(evaluations, mean - std, mean + std, color=colors(block), alpha=0.15, linewidth=0)
    axes.set(title=kind.replace("_", "-"), xlabel="evaluation (noisiest first)")
    axes.margins(x=0.01)
    _tidy(axes)


def plot_schedule(schedule: CacheSchedule, path: Path) -> None:
    """The compute table: a row per layer in order of execution, dark where it computes, light where it is reused."""
    num_layers, num_evaluations = len(schedule.layer_names), len(schedule.compute)
    figure = Figure(figsize=(2.4 + 0.14 * num_evaluations, 1.2 + 0.16 * num_layers), layout="constrained")
    axes = figure.subplots()
    colors = ListedColormap(["#e8edf2", "#31688e"])
    # [layers, evaluations].
    axes.pcolormesh(schedule.compute.T.numpy(), cmap=colors, vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
    axes.set_yticks(np.arange(num_layers) + 0.5, schedule.layer_names, fontsize=6)
    axes.invert_yaxis()  # the first layer on top
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    settings = {key: f"{value:g}" if isinstance(value, float) else value for key, value in schedule.policy.items()}
    policy = ", ".join(str(value) if key == "name" else f"{key} {value}" for key, value in settings.items())
    axes.set(
        xlabel="evaluation (noisiest first)",
        title=f"{policy}: {schedule.computed_fraction:.0%} of the layer calls compute (dark)",
    )
    _save(figure, path)


def plot_tradeoff(rows: Sequence[Mapping[str, Any]], path: Path, yardstick: str = "fewer steps") -> None:
    """What each policy and kind of reuse costs at each wall-clock speed-up: latent error, and label accuracy if known.

    Each row holds `policy`, `reuse`, `wall_speedup`, `latent_error` and `label_accuracy`, which may be None. The policy
    `yardstick` is drawn in black: what lies above its line in error is no gain. Errors are on a logarithmic axis.
    """
    measures = {"latent_error": "relative L2 distance to the uncached latent"}
    if all(row["label_accuracy"] is not None for row in rows):
        measures["label_accuracy"] = "label accuracy"
    figure = Figure(
        figsize=((_PANEL_WIDTH_INCHES + 1) * len(measures), _PANEL_HEIGHT_INCHES + 0.6), layout="constrained"
    )
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, (key, title) in zip(panels, measures.items(), strict=True):
        _draw_lines(axes, rows, key, yardstick)
        axes.set(title=title, xlabel="wall-clock speed-up of the denoising")
        axes.set_yscale("log") if key == "latent_error" else axes.set_ylim(0, None)
        _tidy(axes)
    panels[-1].legend(frameon=False, fontsize=7)
    _save(figure, path)


def _draw_lines(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, yardstick: str) -> None:
    policies = list(dict.fromkeys(row["policy"] for row in rows if row["policy"] != yardstick))
    for policy, reuse in dict.fromkeys((row["policy"], row["reuse"]) for row in rows):
        points = sorted(
            (row["wall_speedup"], row[key]) for row in rows if (row["policy"], row["reuse"]) == (policy, reuse)
        )
        style = "o-" if reuse in (None, "hold") else "^--"  # solid, or dashed where the reuse extrapolates
        color = "black" if policy == yardstick else f"C{policies.index(policy)}"
        label = policy if reuse is None else f"{policy}, {reuse}"
        axes.plot(*zip(*points, strict=True), style, color=color, label=label)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)
