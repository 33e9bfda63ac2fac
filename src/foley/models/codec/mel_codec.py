"""Mel VAE and vocoder as one codec, so that all that works on a waveform VAE works on mel latents too."""

from torch import Tensor

from foley.models.codec.base import AudioVAE
from foley.models.codec.mel_vae import MelVAE
from foley.models.codec.vocoder import BigVGAN


class MelCodec(AudioVAE):
    """Audio to the latent of its mel spectrogram, and back through a vocoder (AudioLCM section 4.1).

    Args:
        mel_vae: between mel spectrograms and latents.
        vocoder: from mel spectrograms to audio.
        latent_channels, sample_rate_hz: of the two, for those who read them from the config.

    Raises:
        ValueError: where the parts were made for different spectrograms, or the numbers are not the parts'.

    Example:
        >>> import torch
        >>> from foley.models.codec.mel_vae import MelSpectrogram
        >>> mel = MelSpectrogram(sample_rate_hz=16000, mel_bands=16, window_samples=256, hop_samples=64)
        >>> mel_vae = MelVAE(mel, channels=8, multipliers=(1,), strides=(2,), latent_channels=4, norm_groups=4)
        >>> vocoder = BigVGAN(mel, channels=16, strides=(8, 8), kernels=(3,), dilations=(1,))
        >>> codec = MelCodec(mel_vae, vocoder, latent_channels=4, sample_rate_hz=16000)
        >>> latent = codec.encode(torch.randn(1, 1, 1280))
        >>> latent.shape, codec.decode(latent).shape  # a hop of 2 * 64 samples
        (torch.Size([1, 4, 10]), torch.Size([1, 1, 1280]))
    """

    def __init__(self, mel_vae: MelVAE, vocoder: BigVGAN, latent_channels: int, sample_rate_hz: int) -> None:
        super().__init__()
        spectrogram = mel_vae.spectrogram
        if spectrogram.settings != vocoder.spectrogram.settings:
            raise ValueError(
                f"the mel VAE was made for spectrograms {spectrogram.settings} and the vocoder for "
                f"{vocoder.spectrogram.settings} (rate, bands, window, hop, lowest and highest Hz, decimal log); "
                "train one of them anew"
            )
        if (latent_channels, sample_rate_hz) != (mel_vae.latent_channels, spectrogram.sample_rate_hz):
            raise ValueError(
                f"latent_channels {latent_channels} and sample_rate_hz {sample_rate_hz} are not the mel VAE's, "
                f"{mel_vae.latent_channels} and {spectrogram.sample_rate_hz}"
            )
        self.latent_channels = latent_channels
        self.sample_rate_hz = sample_rate_hz
        self.mel_vae = mel_vae
        self.vocoder = vocoder

    @property
    def hop_samples(self) -> int:
        """Audio samples for each latent frame."""
        return self.mel_vae.hop_samples

    def encode_moments(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """See `AudioVAE.encode_moments`."""
        # [B, 1, T] to [B, mel_bands, L * frames_per_latent] to two [B, C, L]
        return self.mel_vae.encode_moments(self.mel_vae.spectrogram(self._whole_frames(audio)))

    def decode(self, latent: Tensor) -> Tensor:
        """See `AudioVAE.decode`; within [-1, 1]."""
        return self.vocoder(self.mel_vae.decode(latent))  # [B, C, L] to [B, mel_bands, F] to [B, 1, T]
