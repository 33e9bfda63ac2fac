"""Trains a mel VAE: from mel spectrogram to mel spectrogram through the latent."""

from typing import Any

import torch
from torch.nn.functional import pad

from foley.data.types import AudioBatch
from foley.models.mel_codec.mel_vae import MelVAE
from foley.training.adversarial import Pair
from foley.training.variational import VariationalTraining


class MelVAETraining(VariationalTraining):
    """A VAE on mel spectrograms, with terms of (reconstruction, original), both `[B, mel_bands, F]`, and the term "kl".

    Args:
        mel_vae: the model.
        objective, options: see `AdversarialTraining`; the discriminator takes mel spectrograms.
    """

    def __init__(self, mel_vae: MelVAE, *objective: Any, **options: Any) -> None:
        super().__init__(*objective, **options)
        self.mel_vae = mel_vae

    @property
    def model(self) -> MelVAE:
        return self.mel_vae

    @property
    def sample_rate_hz(self) -> None:
        return None

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction of the audio's mel spectrogram from a draw of the posterior, or from its mean."""
        audio = batch["audio"]
        mel = self.mel_vae.spectrogram(pad(audio, (0, -audio.shape[-1] % self.mel_vae.hop_samples)))
        return self.reconstruct(mel, self.mel_vae.posterior(mel), self.mel_vae.decode, noise)
