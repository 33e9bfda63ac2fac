"""The small sound classifier that ships: log-mel spectrogram, strided convolutions, loudness-weighted pooling."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from foley.metrics.extractors import ExtractorOutput

_POWER_FLOOR_DB = -100.0


class RelativeLogMel(nn.Module):
    """Mel power in dB below the clip's loudest cell, scaled to [0, 1]; silence is exactly 0.

    Being relative makes it invariant to gain, and with silence at 0 the zero padding of a convolution is silence.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, sample_rate_hz: int, mel_bands: int, hop_samples: int, window_samples: int, range_db: float):
        super().__init__()
        self.hop_samples, self.window_samples, self.range_db = hop_samples, window_samples, range_db
        filters = melscale_fbanks(window_samples // 2 + 1, 30.0, sample_rate_hz / 2, mel_bands, sample_rate_hz)
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(window_samples), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """`audio [B, T]` -> `[B, mel_bands, frames]`."""
        return self.scale(self.power(audio))

    def power(self, audio: Tensor) -> Tensor:
        """Mel power `[B, mel_bands, frames]` of `audio [B, T]`."""
        spectrum = torch.stft(
            audio,
            self.window_samples,
            self.hop_samples,
            window=self.window,
            pad_mode="constant",
            return_complex=True,
        )
        return self.filters @ torch.view_as_real(spectrum).square().sum(dim=-1)

    def scale(self, power: Tensor) -> Tensor:
        """Mel power in relative dB, scaled to [0, 1]."""
        decibel = 10 * power.clamp_min(10 ** (_POWER_FLOOR_DB / 10)).log10()
        loudest = decibel.amax(dim=(1, 2), keepdim=True).clamp_min(_POWER_FLOOR_DB + self.range_db)
        return ((decibel - loudest) / self.range_db + 1).clamp_min(0)


class RelativeRootMel(RelativeLogMel):
    """Mel power over that of the clip's loudest cell, to the power of `exponent`: loudness rather than level.

    Hearing compresses power by such a law (Stevens 1957; perceptual linear prediction, Hermansky 1990, takes the cube
    root). Other than decibels it has no floor: what is faint fades, and is not cut off.
    """

    def __init__(self, sample_rate_hz: int, mel_bands: int, hop_samples: int, window_samples: int, exponent: float):
        super().__init__(sample_rate_hz, mel_bands, hop_samples, window_samples, -_POWER_FLOOR_DB)
        self.exponent = exponent

    def scale(self, power: Tensor) -> Tensor:
        """Mel power relative to the loudest cell, compressed, in [0, 1]."""
        loudest = power.amax(dim=(1, 2), keepdim=True).clamp_min(10 ** (_POWER_FLOOR_DB / 10))
        return (power / loudest).pow(self.exponent)


def _conv_block(inputs: int, outputs: int, stride: int | tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class EmbeddedExtractor(nn.Module):
    """Features and class logits of mono audio of any length.

    Args:
        labels: class names, one logit each.
        label_groups: named subsets of `labels`, reported apart by evaluations.
        widths: channels after each halving of the spectrogram; five halvings of 64 mel bands leave two.
        feature_dim: D, the size of the features on which Frechet distances are computed.
        exponent: of `RelativeRootMel`, in the place of decibels; None: `RelativeLogMel`.
    """

    def __init__(
        self,
        labels: Sequence[str],
        label_groups: Mapping[str, Sequence[str]],
        sample_rate_hz: int = 24000,
        mel_bands: int = 64,
        hop_samples: int = 240,
        window_samples: int = 1024,
        range_db: float = 60.0,
        widths: Sequence[int] = (24, 48, 96, 128, 160),
        feature_dim: int = 128,
        exponent: float | None = None,
    ) -> None:
        super().__init__()
        self.labels, self.label_groups = list(labels), {name: list(group) for name, group in label_groups.items()}
        self.sample_rate_hz, self.feature_dim = sample_rate_hz, feature_dim
        sizes = (sample_rate_hz, mel_bands, hop_samples, window_samples)
        self.spectrogram = RelativeLogMel(*sizes, range_db) if exponent is None else RelativeRootMel(*sizes, exponent)
        channels = [1, *widths]
        # The last block halves frequency only: what happens when is kept at 16 hops (0.16 s).
        strides: list[int | tuple[int, int]] = [2] * (len(widths) - 1) + [(2, 1)]
        self.blocks = nn.Sequential(*map(_conv_block, channels, channels[1:], strides))
        bands = mel_bands >> len(widths)
        self.temporal = nn.Sequential(
            nn.Conv1d(widths[-1] * bands, feature_dim, 1, bias=False),
            nn.BatchNorm1d(feature_dim),
            nn.ReLU(inplace=True),
            nn.Conv1d(feature_dim, feature_dim, 5, padding=2, bias=False),
            nn.BatchNorm1d(feature_dim),
            nn.ReLU(inplace=True),
        )
        self.project = nn.Linear(2 * feature_dim, feature_dim)
        self.classify = nn.Linear(feature_dim, len(self.labels))

    def forward(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, T]` float mono at `sample_rate_hz` -> features `[B, D]`, logits `[B, K]`."""
        return self.from_spectrogram(self.spectrogram(audio))

    def from_spectrogram(self, spectrogram: Tensor) -> ExtractorOutput:
        """As `forward`, from `RelativeLogMel` output `[B, mel_bands, frames]`."""
        hidden = self.temporal(self.blocks(spectrogram.unsqueeze(1)).flatten(1, 2))
        # Weights follow loudness, so that silence before, between or after sounds does not dilute them.
        loudness = nn.functional.adaptive_avg_pool1d(spectrogram.amax(dim=1, keepdim=True), hidden.shape[-1])
        weights = loudness / loudness.sum(dim=-1, keepdim=True).clamp_min(1e-6)
        mean = (hidden * weights).sum(dim=-1)
        variance = ((hidden - mean.unsqueeze(-1)).square() * weights).sum(dim=-1)
        features = self.project(torch.cat([mean, (variance + 1e-5).sqrt()], dim=1))
        return ExtractorOutput(features, self.classify(nn.functional.relu(features)))
