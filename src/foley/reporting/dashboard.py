"""The one layout in which a training run is looked at: as a W&B workspace, or as a page made from its folder."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foley.core.files import write_text
from foley.core.reading import reading
from foley.reporting.plots import Panel, plot_panels
from foley.reporting.tables import markdown_table

LAYOUT: Mapping[str, Mapping[str, str]] = {
    "Losses": {
        "training": r"train/(?!grad_norm|skipped|kl$)",
        "validation": r"val/loss$|val/(?!loss|kl$|si_sdr)[^/]+$",
    },
    "Divergence": {"KL of the posterior": r"(?:train|val)/kl$"},  # hundreds, where losses are ones
    "Reconstruction": {"SI-SDR in dB": r"val/si_sdr_db$"},
    "Losses by noise level": {"validation, level 0 the cleanest": r"val/loss_noise_level_"},
    "Gradients": {"norm before clipping": r"train/grad_norm", "skipped steps": r"train/skipped_steps"},
    "Scores of samples": {"validation": r"val/[^/]+/"},
    "Throughput": {"clips per second": r"throughput/clips", "seconds of audio per second": r"throughput/audio"},
    "Memory": {"MiB": r"memory/"},
    "Learning rate": {"learning rate": r"lr-"},
    "Caching": {"relative L1 change between evaluations": r"caching/change_"},
}
"""Section to panels, each a title and the pattern of the metrics that it shows. Media have sections of their own."""
MEDIA: Mapping[str, Sequence[str]] = {
    "Sounds": ("samples", "spectrograms", "reconstructions"),
    "Change curves": ("caching/curves",),
}
REPORT_FILE = "dashboard.md"

Series = dict[str, list[tuple[float, float]]]


def read_metrics(path: Path) -> Series:
    """Every metric of a `metrics.csv` as points (step, value).

    Raises FileNotFoundError where there is none, and DamagedFileError for one that is no table of numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the run was without its logger, logger.csv=null")
    series: Series = {}
    with reading(path, "the metrics of a run"), path.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((float(row["step"]), float(value)))
    return series


def write_dashboard(run: Path, directory: Path) -> Path:
    """Draw the layout of one run's folder; sections without a metric are left out. Returns the page."""
    series, parts = read_metrics(run / "metrics.csv"), [f"# {run.name}"]
    for section, panels in LAYOUT.items():
        chosen = {title: _matching(series, pattern) for title, pattern in panels.items()}
        drawn = [Panel("step", title, lines) for title, lines in chosen.items() if lines]
        if drawn:
            image = f"{section.lower().replace(' ', '_')}.png"
            plot_panels(drawn, directory / image)
            parts += [f"## {section}", f"![{section}]({image})", _last_values(panel.lines for panel in drawn)]
    parts += _media(run)
    write_text(directory / REPORT_FILE, "\n\n".join(parts) + "\n")
    return directory / REPORT_FILE


def build_workspace(entity: str, project: str) -> Any:
    """The layout as a workspace of wandb-workspaces; its `save()` sends it, and needs a login.

    Raises ModuleNotFoundError without the package: pip install 'foley[dashboard]'.
    """
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=section,
            panels=[panels.LinePlot(title=title, metric_regex=pattern) for title, pattern in lines.items()],
            is_open=True,
        )
        for section, lines in LAYOUT.items()
    ]
    media = [
        workspaces.Section(name=section, panels=[panels.MediaBrowser(media_keys=list(keys))])
        for section, keys in MEDIA.items()
    ]
    return workspaces.Workspace(entity=entity, project=project, name="foley", sections=[*sections, *media])


def _matching(series: Series, pattern: str) -> Series:
    return {name: points for name, points in series.items() if re.match(pattern, name)}


def _last_values(lines: Any) -> str:
    rows = [(name, points[-1]) for panel in lines for name, points in panel.items()]
    return markdown_table(
        ("metric", "last value", "at step"), [(name, f"{value:.4g}", f"{step:.0f}") for name, (step, value) in rows]
    )


def _media(run: Path) -> list[str]:
    """Links to the newest sounds and curves that callbacks have written."""
    parts = []
    for folder in ("samples", "spectrograms", "reconstructions"):
        if steps := sorted(path for path in (run / folder).glob("step_*") if path.is_dir()):
            files = sorted(file for file in steps[-1].iterdir() if file.suffix in (".wav", ".png"))
            links = "\n".join(f"- [{file.name}]({file.resolve().as_uri()})" for file in files)
            parts += [f"## Newest {folder}, {steps[-1].name}", links]
    return parts
