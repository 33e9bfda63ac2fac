"""Gather what `make demo-real` measured into one Markdown page with its pictures."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import hydra
from matplotlib.figure import Figure
from omegaconf import DictConfig

from foley.checkpoint import write_text
from foley.config import PROJECT_ROOT
from foley.logs import get_logger
from foley.metrics.report import markdown_table
from foley.reporting.provenance import provenance

Curve = tuple[list[int], list[float]]
Rows = list[tuple[str, ...]]


def read_json(path: Path) -> Any:
    """The JSON in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_curve(metrics_file: Path, name: str) -> Curve:
    """Steps and values of one metric in a Lightning `metrics.csv`; empty lists where it was never logged."""
    with metrics_file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def draw_curves(runs: dict[str, Path], names: dict[str, list[str]], file: Path) -> None:
    """One panel per run with the curves that its metrics file has."""
    figure = Figure(figsize=(4.2 * len(runs), 3.2), layout="constrained")
    for axes, (title, metrics_file) in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs.items(), strict=True):
        for name in names[title]:
            steps, values = read_curve(metrics_file, name)
            axes.plot(steps, values, label=name, linewidth=1.2, marker="." if len(steps) < 40 else None)
        axes.set(title=title, xlabel="optimizer step")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


def stage_section(work_dir: Path, names: list[str]) -> str:
    """Every stage's command and seconds, in order."""
    notes = {name: read_json(work_dir / "stages" / f"{name}.json") for name in names}
    rows: Rows = [(name, f"`{note['command']}`", f"{note['seconds']:.0f}") for name, note in notes.items()]
    minutes = sum(note["seconds"] for note in notes.values()) / 60
    return markdown_table(("stage", "command", "seconds"), rows) + f"\n\n{minutes:.1f} minutes in all."


def codec_section(work_dir: Path) -> str:
    """Reconstruction of the test split."""
    summary = read_json(work_dir / "score_codec" / "codec.json")["summary"]
    rows: Rows = [
        ("SI-SDR, mean (dB)", f"{summary['si_sdr_db']:.2f}"),
        ("SI-SDR, median (dB)", f"{summary['si_sdr_db_median']:.2f}"),
        ("mel distance (natural log)", f"{summary['mel_distance']:.3f}"),
        ("multi-resolution STFT distance (natural log)", f"{summary['stft_distance']:.3f}"),
    ]
    return markdown_table((f"real test clips, n = {summary['n']}", "value"), rows)


def score_section(scores_dir: Path, group: str) -> str:
    """Label accuracy and distances of generated audio, and the classes of `group` that fail."""
    scores = read_json(scores_dir / "evaluation.json")["embedded"]
    frechet, inception = (scores["scores"][name] for name in ("frechet_distance", "inception_score"))
    rows: Rows = [
        (f"label accuracy, {name} ({found['choices']} choices, chance {1 / found['choices']:.1%})",
         f"{found['accuracy']:.1%}", str(found["n"]))
        for name, found in scores["accuracy"].items()
    ]  # fmt: skip
    rows += [
        ("Frechet distance", f"{frechet['value']:.3f}", frechet["n"]),
        ("inception score", f"{inception['value']:.2f}", inception["n"]),
    ]
    per_class = scores["accuracy"][group]["per_class"]
    worst = sorted(per_class.items(), key=lambda item: item[1][0])
    missed = ", ".join(f"{name} {value:.0%}" for name, (value, _) in worst if value < 1) or "none"
    facts = ", ".join(f"{key} {value}" for key, value in scores["protocol"].items() if not isinstance(value, list))
    return markdown_table(("score", "value", "n"), rows) + f"\n\nClasses below 100 %: {missed}.\n\nProtocol: {facts}."


def caching_section(work_dir: Path) -> str:
    """AudioCache threshold against speed-up and latent error."""
    caching = read_json(work_dir / "caching" / "caching.json")
    rows: Rows = [
        (f"{row['value']:g}", f"{row['wall_speedup']:.2f}x", f"{row['mac_speedup']:.2f}x",
         f"{row['computed_fraction']:.0%}", f"{row['latent_error']:.4f}")
        for row in caching["rows"]
    ]  # fmt: skip
    settings = ", ".join(f"{key} {value}" for key, value in caching["settings"].items() if key != "model_hash")
    header = ("threshold", "wall-clock speed-up", "MAC speed-up", "layers computed", "relative latent error")
    return markdown_table(header, rows) + f"\n\nSettings: {settings}."


def speed_section(work_dir: Path) -> str:
    """Seconds for one clip of five seconds, and what `make demo` took."""
    sampling, demo = read_json(work_dir / "sampling.json"), read_json(work_dir / "demo" / "demo.json")
    rows: Rows = [
        (f"{sampling['settings']['duration_seconds']:g} s of audio, {sampling['settings']['num_steps']} guided steps",
         f"{sampling['total_seconds']:.2f} s (text {sampling['text_seconds']:.2f}, denoising "
         f"{sampling['denoise_seconds']:.2f}, decoding {sampling['decode_seconds']:.2f})"),
        *((f"the demo's clips, {name}", f"{variant['seconds']:.2f} s, label accuracy {variant['label_accuracy']:.0%}")
          for name, variant in demo["variants"].items()),
        ("peak memory of the demo", f"{demo['peak_memory_gigabytes']:.2f} GB"),
    ]  # fmt: skip
    return markdown_table(("what", "measured"), rows)


def copy_pictures(work_dir: Path, picture_dir: Path) -> None:
    """The pictures that the stages drew."""
    sources = {
        "spectrograms.png": work_dir / "samples" / "spectrograms.png",
        "digits.png": work_dir / "samples_digits" / "spectrograms.png",
        "codec_pairs.png": work_dir / "score_codec" / "pairs" / "pairs.png",
        "caching.png": work_dir / "caching" / "caching.png",
    }
    for name, source in sources.items():
        shutil.copyfile(source, picture_dir / name)


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo_real")
def main(cfg: DictConfig) -> None:
    """Write the report and its pictures."""
    work_dir, report = PROJECT_ROOT / cfg.work_dir, PROJECT_ROOT / cfg.report
    picture_dir = report.with_suffix("")
    picture_dir.mkdir(parents=True, exist_ok=True)
    copy_pictures(work_dir, picture_dir)
    runs = {name: work_dir / name / "metrics.csv" for name in ("codec", "pretrain", "align", "finetune")}
    diffusion = ["train/loss", "val/loss"]
    curves = {"codec": ["train/mel", "train/stft"], "pretrain": diffusion, "align": diffusion, "finetune": diffusion}
    draw_curves(runs, curves, picture_dir / "losses.png")
    facts = "\n".join(f"- {name}: {value}" for name, value in provenance().items())
    sections = {
        "How it was made": "`make demo-real`, which runs:\n\n" + stage_section(work_dir, list(cfg.stages)),
        "Losses": f"![losses]({picture_dir.name}/losses.png)",
        "Codec on the test split": codec_section(work_dir) + f"\n\n![pairs]({picture_dir.name}/codec_pairs.png)",
        "What the codec allows": "The procedural reference clips themselves, through the codec and back.\n\n"
        + score_section(work_dir / "scores_bound", "procedural"),
        "Generated audio, procedural classes": score_section(work_dir / "scores", "procedural")
        + f"\n\n![spectrograms]({picture_dir.name}/spectrograms.png)",
        "Generated audio, spoken digits": score_section(work_dir / "scores_digits", "all")
        + f"\n\n![digits]({picture_dir.name}/digits.png)",
        "AudioCache": caching_section(work_dir) + f"\n\n![caching]({picture_dir.name}/caching.png)",
        "Speed and memory": speed_section(work_dir),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    intro = (
        "Real recordings and synthesised clips in, a trained system out, on a CPU. This page is written by a command."
    )
    write_text(report, f"# First light\n\n{intro}\n\n{facts}\n\n{body}\n")
    get_logger(__name__).info("wrote %s", report)


if __name__ == "__main__":
    main()
