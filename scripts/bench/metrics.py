"""What distances of two halves of one distribution say at small n, how wide intervals are, and what scores cost."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory
from types import MappingProxyType
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
from foley.metrics.distances import GaussianRoot, extrapolated_distance, frechet_slopes, kernel_audio_distance
from foley.metrics.extractors import ExtractorOutput
from foley.metrics.features import ClipFeatures, LabelledAudio, extract_audio
from foley.metrics.protocols import load_protocol
from foley.metrics.scores import SCORES, Comparison, draw_counts
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


def intervals(cfg: DictConfig) -> dict[str, Any]:
    """How a Frechet distance of Gaussian sets scatters in truth, and by refitted and by linear draws of one pair."""
    rows = [interval_row(cfg, *case) for case in product(cfg.intervals.features, cfg.intervals.sizes, (0.0, 0.5))]
    return {"rows": rows, "repeats": cfg.intervals.repeats, "provenance": provenance()}


def interval_row(cfg: DictConfig, features: int, n: int, shift: float) -> dict[str, Any]:
    generator = torch_generator("intervals", cfg.seed, features, n)
    scale = torch.linspace(0.3, 1.5, features).double()
    pairs = []
    for _ in range(cfg.intervals.repeats):
        reference, generated = torch.randn(2, n, features, generator=generator).double() * scale
        pairs.append((reference, generated * (1 + 0.6 * shift) + shift))
    values = [GaussianRoot.fit(first).distance(GaussianRoot.fit(second)) for first, second in pairs]
    drawn = [draw_deviations(*pair, cfg.intervals.resamples) for pair in pairs[: cfg.intervals.drawn]]
    refitted, linear = (mean(deviations) for deviations in zip(*drawn, strict=True))
    row = {"features": features, "n": n, "distance": mean(values), "truth": stdev(values)}
    return row | {"shift": shift, "refitted": refitted, "linear": linear}


def draw_deviations(reference: Tensor, generated: Tensor, resamples: int) -> tuple[float, float]:
    """Standard deviations of the distance over draws: fitted anew, and linear in their counts."""
    counts = [draw_counts(len(reference), resamples, name)[1:] for name in ("reference", "generated")]
    refitted = [
        GaussianRoot.fit(reference, first).distance(GaussianRoot.fit(generated, second))
        for first, second in zip(*counts, strict=True)
    ]
    _, of_reference, of_generated = frechet_slopes(GaussianRoot.fit(reference), GaussianRoot.fit(generated))
    linear = (counts[0] - 1) @ of_reference.of(reference) + (counts[1] - 1) @ of_generated.of(generated)
    return stdev(refitted), float(linear.std())


class RandomCaptions:
    """Stands for an extractor that knows captions: a random vector for each."""

    sample_rate_hz = 32000
    feature_dim = 2048
    labels: Sequence[str] = ()
    label_groups: Mapping[str, Sequence[str]] = MappingProxyType({})

    def __call__(self, audio: Tensor) -> ExtractorOutput:
        raise NotImplementedError("the features are random already")

    def text(self, captions: Sequence[str]) -> Tensor:
        return torch.randn(len(captions), self.feature_dim) / self.feature_dim**0.5


def random_clips(n: int, name: str, width: int) -> ClipFeatures:
    """Features that are never negative, of a falling spectrum as networks give them, and posteriors of 527 classes."""
    generator = torch_generator("large_sets", name, n)
    scale = torch.arange(1, width + 1) ** -0.5
    return ClipFeatures(
        ids=[str(number) for number in range(n)],
        labels=[None] * n,
        captions=[f"caption {number}" for number in range(n)],
        features=(torch.randn(n, width, generator=generator) * scale).abs_(),
        windows=torch.ones(n, dtype=torch.long),
        logits=torch.randn(n, 527, generator=generator),
        peaks=torch.ones(n),
        recordings=[str(number) for number in range(n)],
        seconds=torch.ones(n),
    )


def large(cfg: DictConfig) -> dict[str, Any]:
    """Seconds of every score with intervals of random features, and the peak of memory, a process for each size."""
    rows = []
    settings = (cfg.large.features, cfg.large.resamples, cfg.large.threads)
    for n in cfg.large.clips:
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
            rows.append(fresh.submit(large_row, n, *settings).result())
        log.info("%d clips: %.0f s, %.1f GiB", n, rows[-1]["seconds"], rows[-1]["peak_gib"])
    return {"rows": rows, "resamples": cfg.large.resamples, "threads": cfg.large.threads, "provenance": provenance()}


def large_row(n: int, features: int, resamples: int, threads: int) -> dict[str, Any]:
    """Of two sets of n clips each; seconds by score are flat in it."""
    torch.set_num_threads(threads)
    reference, generated = (random_clips(n, name, features) for name in ("reference", "generated"))
    sets = Comparison(generated, reference, list(range(n)), RandomCaptions(), 10, resamples)
    seconds = {}
    for name, score in SCORES.items():
        start = time.perf_counter()
        score(sets)
        seconds[name] = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    cost = {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_gib": used.ru_maxrss / 2**20}
    return {"clips": n, "features": features, "seconds": sum(seconds.values()), **seconds, **cost}


@command("bench/metrics")
def main(cfg: DictConfig) -> None:
    """Measure the chosen parts, and write the page."""
    page = Path(cfg.page)
    measurements = {part.__name__: partial(part, cfg) for part in (bias, intervals, speed, large)}
    for part in cfg.parts:
        write_json(page.with_suffix("") / f"{part}.json", measurements[part]())
    write_page(page.parent / "templates" / page.name, page)
    log.info("wrote %s", page)


if __name__ == "__main__":
    main()
