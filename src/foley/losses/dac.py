"""The spectral losses of the Descript Audio Codec (Kumar et al. 2023) by its own package, on waveforms `[B, A, T]`.

Its adversarial loss needs none: it is the sum over discriminators of what `LeastSquaresLoss` takes the mean of. Its
feature matching sums over all maps, where ours takes the mean of each discriminator's, then over discriminators.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_FLOOR = 1e-5  # of magnitudes


class _OfSignals(nn.Module):
    """One of the package's losses, which take its own signals, in single precision.

    Args:
        published: the loss.
        sample_rate_hz: of the audio.
    """

    def __init__(self, published: nn.Module, sample_rate_hz: int) -> None:
        super().__init__()
        self.published, self.sample_rate_hz = published, sample_rate_hz

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two waveforms `[B, A, T]` to a scalar."""
        from audiotools import AudioSignal

        with torch.autocast(prediction.device.type, enabled=False):
            signals = [AudioSignal(audio.float(), self.sample_rate_hz) for audio in (prediction, target)]
            distance: Tensor = self.published(*signals)
        return distance


class DACMelLoss(_OfSignals):
    """Sum over scales of the L1 between decimal-log mel spectrograms, as published.

    Args:
        sample_rate_hz: of the audio.
        mel_bands, window_lengths: of each scale; the hop is a quarter of the window, in samples.
    """

    def __init__(
        self,
        sample_rate_hz: int,
        mel_bands: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
        window_lengths: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    ) -> None:
        from dac.nn.loss import MelSpectrogramLoss  # slow to import, and of no use to other recipes

        scales = {"n_mels": list(mel_bands), "window_lengths": list(window_lengths)}
        edges = {"mel_fmin": [0.0] * len(mel_bands), "mel_fmax": [None] * len(mel_bands)}
        published = MelSpectrogramLoss(**scales, **edges, clamp_eps=_FLOOR, mag_weight=0.0, pow=1.0)
        super().__init__(published, sample_rate_hz)


class DACSTFTLoss(_OfSignals):
    """Sum over scales of the L1 between magnitudes and between the decimal logs of their squares, as published.

    Args:
        sample_rate_hz: of the audio.
        window_lengths: of each scale; the hop is a quarter, in samples.
    """

    def __init__(self, sample_rate_hz: int, window_lengths: Sequence[int] = (2048, 512)) -> None:
        from dac.nn.loss import MultiScaleSTFTLoss

        super().__init__(MultiScaleSTFTLoss(list(window_lengths), clamp_eps=_FLOOR), sample_rate_hz)
