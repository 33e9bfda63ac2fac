"""VGGish (Hershey et al. 2017) as torchvggish publishes it, without PCA and without the final activation."""

import torch
from torch import Tensor, nn

from foley.metrics.extractors import ExtractorOutput
from foley.metrics.extractors.published import PowerSpectrum, PublishedWeights, mel_triangles

WEIGHTS = PublishedWeights(
    file="vggish-10086976.pth",
    url="https://github.com/harritaylor/torchvggish/releases/download/v0.1/vggish-10086976.pth",
    sha256="10086976",  # its name ends in the beginning of its hash
)

WINDOW_SAMPLES, HOP_SAMPLES, FRAMES = 400, 160, 96
"""An example is 96 frames of 10 ms."""

_FFT_SAMPLES, _MEL_BANDS, _LOWEST_HZ, _HIGHEST_HZ = 512, 64, 125.0, 7500.0
_LOG_OFFSET = 0.01
_LAYERS = (64, None, 128, None, 256, 256, None, 512, 512, None)


def _convolutions() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 1
    for width in _LAYERS:
        if width is None:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = width
    return nn.Sequential(*layers)


class Vggish(nn.Module):
    """One embedding for each whole example of 0.96 s; it has no classes."""

    sample_rate_hz, feature_dim = 16000, 128
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []
        self.label_groups: dict[str, list[str]] = {}
        # The window of 25 ms starts with its frame; `torch.stft` would centre it in the longer transform.
        window = nn.functional.pad(torch.hann_window(WINDOW_SAMPLES), (0, _FFT_SAMPLES - WINDOW_SAMPLES))
        self.spectrum = PowerSpectrum(_FFT_SAMPLES, HOP_SAMPLES, window, centred=False)
        filters = mel_triangles(_MEL_BANDS, _FFT_SAMPLES, self.sample_rate_hz, _LOWEST_HZ, _HIGHEST_HZ)
        self.register_buffer("filters", filters, persistent=False)
        self.features = _convolutions()
        self.embeddings = nn.Sequential(
            nn.Linear(512 * 4 * 6, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 4096), nn.ReLU(inplace=True),
            nn.Linear(4096, self.feature_dim),
        )  # fmt: skip

    def log_mel(self, audio: Tensor) -> Tensor:
        """Log of mel magnitude `[B, frames, 64]` of `audio [B, T]`, for frames that lie within it."""
        padded = nn.functional.pad(audio, (0, _FFT_SAMPLES - WINDOW_SAMPLES))
        return (self.spectrum(padded).sqrt() @ self.filters + _LOG_OFFSET).log()

    def forward(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, T]` -> features `[B, examples, 128]` and no logits."""
        frames = self.log_mel(audio)
        examples = frames[:, : frames.shape[1] // FRAMES * FRAMES].reshape(-1, 1, FRAMES, _MEL_BANDS)
        hidden = self.features(examples).permute(0, 2, 3, 1).flatten(1)
        features = self.embeddings(hidden).unflatten(0, (len(audio), -1))
        return ExtractorOutput(features, features.new_zeros(len(audio), 0))
