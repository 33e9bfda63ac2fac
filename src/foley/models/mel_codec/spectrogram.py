"""The log-mel spectrogram that HiFi-GAN and BigVGAN vocoders hear."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torchaudio.functional import melscale_fbanks

_SMALLEST_POWER = 1e-9  # keeps the gradient of the magnitude finite
_FLOOR = 1e-5


class MelSpectrogram(nn.Module):
    """Log of mel-weighted magnitudes: Hann window, Slaney's mel scale and area normalisation, reflected ends.

    One frame for each hop, the first centred half a hop into the audio (Kong et al. 2020, HiFi-GAN). The constants are
    no part of the state dict.

    Args:
        sample_rate_hz: of the audio.
        mel_bands: number of triangular bands.
        window_samples: length of the window and of the transform.
        hop_samples: samples for each frame.
        lowest_hz, highest_hz: edges of the first and the last band; None is half the rate.
        decimal_log: take the logarithm to base 10, as AudioLCM does, instead of the natural one.
    """

    window: Tensor
    bands: Tensor

    def __init__(
        self,
        sample_rate_hz: int = 16000,
        mel_bands: int = 80,
        window_samples: int = 1024,
        hop_samples: int = 256,
        lowest_hz: float = 0.0,
        highest_hz: float | None = None,
        decimal_log: bool = False,
    ) -> None:
        super().__init__()
        highest_hz = sample_rate_hz / 2 if highest_hz is None else highest_hz
        self.sample_rate_hz = sample_rate_hz
        self.mel_bands = mel_bands
        self.hop_samples = hop_samples
        self.decimal_log = decimal_log
        self.settings = (
            *(sample_rate_hz, mel_bands, window_samples, hop_samples),
            *(float(lowest_hz), float(highest_hz), decimal_log),
        )
        with torch.device("cpu"):  # with values even where weights are built without
            bands = melscale_fbanks(
                window_samples // 2 + 1, lowest_hz, highest_hz, mel_bands, sample_rate_hz, "slaney", "slaney"
            )
            self.register_buffer("window", torch.hann_window(window_samples), persistent=False)
            self.register_buffer("bands", bands, persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """`[B, 1, T]` to `[B, mel_bands, ceil(T / hop)]`, in single precision at least; the end is zero-padded.

        Raises:
            ValueError: where the audio is too short to be reflected at its ends.
        """
        window_samples, margin = len(self.window), (len(self.window) - self.hop_samples) // 2
        signal = pad(audio[:, 0], (0, -audio.shape[-1] % self.hop_samples))
        if signal.shape[-1] <= margin:
            raise ValueError(f"a mel spectrogram needs more than {margin} samples, got {audio.shape[-1]}")
        # Rounding to half precision would be audible after the logarithm.
        with torch.autocast(audio.device.type, enabled=False):
            reflected = pad(signal.to(self.window.dtype)[:, None], (margin, margin), mode="reflect")[:, 0]
            spectrum = torch.stft(
                reflected, window_samples, self.hop_samples, window=self.window, center=False, return_complex=True
            )
            magnitude = (torch.view_as_real(spectrum).square().sum(-1) + _SMALLEST_POWER).sqrt()
            mel = (self.bands.T @ magnitude).clamp(min=_FLOOR)
            return mel.log10() if self.decimal_log else mel.log()
