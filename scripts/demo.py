"""`make demo`: generate the same prompts without and with acceleration, score them, and put them on one page."""

import dataclasses
import resource
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track

import foley.config  # noqa: F401  (registers the resolvers that the configs use)
from foley.checkpoint import write_json, write_text
from foley.logs import get_logger
from foley.metrics.clips import LabelledAudio
from foley.metrics.evaluation import restricted_accuracy
from foley.metrics.features import extract_audio
from foley.metrics.protocols import EvaluationProtocol, load_protocol
from foley.pipeline import Generation, TextToAudio
from foley.prompts import read_prompt_rows
from foley.reporting.html import Card, render_comparison
from foley.reporting.names import slug

log = get_logger(__name__)


def label_accuracy(result: Generation, labels: list[str], protocol: EvaluationProtocol) -> float:
    """Share of clips that the extractor gives their label, choosing among all labels it knows."""
    clips = [LabelledAudio(audio[0], label) for audio, label in zip(result.audio, labels, strict=True)]
    known = protocol.extractor.labels
    accuracy = restricted_accuracy(extract_audio(clips, protocol).logits, labels, known, known)
    if accuracy is None:
        raise ValueError(f"none of the labels {sorted(set(labels))} is known to the extractor, which knows {known}")
    return accuracy.accuracy


def write_variant(directory: Path, name: str, result: Generation) -> list[Card]:
    """The folder of one variant; returns its cards, with file names relative to the parent folder."""
    folder = directory / slug(name)
    _, cards = result.write(folder, name)
    return [card.inside(folder.name) for card in cards]


def peak_memory_gigabytes() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@hydra.main(version_base="1.3", config_path="../configs", config_name="demo")
def main(cfg: DictConfig) -> None:
    """Write the page and `demo.json`."""
    rows = read_prompt_rows(Path(cfg.prompts))
    prompts, labels = [row["caption"] for row in rows], [row["label"] for row in rows]
    system = TextToAudio.load(cfg.ckpt)
    protocol = load_protocol("embedded", Path(cfg.extractor_dir))
    directory = Path(cfg.output_dir)
    columns: dict[str, list[Card]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for name, accel in cfg.variants.items():
        result = system.generate(
            prompts,
            cfg.duration_seconds,
            guidance=instantiate(cfg.guidance),
            solver=cfg.solver.name,
            num_steps=cfg.steps,
            accelerator=instantiate(accel),
            batch_size=cfg.batch_size,
            progress=partial(track, description=f"{len(prompts)} sounds, {name}"),
        )
        seconds, accuracy = result.timings.total_seconds, label_accuracy(result, labels, protocol)
        scores[name] = {"seconds": seconds, "label_accuracy": accuracy, **dataclasses.asdict(result.timings)}
        heading = f"{name}\n{seconds:.1f} s, label accuracy {accuracy:.0%}"
        columns[heading] = write_variant(directory, name, result)
        log.info("%s", heading.replace("\n", ": "))
    page = directory / "index.html"
    facts = f"{len(prompts)} sounds of {cfg.duration_seconds:g} s, {cfg.steps} {cfg.solver.name} steps, guidance"
    write_text(page, render_comparison("foley demo", f"{facts} scale {cfg.guidance.scale:g}", columns))
    write_json(directory / "demo.json", {"variants": scores, "peak_memory_gigabytes": peak_memory_gigabytes()})
    log.info("Open %s", page)


if __name__ == "__main__":
    main()
