"""Where a spectral codec loses: in the phases, in what its spectra can say, or in its network.

Each way from clip to clip is the one before with one more part of the codec: phases guessed for the true magnitudes,
for its own spectra (as a perfect network would give them back), for what its network makes of them. What decides for
silence comes last, and is left out in turn.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor

from foley.cli.command import command
from foley.core.files import write_json
from foley.core.logs import get_logger
from foley.data.dataset import AudioItem, AudioSource, clip_name
from foley.data.ordering import evenly_spaced
from foley.metrics.reconstruction import mel_distance, signal_to_noise_by_direction
from foley.models.codec.spectral_vae import SpectralVAE
from foley.reporting.tables import format_rows, provenance
from foley.system.checkpoint import load_trained


def ways(codec: SpectralVAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """By name, ways from audio `[B, 1, T]` to audio `[B, 1, T or a little more]`.

    Where phases are learnt, those of "its spectra" are guessed, for no network has made them, and silence is its own.
    """

    def guess(log_magnitudes: Tensor) -> Tensor:
        magnitude = log_magnitudes[..., : codec.stft.bins].exp().clamp(max=codec.stft.full_scale)
        return codec.stft.invert_magnitude(magnitude, codec.phase_iterations)[:, None]

    return {
        "phases guessed": lambda audio: guess(codec.stft(audio[:, 0]).abs().log()),
        "its spectra": lambda audio: (guess if codec.learns_phases else codec.phase)(codec.spectra(audio)),
        "its network": codec.reconstruct,
        "its network, no silence": lambda audio: guess(codec.decode_spectra(codec.encode(audio))),
    }


def lose(codec: SpectralVAE, item: AudioItem) -> dict[str, Any]:
    """Of one clip the mel distance by each way, and how much of its spectra lies at their least value."""
    whole = item.num_samples // codec.hop_samples * codec.hop_samples  # whole frames: nothing is padded
    audio, rate_hz = torch.atleast_2d(item.audio)[None, :, :whole], codec.sample_rate_hz
    spectra = codec.spectra(audio)
    distances = {name: float(mel_distance(way(audio), audio, rate_hz)) for name, way in ways(codec).items()}
    return {"id": item.id, "at_the_least": float((spectra == spectra.min()).float().mean()), **distances}


def describe_latents(codec: SpectralVAE, items: list[AudioItem]) -> dict[str, float]:
    """How many directions of the latent say more than noise, and what a Gaussian channel would send by them."""
    posteriors = [codec.posterior(torch.atleast_2d(item.audio)[None]) for item in items]
    means, stds = (torch.cat([getattr(each, name)[0].T for each in posteriors]) for name in ("mean", "std"))  # [N, C]
    ratios = signal_to_noise_by_direction(means, stds)
    bits = float((1 + ratios).log2().sum() / 2)  # of a latent frame
    kilobits = bits * codec.sample_rate_hz / codec.hop_samples / 1000
    return {"channels": len(ratios), "directions": int((ratios > 1).sum()), "kilobits_per_second": kilobits}


def group_of(name: str) -> str:
    """The collection that a clip belongs to: the first folder of its name."""
    return name.split("/")[0]


def chosen(source: AudioSource, clips_per_group: int) -> list[int]:
    """Places of at most so many clips of each collection, spread evenly over it."""
    groups: dict[str, list[int]] = {}
    for index in range(len(source)):
        groups.setdefault(group_of(clip_name(source, index)), []).append(index)
    return [own[place] for own in groups.values() for place in evenly_spaced(len(own), clips_per_group)]


def summarise(clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the clips of each collection."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for clip in clips:
        groups.setdefault(group_of(clip["id"]), []).append(clip)
    return [
        {"group": name, "n": len(own), **{key: mean(clip[key] for clip in own) for key in own[0] if key != "id"}}
        for name, own in groups.items()
    ]


@command("bench/codec_loss")
@torch.no_grad()
def main(cfg: DictConfig) -> None:
    """Write `codec_loss.json`, and show it."""
    codec = load_trained(cfg.codec_path, "codec")
    if not isinstance(codec, SpectralVAE):
        raise ValueError(f"codec_path={cfg.codec_path} is a {type(codec).__name__}: give a SpectralVAE")
    dataset = instantiate(cfg.data, _convert_="all").whole_clips(cfg.max_duration_seconds)[cfg.split]
    shortest = cfg.minimum_seconds * codec.sample_rate_hz
    items = [dataset[index] for index in chosen(dataset.source, cfg.clips_per_group)]
    items = [item for item in items if item.num_samples >= shortest]
    clips = [lose(codec, item) for item in track(items, description="clips")]
    if not clips:
        raise ValueError(f"split={cfg.split} has no clip of minimum_seconds={cfg.minimum_seconds} or more")
    rows, latents = summarise(clips), describe_latents(codec, items)
    write_json(Path(cfg.output_dir) / "codec_loss.json", {"rows": rows, "latents": latents, "provenance": provenance()})
    columns = {"clips": "{group}", "n": "{n}", **{name: f"{{{name}:.2f}}" for name in ways(codec)}}
    get_logger(__name__).info("latents: %s", latents)
    get_logger(__name__).info("%s", format_rows(rows, {**columns, "at the least": "{at_the_least:.0%}"}))


if __name__ == "__main__":
    main()
