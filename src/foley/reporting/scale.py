"""How a cost grows with the work, from measurements; and what preparing data and training cost at a size, on paper."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SECONDS_PER_HOUR = 3600.0
_LARGEST_EXPONENT = 1.1
_SETUP_SECONDS = 0.05


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The k of cost = a * size^k that fits best: the slope of least squares between the logarithms.

    Raises ValueError for fewer than two different sizes, and costs that are not positive.

    >>> round(growth_exponent([1, 10, 100], [3.0, 300.0, 30000.0]), 6)
    2.0
    """
    if len(set(sizes)) < 2 or min([*costs, 1.0]) <= 0:
        raise ValueError(f"growth needs costs above 0 at two sizes or more, got {list(costs)} at {list(sizes)}")
    size, cost = np.log(np.asarray(sizes, float)), np.log(np.asarray(costs, float))
    centred = size - size.mean()
    return float((centred * cost).sum() / (centred * centred).sum())


def grows_too_fast(exponent: float, largest_seconds: float) -> bool:
    """Whether a cost grows faster than the work, allowing for logarithms; what ends at once at any size does not.

    >>> grows_too_fast(1.3, largest_seconds=4.0), grows_too_fast(1.3, largest_seconds=0.01)
    (True, False)
    """
    return exponent > _LARGEST_EXPONENT and largest_seconds > _SETUP_SECONDS


@dataclass(frozen=True)
class TrainingPlan:
    """A training of a transformer on cached latents, on paper: bytes, rates and hours in closed form.

    Args:
        clips, clip_frames, channels: of the latents, whose values are `latent_bytes` each.
        text_tokens, text_width: of a caption's embedding, whose values are `text_bytes` each.
        parameters, depth, width: of the denoiser.
        steps, batch_size: of the training; the batch is the sum over `gpus`.
        peak_flops_per_second: of one GPU.
        state_bytes: of a parameter in a checkpoint.
    """

    clips: int
    clip_frames: int
    channels: int
    text_tokens: int
    text_width: int
    parameters: int
    depth: int
    width: int
    steps: int
    batch_size: int
    gpus: int
    peak_flops_per_second: float
    latent_bytes: int = 2
    text_bytes: int = 2
    state_bytes: int = 16  # weights, both moments of AdamW, and the average, in float32

    def clip_bytes(self, values: int) -> int:
        """Of one clip's latents; `values` is 2 for mean and standard deviation, 1 for a latent alone."""
        return values * self.clip_frames * self.channels * self.latent_bytes

    @property
    def caption_bytes(self) -> int:
        """Of one caption's embedding."""
        return self.text_tokens * self.text_width * self.text_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Of one file."""
        return self.parameters * self.state_bytes

    @property
    def step_flops(self) -> float:
        """Of all GPUs: 6 N + 12 L H Q T a token (Chowdhery et al. 2022, PaLM, appendix B), where H Q is the width."""
        token = 6 * self.parameters + 12 * self.depth * self.width * self.clip_frames
        return float(token * self.clip_frames * self.batch_size)

    def step_seconds(self, utilisation: float) -> float:
        """Where that share of the peak is used."""
        return self.step_flops / (self.gpus * self.peak_flops_per_second * utilisation)

    def hours(self, utilisation: float) -> float:
        """Of the whole training."""
        return self.steps * self.step_seconds(utilisation) / _SECONDS_PER_HOUR

    def clips_per_second(self, utilisation: float) -> float:
        """That one GPU asks of its loader."""
        return self.batch_size / self.gpus / self.step_seconds(utilisation)

    def read_bytes_per_second(self, utilisation: float, values: int) -> float:
        """Of latents and captions, for one GPU."""
        return self.clips_per_second(utilisation) * (self.clip_bytes(values) + self.caption_bytes)

    @property
    def epochs(self) -> float:
        """How often each clip is seen."""
        return self.steps * self.batch_size / self.clips


@dataclass(frozen=True)
class DataStage:
    """A step from recordings to a cache, on paper, by what one clip takes; all of it in closed form.

    Args:
        name: of the stage, and `command`, of foley.
        flops: of networks.
        processor_seconds: of one core, which decodes, resamples and looks things up.
        clip_bytes: that are written.

    On 8 GPUs at 15 % of 312 TFLOP/s, each with 12 cores, a million clips:

    >>> stage = DataStage("encode", "encode", flops=5e11, processor_seconds=0.03, clip_bytes=256_000)
    >>> round(stage.hours(1_000_000, 8, 12, 0.15 * 312e12), 2), stage.limit(12, 0.15 * 312e12)
    (0.37, 'GPUs')
    """

    name: str
    command: str
    flops: float
    processor_seconds: float
    clip_bytes: float

    def seconds(self, cores: int, flops_per_second: float) -> float:
        """Of a clip on one GPU with so many cores: the slower of the two, for loaders work ahead."""
        return max(self.flops / flops_per_second, self.processor_seconds / cores)

    def hours(self, clips: int, gpus: int, cores: int, flops_per_second: float) -> float:
        """Of all clips on `gpus`, each with `cores`."""
        return clips * self.seconds(cores, flops_per_second) / gpus / _SECONDS_PER_HOUR

    def limit(self, cores: int, flops_per_second: float) -> str:
        """What it waits for."""
        return "GPUs" if self.flops / flops_per_second > self.processor_seconds / cores else "processors"
