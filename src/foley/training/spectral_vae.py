"""Trains a spectral VAE: from magnitudes to magnitudes through the latent."""

from typing import Any

import torch
from torch import Tensor

from foley.data.types import AudioBatch
from foley.models.vae.spectral_vae import SpectralVAE
from foley.training.adversarial import AdversarialTraining, Pair


class SpectralVAETraining(AdversarialTraining):
    """A VAE on spectra, with terms of (reconstruction, original), both log magnitudes `[B, N, bins]`, and "kl".

    Args:
        codec: the model.
        objective, options: see `AdversarialTraining`; the discriminator takes log magnitudes.
    """

    own_terms = frozenset({"kl"})

    def __init__(self, codec: SpectralVAE, *objective: Any, **options: Any) -> None:
        super().__init__(*objective, **options)
        self.codec = codec

    @property
    def model(self) -> SpectralVAE:
        return self.codec

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction of the spectra from a draw of the posterior, or from its mean."""
        spectra = self.codec.spectra(batch["audio"])
        posterior = self.codec.spectral_posterior(spectra)
        generated = self.codec.decode_spectra(posterior.mean if noise is None else posterior.sample(noise))
        return Pair(spectra, generated, {"kl": posterior.kl()}, {"latent_std": posterior.mean.std()})

    def heard(self, batch: AudioBatch, pair: Pair) -> tuple[Tensor, Tensor]:
        """The clips themselves, and what the spectra sound like."""
        audio = batch["audio"]
        return audio, self.codec.phase(pair.generated)[..., : audio.shape[-1]]
