"""Reconstruct a test split with a codec or a baseline: SI-SDR, mel and STFT distance, ViSQOL, pairs to listen to."""

from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track

from foley.cli.command import command, renamed
from foley.core.devices import resolve_device
from foley.core.files import slug, write_json
from foley.core.hashing import hash_module
from foley.core.logs import get_logger
from foley.data.audio import write_flac
from foley.data.dataset import AudioDataset, AudioItem
from foley.data.ordering import evenly_spaced
from foley.metrics.reconstruction import mel_distance, si_sdr, stft_distance, visqol
from foley.reporting.plots import draw_sheet
from foley.reporting.tables import provenance
from foley.system.checkpoint import load_trained


def score(codec: Any, item: AudioItem, perceived: bool) -> dict[str, Any]:
    """The distances of one clip, and how alike it sounds where that is `perceived`."""
    original = torch.atleast_2d(item.audio)[None]
    restored = codec.reconstruct(original).cpu()
    return {
        "id": item.id,
        "label": item.label,
        "seconds": item.num_samples / codec.sample_rate_hz,
        "si_sdr_db": float(si_sdr(restored, original)),
        "mel_distance": float(mel_distance(restored, original, codec.sample_rate_hz)),
        "stft_distance": float(stft_distance(restored, original)),
        **({"visqol": float(visqol(restored, original, codec.sample_rate_hz))} if perceived else {}),
    }


def summarise(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over clips, and the median of the SI-SDR, which a few inaudible clips would drown."""
    scores: list[str] = [name for name in ("si_sdr_db", "mel_distance", "stft_distance", "visqol") if name in clips[0]]
    means = {name: mean(clip[name] for clip in clips) for name in scores}
    return {"n": len(clips), **means, "si_sdr_db_median": median(clip["si_sdr_db"] for clip in clips)}


def varied(clips: dict[int, dict[str, Any]], count: int) -> list[int]:
    """Indices of at most `count` clips of different labels, as far as there are so many."""
    by_label = {clip["label"]: index for index, clip in reversed(clips.items())}
    first = sorted(by_label.values())
    chosen = [first[place] for place in evenly_spaced(len(first), count)]
    rest = [index for index in clips if index not in by_label.values()]
    return chosen + [rest[place] for place in evenly_spaced(len(rest), count - len(chosen))] if rest else chosen


def keep_pairs(codec: Any, dataset: AudioDataset, indices: list[int], directory: Path, seconds: float) -> None:
    """The first `seconds` of the clips at `indices` and of their reconstructions, and a sheet of their spectrograms."""
    directory.mkdir(parents=True, exist_ok=True)
    clips, titles = [], []
    for index in indices:
        item = dataset[index]
        original = torch.atleast_2d(item.audio)[:, : round(seconds * codec.sample_rate_hz)]
        pair = {"original": original, "reconstruction": codec.reconstruct(original[None])[0].cpu()}
        for kind, audio in pair.items():
            write_flac(directory / f"{index:04d}_{slug(item.caption)}_{kind}.flac", audio, codec.sample_rate_hz)
            clips.append(audio)
            titles.append(f"{item.caption} ({kind})")
    draw_sheet(directory / "pairs.png", clips, titles, codec.sample_rate_hz)


@command("script/score_codec", check=renamed(codec_ckpt="codec_path"))
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write `codec.json` and the pairs."""
    device = resolve_device(cfg.device)
    codec = instantiate(cfg.baseline) or load_trained(cfg.codec_path, "codec")
    codec = codec.to(device)
    # Levelled as in training and encoding: elsewhere quiet clips would be strangers to the codec.
    dataset = instantiate(cfg.data, _convert_="all").whole_clips(cfg.max_duration_seconds)[cfg.split]
    shortest = cfg.minimum_seconds * codec.sample_rate_hz
    clips = {}
    for index in track(evenly_spaced(len(dataset), cfg.num_clips or len(dataset)), description="reconstructing"):
        item = dataset[index]
        if item.num_samples >= shortest:
            clips[index] = score(codec, item, cfg.visqol)
    if not clips:
        raise ValueError(f"split={cfg.split} has no clip of minimum_seconds={cfg.minimum_seconds} or more")
    summary = {**summarise(list(clips.values())), "kilobits_per_second": codec.kilobits_per_second}
    facts = {"codec_hash": hash_module(codec), "split": cfg.split, "provenance": provenance()}
    write_json(Path(cfg.output_dir) / "codec.json", {**facts, "summary": summary, "clips": list(clips.values())})
    if cfg.num_pairs:
        keep_pairs(codec, dataset, varied(clips, cfg.num_pairs), Path(cfg.output_dir) / "pairs", cfg.pair_seconds)
    get_logger(__name__).info("%s", {name: round(value, 3) for name, value in summary.items()})


if __name__ == "__main__":
    main()
