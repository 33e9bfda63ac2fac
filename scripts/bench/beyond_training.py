"""Clips longer than those of training: TMACs, seconds, memory, and whether they sound as asked for, all along the clip.

A clip's label accuracy is that of its pieces of `piece_seconds`, each judged by itself.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.devices import resolve_device
from foley.core.files import write_json
from foley.generation.prompts import LabelledPrompts
from foley.generation.result import Generation
from foley.generation.text_to_audio import TextToAudio
from foley.metrics.judge import Judge
from foley.metrics.latency import peak_memory_bytes, reset_peak_memory
from foley.reporting.tables import provenance

Row = dict[str, Any]


def score_pieces(result: Generation, labels: list[str | None], piece_seconds: float, judge: Judge) -> Row:
    """Label accuracy over all whole pieces, and of the first and last quarter of them."""
    pieces = result.audio.unfold(2, size := round(piece_seconds * result.sample_rate_hz), size)[:, 0]
    quarter = max(1, pieces.shape[1] // 4)
    parts = {"": pieces, "_first_quarter": pieces[:, :quarter], "_last_quarter": pieces[:, -quarter:]}
    scores = {}
    for name, part in parts.items():
        repeated = [label for label in labels for _ in range(part.shape[1])]
        scores[name] = judge.score(part.flatten(0, 1)[:, None], result.sample_rate_hz, repeated)["label_accuracy"]
    return {f"label_accuracy{name}": accuracy for name, accuracy in scores.items()}


def measure(system: TextToAudio, judge: Judge, cfg: DictConfig, way: str, duration_seconds: float) -> Row:
    """One way of generating one length: TMACs, seconds and RTF of all clips, the peak memory, and the accuracies."""
    prompts = LabelledPrompts.read(Path(cfg.prompts), cfg.num_prompts)
    reset_peak_memory(system.device)
    result = system.generate(
        prompts.captions,
        duration_seconds,
        solver=cfg.solver.name,
        eta=cfg.solver.eta,
        num_steps=cfg.steps,
        batch_size=cfg.batch_size,
        accelerator=instantiate(cfg.ways[way].accelerator),
        window_seconds=cfg.ways[way].window_seconds,
    )
    peak_bytes = peak_memory_bytes(system.device)
    facts = {
        "way": way,
        "duration_seconds": duration_seconds,
        "clips": len(prompts.captions),
        "tmacs": result.tmacs,
        "denoise_seconds": result.timings.denoise_seconds,
        "total_seconds": result.timings.total_seconds,
        **result.rtf.to_json(),
        "peak_memory_gigabytes": None if peak_bytes is None else peak_bytes / 1e9,
    }
    return facts | score_pieces(result, prompts.labels, cfg.piece_seconds, judge)


@command("bench/beyond_training")
def main(cfg: DictConfig) -> None:
    longest = max(cfg.durations_seconds)
    system = TextToAudio.load(cfg.system, resolve_device(cfg.device), max_duration_seconds=longest)
    judge = Judge.load(Path(cfg.extractor_dir))
    rows = []
    for duration_seconds, way in product(sorted(cfg.durations_seconds), cfg.ways):  # small ones first: memory is kept
        rows.append(measure(system, judge, cfg, way, duration_seconds))
        sys.stdout.write(f"{json.dumps(rows[-1])}\n")
    settings = {name: cfg[name] for name in ("steps", "batch_size", "piece_seconds")}
    write_json(
        Path(cfg.output_dir) / "beyond_training.json", {"settings": settings, "rows": rows, "provenance": provenance()}
    )


if __name__ == "__main__":
    main()
