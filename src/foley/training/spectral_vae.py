"""Trains a spectral VAE: from magnitudes to magnitudes through the latent."""

import torch
from torch import Tensor

from foley.data.types import AudioBatch
from foley.models.vae.spectral_vae import SpectralVAE
from foley.training.adversarial import Pair
from foley.training.codec import CodecTraining


class SpectralVAETraining(CodecTraining):
    """As `CodecTraining`, but its terms and its discriminator take log magnitudes `[B, N, bins]` instead of audio."""

    codec: SpectralVAE

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction of the spectra from a draw of the posterior, or from its mean."""
        spectra = self.codec.spectra(batch["audio"])
        return self.reconstruct(spectra, self.codec.spectral_posterior(spectra), self.codec.decode_spectra, noise)

    def heard(self, batch: AudioBatch, pair: Pair) -> tuple[Tensor, Tensor]:
        """The clips themselves, and what the spectra sound like."""
        audio = batch["audio"]
        return audio, self.codec.phase(pair.generated)[..., : audio.shape[-1]]
