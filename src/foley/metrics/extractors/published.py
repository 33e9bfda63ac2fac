"""What the published extractors share: their weights, found or named with source and hash, and their spectrograms."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from foley.core.components import CheckpointError, load_state, read_pickle
from foley.core.hashing import hash_file

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class PublishedWeights:
    """A file of weights, by name and source.

    Args:
        sha256: of the file, or how it begins; None where its authors publish none.
        section: what the state dict is wrapped in, where it is.
        renames: pattern and replacement, applied in order to every published name.
        derived: pattern of names that hold no learned values and are computed here instead, such as Fourier kernels.
    """

    file: str
    url: str
    sha256: str | None = None
    section: str | None = None
    renames: Sequence[tuple[str, str]] = ()
    derived: str | None = None

    def find(self, directory: Path, sha256: str | None = None) -> Path:
        """The file in `directory`; raises CheckpointError where it is absent or not the expected one.

        Args:
            sha256: expect this hash instead of the known one.
        """
        path, expected = directory / self.file, sha256 or self.sha256
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist (expected SHA-256: {expected or 'none is published'}). Source: {self.url}. "
                "Fetch it where there is a network and put it at that path, or give its folder as paths.weights_dir=DIR"
            )
        if expected is not None and not (found := hash_file(path)).startswith(expected):
            raise CheckpointError(f"{path} has SHA-256 {found}, expected {expected}; fetch it again from {self.url}")
        return path

    def load(self, module: Module, path: Path) -> Module:
        """`module` in eval mode with the weights at `path`; raises CheckpointError that lists keys that disagree."""
        content = read_pickle(path, mmap=True)
        state = content.get(self.section) if self.section and isinstance(content, Mapping) else content
        load_state(module, self.renamed(require_tensors(state, path)), str(path))
        return module.requires_grad_(False).eval()

    def renamed(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` under our names."""
        kept = {name: value for name, value in state.items() if not (self.derived and re.match(self.derived, name))}
        for pattern, replacement in self.renames:
            kept = {re.sub(pattern, replacement, name): value for name, value in kept.items()}
        return kept


def require_tensors(state: Any, path: Path) -> Mapping[str, Tensor]:
    """`state` where it is a state dict; raises CheckpointError."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no state dict; give the file as published")
    return state


class PowerSpectrum(nn.Module):
    """Squared magnitudes `[B, frames, bins]` of `audio [B, T]`; `window` is centred in the transform."""

    window: Tensor

    def __init__(self, fft_samples: int, hop_samples: int, window: Tensor, centred: bool) -> None:
        super().__init__()
        self.fft_samples, self.hop_samples, self.centred = fft_samples, hop_samples, centred
        self.register_buffer("window", window, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        spectrum = torch.stft(
            audio,
            self.fft_samples,
            self.hop_samples,
            len(self.window),
            self.window,
            center=self.centred,
            return_complex=True,
        )
        return torch.view_as_real(spectrum).square().sum(dim=-1).transpose(1, 2)


def mel_triangles(bands: int, fft_samples: int, sample_rate_hz: int, lowest_hz: float, highest_hz: float) -> Tensor:
    """Filters `[bins, bands]` that are triangles over mel, as in Kaldi and VGGish; torchaudio's are over hertz."""
    bins = torch.linspace(0, sample_rate_hz / 2, fft_samples // 2 + 1, dtype=torch.float64)
    limits = torch.tensor([lowest_hz, highest_hz], dtype=torch.float64)
    low, high = _mel(limits).tolist()
    edges = torch.linspace(low, high, bands + 2, dtype=torch.float64)
    rise = (_mel(bins)[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - _mel(bins)[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise, fall).clamp_min(0).float()


def _mel(hertz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hertz / 700)
