"""Trains a codec: from audio to audio through the latent."""

from typing import Any

import torch
from torch import Tensor

from foley.data.types import AudioBatch
from foley.models.vae.base import AudioVAE
from foley.training.adversarial import Pair
from foley.training.variational import VariationalTraining


class CodecTraining(VariationalTraining):
    """A VAE on audio, with terms of (reconstruction, original), both `[B, 1, T]`, and the term "kl".

    Args:
        codec: the model.
        objective, options: see `AdversarialTraining`.
    """

    def __init__(self, codec: AudioVAE, *objective: Any, **options: Any) -> None:
        super().__init__(*objective, **options)
        self.codec = codec

    @property
    def model(self) -> AudioVAE:
        return self.codec

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction of the audio from a draw of the posterior, or from its mean."""
        audio = batch["audio"]

        def decode(latent: Tensor) -> Tensor:
            return self.codec.decode(latent)[..., : audio.shape[-1]]

        return self.reconstruct(audio, self.codec.posterior(audio), decode, noise)
