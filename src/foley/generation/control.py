"""Following the loudness of a recording, by a system with a ControlNet (`foley.models.dit.controlnet`)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from foley.core.channels import check_downmix
from foley.core.numbers import NumberRange
from foley.core.rates import clip_size
from foley.generation.editing import Canvas, Recording, crop
from foley.models.dit.controlnet import ControlledTransformer


@dataclass(frozen=True)
class Control:
    """What to follow: the loudness of the recording in `file`. Clips have its length.

    `scale` is how far: 0 not at all, 1 as in training. `downmix` is as of an `Edit`. ValueError for a scale below 0.
    """

    file: str | Path
    scale: float = 1.0
    downmix: str = "mean"

    def __post_init__(self) -> None:
        check_downmix(self.downmix)
        NumberRange(least=0).check("control_scale", self.scale)


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
    seconds, num_samples = recording.duration_seconds, len(recording.samples)
    _, num_frames = clip_size(max(seconds, trained_seconds or 0), recording.sample_rate_hz, hop_samples)
    audio = pad(recording.samples, (0, num_frames * hop_samples - num_samples))
    curve = denoiser.curve(audio[None], hop_samples)
    more = {"control": curve.to(device), "control_scale": torch.full((1,), float(scale), device=device)}
    description = {"duration_seconds": seconds, "control": {**recording.describe(), "scale": scale}}
    return Canvas(num_frames, partial(crop, num_samples=num_samples), description, more=more)
