"""Generate the same prompts without acceleration, with it, and with the student: what `make demo` shows on one page."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track

from foley.cli.command import command
from foley.core.files import slug, write_json, write_text
from foley.core.logs import get_logger
from foley.generation.prompts import LabelledPrompts
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.metrics.latency import peak_memory_bytes
from foley.reporting.samples import Card, render_comparison
from foley.reporting.tables import provenance

log = get_logger(__name__)


def write_variant(directory: Path, name: str, result: Generation) -> list[Card]:
    """The folder of one variant; returns its cards, with file names relative to the parent folder."""
    folder = directory / slug(name)
    _, cards = result.write(folder, name)
    return [card.inside(folder.name) for card in cards]


def generate(cfg: DictConfig, name: str, prompts: list[str]) -> Generation:
    """The prompts in one variant; solver, steps and guidance are the system's own choice, or the student's."""
    return TextToAudio.load(cfg.variants[name].system).generate(
        prompts,
        cfg.duration_seconds,
        accelerator=instantiate(cfg.variants[name].accel),
        batch_size=cfg.batch_size,
        progress=partial(track, description=f"{len(prompts)} sounds, {name}"),
    )


@command("script/demo")
def main(cfg: DictConfig) -> None:
    """Write the page and `demo.json`."""
    prompts, labels = LabelledPrompts.read(Path(cfg.prompts))
    judge, directory = Judge.load(Path(cfg.extractor_dir)), Path(cfg.output_dir)
    columns: dict[str, list[Card]] = {}
    scores: dict[str, dict[str, Any]] = {}
    for name, variant in cfg.variants.items():
        if not Path(variant.system).is_dir():
            log.info("%s: left out, there is no %s", name, variant.system)
            continue
        result = generate(cfg, name, prompts)
        accuracy = judge.score(result.audio, result.sample_rate_hz, labels)["label_accuracy"]
        seconds = result.timings.total_seconds
        speedup = next(iter(scores.values()))["seconds"] / seconds if scores else 1.0
        scores[name] = {"seconds": seconds, "speedup": speedup, "label_accuracy": accuracy}
        scores[name] |= dataclasses.asdict(result.timings)
        heading = f"{name}\n{seconds:.1f} s, {speedup:.1f}x, label accuracy {accuracy:.0%}"
        columns[heading] = write_variant(directory, name, result)
        log.info("%s", heading.replace("\n", ": "))
    page, peak_bytes = directory / "index.html", peak_memory_bytes(torch.device("cpu"))
    facts = f"{len(prompts)} sounds of {cfg.duration_seconds:g} s; seconds and speed-up are of all of them together"
    write_text(page, render_comparison("foley demo", facts, columns))
    memory = None if peak_bytes is None else peak_bytes / 1e9
    facts_of_run = {"peak_memory_gigabytes": memory, "provenance": provenance()}
    write_json(directory / "demo.json", {"variants": scores, **facts_of_run})
    log.info("Open %s", page)


if __name__ == "__main__":
    main()
