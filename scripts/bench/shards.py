"""Clips per second out of shards against the same files on the local disk, in turns; and what bucketing saves."""

import json
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from foley.cli.command import command
from foley.core.files import drop_from_cache
from foley.data.dataset import AudioCollate, AudioDataset, AudioSource
from foley.data.manifest import ManifestEntry, read_manifest
from foley.data.ordering import LengthBuckets, ResumableSampler, evenly_spaced, padding_fraction
from foley.data.shards import ShardIndex, ShardSource
from foley.data.shards_writer import write_shards
from foley.data.splits import ClipSource
from foley.reporting.pages import write_results
from foley.reporting.tables import provenance

FILES, SHARDS, ORIGINALS = "files", "shards", "originals"


def unpack(folder: Path, entries: list[ManifestEntry]) -> list[ManifestEntry]:
    """The very FLACs of the shards as files beside them, and their entries."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            tar.extractall(folder, filter="data")
    return [replace(entry, path=folder / f"{number:09d}.flac") for number, entry in enumerate(entries)]


def epoch_seconds(source: AudioSource, cfg: DictConfig, epoch: int) -> tuple[float, float]:
    """By the clock and of this processor, to load every clip once, shuffled, in batches."""
    dataset = AudioDataset(source, round(cfg.duration_seconds * source.sample_rate_hz))
    sampler = ResumableSampler(len(dataset), drop_last=False)
    sampler.load_state_dict({"epoch": epoch, "consumed": 0, "size": len(dataset)})
    collate = AudioCollate(dataset.num_samples)
    loader = DataLoader(dataset, cfg.batch_size, sampler=sampler, num_workers=cfg.num_workers, collate_fn=collate)
    start, processor_start = time.perf_counter(), time.process_time()
    loaded = sum(len(batch["id"]) for batch in loader)
    seconds = time.perf_counter() - start, time.process_time() - processor_start
    if loaded != len(dataset) or dataset.faults:
        raise RuntimeError(f"{loaded} of {len(dataset)} clips were loaded, with the faults {dataset.faults}")
    return seconds


def compare(
    sources: Mapping[str, AudioSource], cfg: DictConfig, before: Callable[[], object]
) -> tuple[dict[str, Any], list[dict[str, tuple[float, float]]]]:
    """Medians over rounds in which the sources take turns, their order reversed in every second round."""
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(cfg.rounds):
        seconds = {}
        for name in list(sources)[:: 1 if number % 2 == 0 else -1]:
            before()
            seconds[name] = epoch_seconds(sources[name], cfg, epoch=number)
        rounds.append(seconds)
    clips = len(sources[SHARDS])
    rows = {
        name: {
            "clips_per_second": clips / median(row[name][0] for row in rounds),
            "throughput_over_files": median(row[FILES][0] / row[name][0] for row in rounds),
            "smallest": min(row[FILES][0] / row[name][0] for row in rounds),
            "largest": max(row[FILES][0] / row[name][0] for row in rounds),
            "processor_over_files": median(row[FILES][1] / row[name][1] for row in rounds),
        }
        for name in sources
    }
    return rows, rounds


def padding(seconds: np.ndarray, cfg: DictConfig) -> list[dict[str, Any]]:
    """What share of batches is padding: all of one length, as long as their longest clip, and bucketed."""
    order = np.random.default_rng(cfg.seed).permutation(len(seconds))
    longest = padding_fraction(seconds, order, cfg.batch_size)
    rows = [
        {"batches": "all of one length", "padding": 1 - float(seconds.mean() / seconds.max())},
        {"batches": "as long as their longest clip", "padding": longest},
    ]
    for window in cfg.bucket_batches:
        arranged = LengthBuckets(lambda epoch: seconds, window, cfg.seed)(order, 0, cfg.batch_size)
        share = padding_fraction(seconds, arranged, cfg.batch_size)
        rows.append({"batches": f"bucketed within {window}", "padding": share})
    return rows


@command("bench/shards")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    entries = read_manifest(cfg.manifest)
    chosen = [entries[index] for index in evenly_spaced(len(entries), cfg.num_clips)]
    with TemporaryDirectory(dir=cfg.work_dir) as name:
        folder = Path(name)
        flat = [replace(entry, split="train") for entry in chosen]
        write_shards(flat, str(folder), cfg.sample_rate_hz, shard_megabytes=cfg.shard_megabytes, max_fault_fraction=0.0)
        index, rate = ShardIndex.read(str(folder)), cfg.sample_rate_hz
        sources: dict[str, AudioSource] = {
            FILES: ClipSource(unpack(folder, flat), rate, None),
            SHARDS: ShardSource(index, "train", rate),
            ORIGINALS: ClipSource(flat, rate, None),
        }
        seconds = sources[SHARDS].durations_seconds(0)  # type: ignore[attr-defined]
        for source in sources.values():
            epoch_seconds(source, cfg, 0)  # warms up
        warm, warm_rounds = compare(sources, cfg, lambda: None)
        on_disk = {name: sources[name] for name in (FILES, SHARDS)}
        cold, cold_rounds = compare(on_disk, cfg, lambda: drop_from_cache(folder))
        result = {
            "clips": len(flat),
            "hours": float(seconds.sum()) / 3600,
            "shards": len(index.shards),
            "megabytes": sum(shard.num_bytes for shard in index.shards) / 2**20,
            "settings": {key: cfg[key] for key in ("sample_rate_hz", "batch_size", "num_workers", "rounds")},
            "warm": warm,
            "cold": cold,
            "seconds_by_round": {"warm": warm_rounds, "cold": cold_rounds},
            "padding": padding(seconds, cfg),
            "provenance": provenance(),
        }
    write_results(Path(cfg.page), shards=result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
