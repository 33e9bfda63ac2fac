"""PaSST at 32 kHz (Koutini et al. 2022): a vision transformer on log-mel patches, 527 AudioSet classes."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from foley.metrics.extractors import ExtractorOutput
from foley.metrics.extractors.published import PowerSpectrum, PublishedWeights, mel_triangles

WEIGHTS = PublishedWeights(
    file="passt-s-f128-p16-s10-ap.476-swa.pt",
    url="https://github.com/kkoutini/PaSST/releases/download/v0.0.1-audioset/passt-s-f128-p16-s10-ap.476-swa.pt",
    derived=r"head_dist\.",  # trained along, and not used
    renames=((r"^head\.0\.", "head_norm."), (r"^head\.1\.", "classify."), (r"\.attn\.", "."), (r"\.mlp\.", ".")),
)

WINDOW_SAMPLES = 320000
"""10 s, what the model was trained on."""

_FFT_SAMPLES, _HOP_SAMPLES, _WINDOW_SAMPLES = 1024, 320, 800
_MEL_BANDS, _LOWEST_HZ, _HIGHEST_HZ = 128, 0.0, 15000.0
_PREEMPHASIS, _LOG_OFFSET, _LOG_SHIFT, _LOG_SCALE = 0.97, 1e-5, 4.5, 5.0
_PATCH, _STRIDE, _GRID = 16, 10, (12, 99)
_CLASSES, _EPSILON = 527, 1e-6


class _Block(nn.Module):
    """Pre-norm attention and feed-forward (Dosovitskiy et al. 2021, eq. 2 and 3)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, _EPSILON), nn.LayerNorm(width, _EPSILON)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.proj(attended)
        return tokens + self.fc2(gelu(self.fc1(self.norm2(tokens))))


class Passt(nn.Module):
    """Class logits of windows of 10 s; a clip's are the mean over its windows. Its features are the mean token."""

    sample_rate_hz = 32000
    filters: Tensor

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12) -> None:
        super().__init__()
        self.feature_dim = width
        self.labels: list[str] = []  # of AudioSet's classes, which are not those of our clips
        self.label_groups: dict[str, list[str]] = {}
        window = torch.hann_window(_WINDOW_SAMPLES, periodic=False)
        self.spectrum = PowerSpectrum(_FFT_SAMPLES, _HOP_SAMPLES, window, centred=True)
        filters = mel_triangles(_MEL_BANDS, _FFT_SAMPLES, self.sample_rate_hz, _LOWEST_HZ, _HIGHEST_HZ)
        self.register_buffer("filters", filters, persistent=False)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, width, _PATCH, _STRIDE)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, _GRID[0], 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, _GRID[1]))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, _EPSILON)
        self.head_norm, self.classify = nn.LayerNorm(width), nn.Linear(width, _CLASSES)

    def log_mel(self, audio: Tensor) -> Tensor:
        """Scaled log of mel power `[B, 128, frames]` of `audio [B, T]`."""
        emphasised = audio[:, 1:] - _PREEMPHASIS * audio[:, :-1]
        power = self.spectrum(emphasised) @ self.filters
        return (((power + _LOG_OFFSET).log() + _LOG_SHIFT) / _LOG_SCALE).transpose(1, 2)

    def embed(self, audio: Tensor) -> Tensor:
        """Mean of class and distillation tokens `[B, width]` for windows `[B, 320000]`."""
        patches = self.patch_embed["proj"](self.log_mel(audio).unsqueeze(1))
        patches = patches + self.time_new_pos_embed[..., : patches.shape[-1]] + self.freq_new_pos_embed
        special = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        tokens = torch.cat([special.expand(len(audio), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, :2]).mean(dim=1)

    def forward(self, audio: Tensor) -> ExtractorOutput:
        """`audio [B, windows, 320000]` -> features `[B, width]`, logits `[B, 527]`."""
        tokens = self.embed(audio.flatten(0, 1)).unflatten(0, audio.shape[:2])
        return ExtractorOutput(tokens.mean(dim=1), self.classify(self.head_norm(tokens)).mean(dim=1))
