"""Spectral distances between waveforms, the main reconstruction terms of the codec."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

from foley.core.channels import to_mid_side

_SMALLEST_BAND = 1e-4  # keeps the logarithm finite


def magnitude(audio: Tensor, window: Tensor) -> Tensor:
    """`[B, T]` to STFT magnitudes `[B, F, frames]` with a hop of a quarter of the window."""
    # 1 + T // hop frames, centred.
    return torch.stft(audio, len(window), len(window) // 4, window=window, return_complex=True).abs()


def each_channel(audio: Tensor, mid_side: bool = False) -> Tensor:
    """`[B, A, T]` to `[B A, T]`, whose channels are compared one by one; with `mid_side`, middle and side of two, too.

    An error that is small in each channel may be large beside their difference, which is often quiet, or loud in their
    sum (Steinmetz et al. 2020, "Automatic multitrack mixing", compare sums and differences). Raises ValueError for
    middle and side of another number of channels.

    >>> each_channel(torch.tensor([[[3.0], [1.0]]]), mid_side=True).flatten().tolist()
    [3.0, 1.0, 2.0, 1.0]
    """
    if mid_side and audio.shape[1] != 2:
        raise ValueError(f"mid_side=true compares middle and side of [B, 2, T], got shape {list(audio.shape)}")
    heard = torch.cat([audio, to_mid_side(audio)], dim=1) if mid_side else audio
    return heard.flatten(0, 1)


def a_weighting(frequencies_hz: Tensor) -> Tensor:
    """Amplitude gain of the A-weighting curve (IEC 61672-1), 1 at 1 kHz and 0 at 0 Hz; same shape as the input."""
    square = frequencies_hz.double().square()  # f^2, in double precision: f^4 follows
    corners = ((square + 107.7**2) * (square + 737.9**2)).sqrt()  # the two single poles
    # Poles at 20.6, 107.7, 737.9 and 12194 Hz, the first and the last of them double.
    response = 12194.0**2 * square.square() / ((square + 20.6**2) * corners * (square + 12194.0**2))
    return (response * 10 ** (2.0 / 20)).float()  # 2 dB make it 1 at 1 kHz


class MultiResolutionSTFTLoss(nn.Module):
    """Spectral convergence plus L1 of log magnitudes, averaged over resolutions (Yamamoto et al. 2020, eqs. 3-6).

    With magnitudes S of the target and P of the prediction, `|S - P|_F / |S|_F + mean |log S - log P|`. A-weighting is
    applied to the bins of the spectrum, where it is exact, rather than as a filter on the waveform.

    Args:
        sample_rate_hz: of the audio; it places the bins on the weighting curve.
        fft_sizes: window lengths in samples; the hop is a quarter of each.
        floor: smallest magnitude told apart from silence.
        mid_side: as `each_channel` takes it.

    Example:
        >>> loss, audio = MultiResolutionSTFTLoss(24000), torch.randn(2, 1, 4800)
        >>> loss(audio, audio).item(), loss(0.5 * audio, audio) < loss(0.1 * audio, audio)
        (0.0, tensor(True))
    """

    def __init__(
        self,
        sample_rate_hz: int,
        fft_sizes: Sequence[int] = (1280, 640, 320, 160, 80, 40, 20),
        floor: float = 1e-4,
        mid_side: bool = False,
    ) -> None:
        super().__init__()
        self.mid_side = mid_side
        self.fft_sizes = tuple(fft_sizes)
        self.floor = floor
        for size in fft_sizes:
            weighting = a_weighting(torch.fft.rfftfreq(size, 1 / sample_rate_hz))
            self.register_buffer(f"window_{size}", torch.hann_window(size), persistent=False)
            # [bins, 1], over the frames.
            self.register_buffer(f"weighting_{size}", weighting[:, None], persistent=False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two waveforms `[B, A, T]` to a scalar, channel by channel; T must exceed half the longest window."""
        predicted, wanted = (each_channel(audio, self.mid_side) for audio in (prediction, target))  # [B A, T]
        distances = [self._distance(predicted, wanted, size) for size in self.fft_sizes]
        return torch.stack(distances).mean()

    def _distance(self, prediction: Tensor, target: Tensor, size: int) -> Tensor:
        predicted, wanted = self._magnitude(prediction, size), self._magnitude(target, size)  # [B, bins, frames]
        # Norms over the batch, not per item: a silent item would divide by next to nothing.
        convergence = torch.linalg.vector_norm(wanted - predicted) / torch.linalg.vector_norm(wanted)
        return convergence + (predicted.log() - wanted.log()).abs().mean()  # finite, thanks to the floor

    def _magnitude(self, audio: Tensor, size: int) -> Tensor:
        window, weighting = self.get_buffer(f"window_{size}"), self.get_buffer(f"weighting_{size}")
        return (magnitude(audio, window) * weighting).clamp(min=self.floor)  # [B, bins, frames]


class LogMelLoss(nn.Module):
    """L1 between natural-log mel spectrograms.

    Args:
        sample_rate_hz: of the audio.
        fft_size: window length in samples; the hop is a quarter of it.
        mel_bands: number of triangular bands from 0 Hz to half the rate.
        floor: smallest mel magnitude told apart from silence.
        mel_scale: "htk", or "slaney" for that scale and its area normalisation, as in vocoders.
        mid_side: as `each_channel` takes it.
    """

    window: Tensor
    bands: Tensor

    def __init__(
        self,
        sample_rate_hz: int,
        fft_size: int = 1024,
        mel_bands: int = 80,
        floor: float = 1e-3,
        mel_scale: str = "htk",
        mid_side: bool = False,
    ) -> None:
        super().__init__()
        self.mid_side = mid_side
        self.floor = floor
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        norm = "slaney" if mel_scale == "slaney" else None  # an area of one under each triangle, not a height
        # [bins, mel_bands].
        bands = melscale_fbanks(fft_size // 2 + 1, 0.0, sample_rate_hz / 2, mel_bands, sample_rate_hz, norm, mel_scale)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two waveforms `[B, A, T]` to a scalar, channel by channel."""
        return (self._log_mel(prediction) - self._log_mel(target)).abs().mean()

    def _log_mel(self, audio: Tensor) -> Tensor:
        with torch.autocast(audio.device.type, enabled=False):  # half precision would round small magnitudes to 0
            magnitudes = magnitude(each_channel(audio, self.mid_side), self.window)
            # [B, frames, bins] @ [bins, mel_bands].
            return (magnitudes.transpose(1, 2) @ self.bands).clamp(min=self.floor).log()


class BandedLogLoss(nn.Module):
    """L1 between the log mel energies of log magnitudes: what each band holds counts, not where in it.

    Args:
        sample_rate_hz: of the audio.
        window_samples: of the transform that the spectra come from.
        mel_bands: number of triangular bands.
    """

    bands: Tensor

    def __init__(self, sample_rate_hz: int, window_samples: int, mel_bands: int = 80) -> None:
        super().__init__()
        bands = melscale_fbanks(window_samples // 2 + 1, 0.0, sample_rate_hz / 2, mel_bands, sample_rate_hz)
        self.register_buffer("bands", bands, persistent=False)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two log magnitudes `[B, N, bins]` to a scalar."""
        return (self._log_bands(prediction) - self._log_bands(target)).abs().mean()

    def _log_bands(self, spectra: Tensor) -> Tensor:
        with torch.autocast(spectra.device.type, enabled=False):
            return (spectra.exp() @ self.bands).clamp(min=_SMALLEST_BAND).log()  # [B, N, bins] @ [bins, mel_bands]
