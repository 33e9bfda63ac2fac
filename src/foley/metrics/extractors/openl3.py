"""OpenL3 with 256 mel bands and 512 features (Cramer et al. 2019), as torchopenl3 publishes it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad, relu

from foley.metrics.extractors import ExtractorOutput
from foley.metrics.extractors.published import PowerSpectrum, PublishedWeights

_FFT_SAMPLES, _HOP_SAMPLES, _MEL_BANDS = 2048, 242, 256
_POWER_FLOOR, _RANGE_DB = 1e-10, 80.0
_KERAS_EPSILON = 0.001
_WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)
_POOLED_AFTER = (2, 4, 6)
_FINAL_POOL = (32, 24)
_SLICE_CLIPS = 32


def openl3_weights(content: str) -> PublishedWeights:
    """Weights trained on `content`, "env" or "music"."""
    file = f"torchopenl3_mel256_{content}_512.pth.tar"
    return PublishedWeights(
        file=file,
        url=f"https://github.com/torchopenl3/torchopenl3-models/raw/master/{file}",
        derived=r"speclayer\.dft_",
        renames=(
            (r"^speclayer\.mel_basis$", "filters"),
            (r"^audio_embedding_layer\.", "convolutions.7."),
            *((rf"^conv2d_{i}\.", f"convolutions.{i - 1}.") for i in range(1, 8)),
            *((rf"^batch_normalization_{i}\.", f"norms.{i - 1}.") for i in range(1, 9)),
        ),
    )


class OpenL3(nn.Module):
    """An embedding for each window of 1 s, every half second, of each channel; those of two channels are joined."""

    sample_rate_hz = 48000
    window_samples, window_hop_samples = 48000, 24000
    filters: Tensor

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.feature_dim = channels * _WIDTHS[-1]
        self.labels: list[str] = []
        self.label_groups: dict[str, list[str]] = {}
        self.spectrum = PowerSpectrum(_FFT_SAMPLES, _HOP_SAMPLES, torch.hann_window(_FFT_SAMPLES), centred=False)
        self.register_buffer("filters", torch.zeros(_MEL_BANDS, _FFT_SAMPLES // 2 + 1))
        inputs = (1, *_WIDTHS[:-1])
        self.norms = nn.ModuleList(nn.BatchNorm2d(width, eps=_KERAS_EPSILON) for width in inputs)
        self.convolutions = nn.ModuleList(map(_convolution, inputs, _WIDTHS))

    def decibel(self, audio: Tensor) -> Tensor:
        """Mel amplitude `[B, 256, frames]` of windows `[B, 48000]`, in dB below each window's loudest cell."""
        remainder = self.window_samples % _HOP_SAMPLES
        padding = _FFT_SAMPLES - remainder  # Keras' "same", which depends on the window's length
        padded = pad(audio, (padding // 2, padding - padding // 2))
        amplitude = (self.filters @ self.spectrum(padded).transpose(1, 2)).sqrt()
        levels = 10 * amplitude.clamp_min(_POWER_FLOOR).log10()
        return (levels - levels.amax(dim=(1, 2), keepdim=True)).clamp_min(-_RANGE_DB)

    def embed(self, audio: Tensor) -> Tensor:
        """Embeddings `[B, 512]` of windows `[B, 48000]`."""
        hidden = self.norms[0](self.decibel(audio).unsqueeze(1))
        for index, convolution in enumerate(self.convolutions):
            hidden = convolution(hidden)
            if index + 1 < len(self.norms):
                hidden = relu(self.norms[index + 1](hidden))
            if index + 1 in _POOLED_AFTER:
                hidden = max_pool2d(hidden, 2)
        return max_pool2d(hidden, _FINAL_POOL).flatten(1)

    def forward(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, channels, T]` -> features `[B, windows, feature_dim]` and no logits."""
        windows = audio.unfold(-1, self.window_samples, self.window_hop_samples)
        parts = windows.reshape(-1, self.window_samples).split(_SLICE_CLIPS)
        embedded = torch.cat([self.embed(part) for part in parts]).view(*windows.shape[:3], -1)
        return ExtractorOutput(embedded.transpose(1, 2).flatten(2), audio.new_zeros(len(audio), 0))


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
