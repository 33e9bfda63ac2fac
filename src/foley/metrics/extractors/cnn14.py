"""Cnn14 of PANNs at 16 kHz (Kong et al. 2020, table I): 527 AudioSet classes, 2048 features."""

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from foley.metrics.extractors import ExtractorOutput
from foley.metrics.extractors.published import PowerSpectrum, PublishedWeights

WEIGHTS = PublishedWeights(
    file="Cnn14_16k_mAP=0.438.pth",
    url="https://zenodo.org/records/3987831/files/Cnn14_16k_mAP%3D0.438.pth",
    section="model",
    derived=r"spectrogram_extractor\.",
    renames=(
        (r"^logmel_extractor\.melW$", "filters"),
        (r"^bn0\.", "norm."),
        (r"^conv_block(\d)\.", r"blocks.\1."),
        (r"^fc1\.", "features."),
        (r"^fc_audioset\.", "classify."),
    ),
)

_FFT_SAMPLES, _HOP_SAMPLES, _MEL_BANDS, _CLASSES = 512, 160, 64, 527
_POWER_FLOOR = 1e-10
_WIDTHS = (64, 128, 256, 512, 1024, 2048)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, hidden: Tensor) -> Tensor:
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(hidden))))))


class Cnn14(nn.Module):
    """Features after the last hidden layer's ReLU and class logits, as AudioLDM-eval takes them."""

    sample_rate_hz, feature_dim = 16000, _WIDTHS[-1]
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[str] = []  # of AudioSet's classes, which are not those of our clips
        self.label_groups: dict[str, list[str]] = {}
        self.spectrum = PowerSpectrum(_FFT_SAMPLES, _HOP_SAMPLES, torch.hann_window(_FFT_SAMPLES), centred=True)
        self.register_buffer("filters", torch.zeros(_FFT_SAMPLES // 2 + 1, _MEL_BANDS))
        self.norm = nn.BatchNorm2d(_MEL_BANDS)
        inputs = (1, *_WIDTHS)
        self.blocks = nn.ModuleDict({str(i): _Block(*inputs[i - 1 : i + 1]) for i in range(1, len(inputs))})
        self.features = nn.Linear(_WIDTHS[-1], _WIDTHS[-1])
        self.classify = nn.Linear(_WIDTHS[-1], _CLASSES)

    def forward(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, T]` -> features `[B, 2048]`, logits `[B, 527]`."""
        decibel = 10 * (self.spectrum(audio) @ self.filters).clamp_min(_POWER_FLOOR).log10()
        hidden = self.norm(decibel.unsqueeze(1).transpose(1, 3)).transpose(1, 3)
        for name, block in self.blocks.items():
            hidden = block(hidden)
            if name != str(len(_WIDTHS)):
                hidden = avg_pool2d(hidden, 2)
        hidden = hidden.mean(dim=3)
        features = relu(self.features(hidden.amax(dim=2) + hidden.mean(dim=2)))
        return ExtractorOutput(features, self.classify(features))
