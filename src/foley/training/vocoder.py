"""Trains a vocoder: from the mel spectrogram of audio to that audio."""

from typing import Any

import torch

from foley.data.types import AudioBatch
from foley.models.vocoder.bigvgan import BigVGAN
from foley.training.adversarial import AdversarialTraining, Pair


class VocoderTraining(AdversarialTraining):
    """A vocoder, with terms of (generated, original), both `[B, 1, T]`.

    Args:
        vocoder: the model.
        objective, options: see `AdversarialTraining`.
    """

    def __init__(self, vocoder: BigVGAN, *objective: Any, **options: Any) -> None:
        super().__init__(*objective, **options)
        self.vocoder = vocoder

    @property
    def model(self) -> BigVGAN:
        return self.vocoder

    @property
    def sample_rate_hz(self) -> int:
        return self.vocoder.spectrogram.sample_rate_hz

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The audio made anew from its mel spectrogram; there is no noise in it."""
        audio = batch["audio"]
        return Pair(audio, self.vocoder(self.vocoder.spectrogram(audio))[..., : audio.shape[-1]].float())
