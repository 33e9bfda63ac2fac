"""Clips per second out of a latent cache in random order, from a cold disk and a warm one: by range, and by mapping."""

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.columns import TextLists, Texts
from foley.core.files import drop_from_cache, read_tensors, write_tensors
from foley.data.latent_format import LatentClips, LatentLayout, write_index, write_shard
from foley.data.latents import LatentCacheIndex, LatentReader
from foley.reporting.pages import write_results
from foley.reporting.tables import provenance

MAPPED, RANGES, BATCHES = "mapped", "ranges", "batches"
Read = Callable[[list[int]], None]
"""Reads the clips at these rows of the table."""

_BLOCK_BYTES = 1 << 20


def table(cfg: DictConfig, in_shard: int) -> LatentClips:
    """Of clips of equal length, `in_shard` of them in each shard."""
    numbers = np.arange(cfg.num_clips)
    texts = Texts.of(f"clip-{number:07d}" for number in range(cfg.num_clips))
    return LatentClips(
        id=texts,
        caption=texts,
        label=texts,
        other_captions=TextLists(Texts.of([]), np.zeros(cfg.num_clips, np.int64)),
        split=np.zeros(cfg.num_clips, np.uint8),
        shard=(numbers // in_shard).astype(np.int32),
        first_frame=numbers % in_shard * cfg.num_frames,
        num_frames=np.full(cfg.num_clips, cfg.num_frames, np.int32),
        duration_seconds=np.full(cfg.num_clips, cfg.num_frames / 50),
    )


def write_caches(folder: Path, cfg: DictConfig) -> None:
    """One cache by ranges, and beside it the shards of one that is mapped, mean and std apart, of the same size."""
    layout = LatentLayout("bench", 24000, 480, cfg.channels, "mean_std", ("train",))
    in_shard = max(1, (cfg.shard_megabytes << 20) // (cfg.num_frames * layout.frame_bytes))
    clips = table(cfg, in_shard)
    generator = torch.Generator().manual_seed(cfg.seed)
    latent = torch.randn(in_shard * cfg.num_frames, 2, cfg.channels, generator=generator).half()
    tensors = {"mean": latent[:, 0].contiguous(), "std": latent[:, 1].contiguous()}
    shards = []
    for number in range(-(-cfg.num_clips // in_shard)):
        own = clips.take(np.flatnonzero(clips.shard == number))
        own = replace(own, shard=np.zeros(len(own), np.int32))
        shards.append(write_shard(folder / RANGES / f"latents-00000-{number:05d}.safetensors", latent, own, layout))
        write_tensors(folder / MAPPED / f"{number:05d}.safetensors", tensors)
    write_index(folder / RANGES, layout, clips, shards, (torch.zeros(cfg.channels), torch.ones(cfg.channels)))


def open_mapped(folder: Path) -> Read:
    """Clips as caches of earlier formats were read: each a part of two mapped tensors."""
    clips = LatentCacheIndex.read(folder / RANGES).clips
    shards = [read_tensors(path) for path in sorted((folder / MAPPED).glob("*.safetensors"))]

    def read(rows: list[int]) -> None:
        for row in rows:
            start, shard = int(clips.first_frame[row]), shards[clips.shard[row]]
            for name in ("mean", "std"):
                shard[name][start : start + int(clips.num_frames[row])].clone()

    return read


def open_ranges(folder: Path, together: int) -> Read:
    """Each by one range of its shard, and so many asked for before the first of them is read."""
    index = LatentCacheIndex.read(folder / RANGES)
    reader = LatentReader(index)
    for row in np.unique(index.clips.shard, return_index=True)[1].tolist():
        reader.read(row, 0, 1)  # the headers are compared at the first reading of a shard

    def read(rows: list[int]) -> None:
        for start in range(0, len(rows), together):
            places = [(row, 0, int(index.clips.num_frames[row])) for row in rows[start : start + together]]
            if together > 1:
                reader.prefetch(places)
            for place in places:
                reader.read(*place)

    return read


def bytes_from_disk() -> int | None:
    """That this process and those it has waited for had read; None where the system does not tell."""
    path = Path("/proc/self/io")
    if not path.is_file():
        return None
    return int(next(line.split()[1] for line in path.read_text().splitlines() if line.startswith("read_bytes")))


def make_cold(folder: Path) -> str:
    """Have `folder` read from the disk: dropped from the system's cache, or else written anew past it."""
    if drop_from_cache(folder):
        return "dropped from the system's cache"
    for path in folder.rglob("*.safetensors"):
        write_past_cache(path)
    return "written anew past the system's cache"


def write_past_cache(path: Path) -> None:
    """Put a copy in the place of a file whose pages the system has not kept."""
    copy, content = path.with_suffix(".copy"), path.read_bytes()
    handle = os.open(copy, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(handle, fcntl.F_NOCACHE, 1)
    with mmap.mmap(-1, _BLOCK_BYTES) as block:  # aligned to pages, as writes past the cache must be
        for start in range(0, len(content), _BLOCK_BYTES):
            part = content[start : start + _BLOCK_BYTES]
            block[: len(part)] = part
            os.write(handle, block)
    os.close(handle)
    os.truncate(copy, len(content))
    os.replace(copy, path)


def measure(read: Read, rows: list[int], clip_bytes: int) -> dict[str, Any]:
    """Clips per second, and bytes from the disk over bytes asked for."""
    before, start = bytes_from_disk(), time.perf_counter()
    read(rows)
    seconds, after = time.perf_counter() - start, bytes_from_disk()
    amplification = None if after is None or before is None else (after - before) / (len(rows) * clip_bytes)
    return {"clips_per_second": len(rows) / seconds, "amplification": amplification}


def measured_rounds(
    ways: dict[str, Callable[[], Read]], folder: Path, cfg: DictConfig, clip_bytes: int
) -> tuple[dict[str, list[dict[str, dict[str, Any]]]], str]:
    """All ways in turns, from a cold disk and then again from memory; and how it was made cold."""
    found: dict[str, list[dict[str, dict[str, Any]]]] = {"cold": [], "warm": []}
    how = ""
    for number in range(cfg.rounds):
        rows = np.random.default_rng([cfg.seed, number]).permutation(cfg.num_clips)[: cfg.num_reads].tolist()
        cold, warm = {}, {}
        for way in list(ways)[:: 1 if number % 2 == 0 else -1]:
            read = ways[way]()
            how = make_cold(folder)
            cold[way] = measure(read, rows, clip_bytes)
            warm[way] = measure(read, rows, clip_bytes)
        found["cold"].append(cold)
        found["warm"].append(warm)
    return found, how


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over rounds; ratios are taken within a round."""
    ratios = {
        name: [row[name]["clips_per_second"] / row[MAPPED]["clips_per_second"] for row in rounds] for name in rounds[0]
    }
    return {
        name: {
            "clips_per_second": median(row[name]["clips_per_second"] for row in rounds),
            "amplification": median(row[name]["amplification"] or 0.0 for row in rounds),
            "over_mapped": median(ratios[name]),
            "smallest": min(ratios[name]),
            "largest": max(ratios[name]),
        }
        for name in rounds[0]
    }


@command("bench/data")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(1)
    clip_bytes = 2 * 2 * cfg.channels * cfg.num_frames
    with TemporaryDirectory(dir=cfg.work_dir) as name:
        folder = Path(name)
        write_caches(folder, cfg)
        ways: dict[str, Callable[[], Read]] = {
            MAPPED: lambda: open_mapped(folder),
            RANGES: lambda: open_ranges(folder, together=1),
            BATCHES: lambda: open_ranges(folder, together=cfg.batch_size),
        }
        found, how = measured_rounds(ways, folder, cfg, clip_bytes)
    result = {
        "clips": cfg.num_clips,
        "megabytes": cfg.num_clips * clip_bytes / 2**20,
        "clip_kilobytes": clip_bytes / 1e3,
        "settings": {key: cfg[key] for key in ("num_reads", "rounds", "shard_megabytes", "batch_size")},
        "made_cold": how,
        **{kind: summary(rounds) for kind, rounds in found.items()},
        "rounds": found,
        "provenance": provenance(),
    }
    write_results(Path(cfg.page), latents=result)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
