"""What clips are generated onto: their length, what is given of them, and what becomes of the decoded audio."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foley.core.rates import clip_size
from foley.data.audio import PEAK_CEILING
from foley.data.dataset import PeakLevel, gain_to_decibels
from foley.diffusion.guidance import KnownLatent
from foley.diffusion.sampler import Start
from foley.generation.editing import CROSS_FADE_SECONDS, EditMask, EditMasks, EditWindow, Recording, paste_fitted
from foley.models.dit.controlnet import ControlledTransformer


@dataclass(frozen=True)
class Canvas:
    """What clips are generated onto.

    Args:
        num_frames: L.
        finish: decoded audio `[B, channels, L * hop]` to the result `[B, channels, T]`, and the gain `[B]` of what was
            generated in it, on the CPU.
        description: what the JSON of each clip says of it.
        known: latent frames that are given.
        start: a latent to begin at instead of pure noise.
        more: further inputs of the denoiser, one row each.
        peak_ceiling: as `foley.data.audio.write_wav` takes it.
    """

    num_frames: int
    finish: Callable[[Tensor], tuple[Tensor, Tensor]]
    description: Mapping[str, Any]
    known: KnownLatent | None = None
    start: Start | None = None
    more: Mapping[str, Tensor] = field(default_factory=dict)
    peak_ceiling: float = PEAK_CEILING


def crop(audio: Tensor, num_samples: int, gain: float = 1.0) -> tuple[Tensor, Tensor]:
    """`[B, channels, T]` cut to `num_samples`, at `gain`, a recording's own level, which attenuates nothing."""
    return gain * audio[..., :num_samples], torch.ones(len(audio))


def edit_canvas(
    recording: Recording,
    mask: EditMask | EditMasks,
    window: EditWindow,
    hidden: Tensor,
    encode: Callable[[Tensor], Tensor],
) -> Canvas:
    """The `window` of `recording` with its masked part generated anew.

    Args:
        hidden: frames that are generated `[1, L]`.
        encode: audio `[T]` or `[channels, T]` to its normalised latent `[1, C, L]`.
    """
    known, gain, seen = None, 1.0, window.crop(recording.samples)
    if not bool(hidden.all()):
        gain = PeakLevel().gain(seen)
        known = KnownLatent(encode(gain * seen), hidden)
    description = {
        "duration_seconds": window.total / recording.sample_rate_hz,
        "level_gain_db": gain_to_decibels(gain),
        "edit": {**recording.describe(), **mask.describe(), "cross_fade_seconds": CROSS_FADE_SECONDS},
    }
    # Kept samples come back bit by bit, so the result is never attenuated as a whole.
    ceiling = inf if window.kept(recording.samples).shape[-1] else PEAK_CEILING
    return Canvas(
        hidden.shape[1],
        lambda audio: paste_fitted(recording.samples, audio / gain, window),
        description,
        known=known,
        peak_ceiling=ceiling,
    )


def variation_canvas(
    recording: Recording, strength: float, first_step: int, encode: Callable[[Tensor], Tensor]
) -> Canvas:
    """Variations of `recording`, from `first_step` on; `encode` is as for `edit_canvas`."""
    # At the first step of all nothing of the recording is heard, nor its level.
    gain = PeakLevel().gain(recording.samples) if first_step else 1.0
    start = Start(encode(gain * recording.samples), first_step)
    description = {
        "duration_seconds": recording.duration_seconds,
        "level_gain_db": gain_to_decibels(gain),
        "init": {**recording.describe(), "strength": strength, "first_step": first_step},
    }
    finish = partial(crop, num_samples=recording.samples.shape[-1], gain=1 / gain)
    return Canvas(start.clean.shape[-1], finish, description, start=start)


def control_canvas(
    recording: Recording,
    scale: float,
    denoiser: Any,
    hop_samples: int,
    trained_seconds: float | None,
    device: torch.device,
) -> Canvas:
    """What follows `recording`: as published, silence follows a short one up to the length of the training, and is cut.

    Raises ValueError for a denoiser without a ControlNet.
    """
    if not isinstance(denoiser, ControlledTransformer):
        raise ValueError(
            f"control={recording.file}: this system has no ControlNet; give system=ezaudio_l_energy, or one trained "
            "by experiment=controlnet"
        )
    seconds, num_samples = recording.duration_seconds, recording.samples.shape[-1]
    _, num_frames = clip_size(max(seconds, trained_seconds or 0), recording.sample_rate_hz, hop_samples)
    mixed = torch.atleast_2d(recording.samples).mean(dim=0, keepdim=True)  # of all channels, as in training
    curve = denoiser.curve(pad(mixed, (0, num_frames * hop_samples - num_samples)), hop_samples)
    more = {"control": curve.to(device), "control_scale": torch.full((1,), float(scale), device=device)}
    description = {"duration_seconds": seconds, "control": {**recording.describe(), "scale": scale}}
    return Canvas(num_frames, partial(crop, num_samples=num_samples), description, more=more)
