"""What distances between two halves of one distribution say at small n, and what an evaluation costs."""

import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from foley.cli.command import command
from foley.core.config import SHIPPED_ROOT
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.core.seeding import torch_generator
from foley.data.audio import write_wav
from foley.data.procedural import ProceduralDataset
from foley.metrics.distances import GaussianRoot, extrapolated_distance, kernel_audio_distance
from foley.metrics.features import LabelledAudio, extract_audio
from foley.metrics.protocols import load_protocol
from foley.reporting.pages import write_page
from foley.reporting.tables import provenance

log = get_logger(__name__)

MEASURES = ("frechet_distance", "frechet_distance_infinity", "kernel_audio_distance")


def distances(reference: Tensor, generated: Tensor) -> dict[str, float]:
    """Each of `MEASURES` between two sets of features `[N, D]`."""
    known = GaussianRoot.fit(reference)
    extrapolated = extrapolated_distance(
        lambda part: known.distance(GaussianRoot.fit(generated, part)), torch.ones(len(generated)).double()
    )
    kad = float(kernel_audio_distance(reference, generated))
    return dict(zip(MEASURES, (known.distance(GaussianRoot.fit(generated)), extrapolated, kad), strict=True))


def bias_rows(name: str, features: Tensor, cfg: DictConfig) -> list[dict[str, Any]]:
    """Mean distances of pairs of halves of `features [N, D]`, at each n, and their spread; the truth is zero."""
    rows = []
    for n in cfg.bias.sizes:
        pairs = []
        for repeat in range(cfg.bias.repeats):
            order = torch.randperm(len(features), generator=torch_generator("halves", cfg.seed, n, repeat))
            pairs.append(distances(features[order[:n]], features[order[n : 2 * n]]))
        means = {key: mean(pair[key] for pair in pairs) for key in MEASURES}
        spread = {f"{key}_std": stdev(pair[key] for pair in pairs) for key in MEASURES}
        rows.append({"distribution": name, "features": features.shape[1], "n": n, **means, **spread})
        log.info("%s, n = %d: %s", name, n, ", ".join(f"{key} {value:.4f}" for key, value in means.items()))
    return rows


def bias(cfg: DictConfig) -> dict[str, Any]:
    """Rows for Gaussian features and for procedural clips under `embedded`."""
    size = 2 * max(cfg.bias.sizes)
    generator = torch_generator("gaussian_features", cfg.seed)
    gaussian = torch.randn(size, cfg.bias.gaussian_features, generator=generator)
    protocol = load_protocol("embedded", cfg.extractor_dir)
    clips = ProceduralDataset(size, cfg.seed, cfg.bias.clip_seconds, protocol.sample_rate_hz)
    procedural = [extract_audio([LabelledAudio(clips.render(index).audio)], protocol).features for index in range(size)]
    rows = bias_rows("Gaussian", gaussian, cfg)
    rows += bias_rows("procedural clips", torch.cat(procedural), cfg)
    return {"rows": rows, "repeats": cfg.bias.repeats, "provenance": provenance()}


def speed(cfg: DictConfig) -> dict[str, Any]:
    """Seconds, processor seconds and peak resident memory of one `evaluate.py` over new files, a process of its own."""
    with TemporaryDirectory(dir=cfg.work_dir) as name:
        folder = Path(name)
        clips = ProceduralDataset(cfg.speed.clips, cfg.seed, cfg.speed.clip_seconds)
        for index in range(len(clips)):
            write_wav(folder / "clips" / f"{index:05d}.wav", clips.render(index).audio, 24000)
        overrides = {
            "samples": folder / "clips",
            "reference": folder / "clips",
            "cache_dir": folder / "features",
            "output_dir": folder / "scores",
            "resamples": cfg.speed.resamples,
        }
        command = [sys.executable, str(SHIPPED_ROOT / "evaluate.py"), *(f"{k}={v}" for k, v in overrides.items())]
        start = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(cfg.speed.threads)})
        seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    settings = {key: cfg.speed[key] for key in ("clips", "clip_seconds", "resamples", "threads")}
    cost = {"seconds": seconds, "cpu_seconds": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}
    return {**settings, **cost, "provenance": provenance()}


@command("bench/metrics")
def main(cfg: DictConfig) -> None:
    """Measure the chosen parts, and write the page."""
    page = Path(cfg.page)
    measurements = {"bias": partial(bias, cfg), "speed": partial(speed, cfg)}
    for part in cfg.parts:
        write_json(page.with_suffix("") / f"{part}.json", measurements[part]())
    write_page(page.parent / "templates" / page.name, page)
    log.info("wrote %s", page)


if __name__ == "__main__":
    main()
