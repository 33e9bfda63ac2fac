"""Seconds, samples and latent frames."""

import math


def clip_size(duration_seconds: float, sample_rate_hz: int, hop_samples: int) -> tuple[int, int]:
    """The samples T of a clip, at least one, and the latent frames L that cover them."""
    num_samples = max(1, round(duration_seconds * sample_rate_hz))
    return num_samples, math.ceil(num_samples / hop_samples)
