"""Generate the same prompts without acceleration, with it, and by fewer steps and the student: `make demo`."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track

from foley.accel.combined import NoAcceleration
from foley.cli.command import command
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.generation.comparison import compare, heading, write_comparison
from foley.generation.prompts import LabelledPrompts
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.metrics.latency import peak_memory_bytes
from foley.reporting.tables import provenance

log = get_logger(__name__)


def generate(cfg: DictConfig, name: str, prompts: list[str]) -> Generation:
    """The prompts in one variant; solver, steps and guidance are the system's own choice, or the student's."""
    return TextToAudio.load(cfg.variants[name].system).generate(
        prompts,
        cfg.duration_seconds,
        num_steps=cfg.variants[name].get("steps"),
        accelerator=instantiate(cfg.variants[name].accel) or NoAcceleration(),  # which is counted too
        batch_size=cfg.batch_size,
        progress=partial(track, description=f"{len(prompts)} sounds, {name}"),
    )


def against_yardstick(scores: Mapping[str, Mapping[str, Any]], name: str, yardstick: str) -> list[str]:
    """How far off an accelerated variant is, in words: of the yardstick's distance from the first variant."""
    if yardstick not in scores or name == yardstick or not scores[name]["spectral_convergence"]:
        return []
    ratio = scores[name]["spectral_convergence"] / scores[yardstick]["spectral_convergence"]
    return [f"{ratio:.1f} times as far off as {yardstick}"]


@command("script/demo")
def main(cfg: DictConfig) -> None:
    """Write the page and `demo.json`."""
    prompts, labels = LabelledPrompts.read(Path(cfg.prompts))
    judge, directory = Judge.load(Path(cfg.extractor_dir)), Path(cfg.output_dir)
    results: dict[str, Generation] = {}
    for name, variant in cfg.variants.items():
        if not Path(variant.system).is_dir():
            log.info("%s: left out, there is no %s", name, variant.system)
            continue
        results[name] = generate(cfg, name, prompts)
    scores: dict[str, dict[str, Any]] = {**compare(results)}
    headings = {}
    for name, result in results.items():
        accuracy = judge.score(result.audio, result.sample_rate_hz, labels)["label_accuracy"]
        held = against_yardstick(scores, name, cfg.yardstick) if cfg.variants[name].accel is not None else []
        headings[name] = heading(name, scores[name], *held, f"label accuracy {accuracy:.0%}")
        scores[name] |= {"label_accuracy": accuracy, **dataclasses.asdict(result.timings)}
        log.info("%s", headings[name].replace("\n", ": "))
    peak_bytes = peak_memory_bytes(torch.device("cpu"))
    classes = len(judge.protocol.extractor.labels)
    facts = f"{len(prompts)} sounds of {cfg.duration_seconds:g} s; TMACs (of denoising), seconds and speed-up are "
    facts += f"of all of them together ({next(iter(results.values())).rtf.where}); "
    facts += "spectral convergence is how far the spectrograms are from those of the first column, 0 the same; "
    facts += f"label accuracy is among all {classes} classes of the extractor, and hears little of what ears hear: "
    facts += "listen to the siren and the sweeps."
    page = write_comparison(directory, "foley demo", facts, results, headings)
    memory = None if peak_bytes is None else peak_bytes / 1e9
    facts_of_run = {"peak_memory_gigabytes": memory, "provenance": provenance()}
    write_json(directory / "demo.json", {"variants": scores, **facts_of_run})
    log.info("Open %s", page)


if __name__ == "__main__":
    main()
