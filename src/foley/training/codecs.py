"""The Lightning modules that train codecs: waveform VAE, spectral VAE, mel VAE, vocoder, DAC.

Each says what the signal is and how its model renders it; `foley.training.adversarial` does the rest.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from foley.data.dataset import AudioBatch
from foley.models.codec.base import AudioVAE
from foley.models.codec.dac import DACCodec
from foley.models.codec.mel_vae import MelVAE
from foley.models.codec.spectral_vae import SpectralVAE
from foley.models.codec.vocoder import BigVGAN
from foley.training.adversarial import AdversarialTraining, Pair, VariationalTraining


class CodecTraining(VariationalTraining):
    """A VAE on audio, with terms of (reconstruction, original), both `[B, A, T]`, and the term "kl".

    Args:
        codec: the model.
        freezes_encoder: train the decoder alone, on latents that stay what they are.
        objective, options: see `AdversarialTraining`.
    """

    def __init__(self, codec: AudioVAE, *objective: Any, freezes_encoder: bool = False, **options: Any) -> None:
        super().__init__(*objective, **options)
        self.codec = codec
        if freezes_encoder:
            codec.freeze_encoder()

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
            return self.codec.decode(latent)[..., : audio.shape[-1]]  # without the padding of the last frame

        # [B, A, T], its posterior [B, C, L], and back.
        return self.reconstruct(audio, self.codec.posterior(audio), decode, noise)


class SpectralVAETraining(CodecTraining):
    """As `CodecTraining`, but its terms and its discriminator take log magnitudes `[B, N, bins]` instead of audio."""

    codec: SpectralVAE

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction of the spectra from a draw of the posterior, or from its mean."""
        spectra = self.codec.spectra(batch["audio"])  # [B, L * pool, bins]
        # Phases take no part in training: the losses hear magnitudes alone.
        return self.reconstruct(spectra, self.codec.spectral_posterior(spectra), self.codec.decode_spectra, noise)

    def heard(self, batch: AudioBatch, pair: Pair) -> tuple[Tensor, Tensor]:
        """The clips themselves, and what the spectra sound like."""
        audio = batch["audio"]
        return audio, self.codec.phase(pair.generated)[..., : audio.shape[-1]]  # [B, 1, T]


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
        return None  # a mel spectrogram is not heard

    @property
    def last_weight(self) -> Tensor:
        return self.mel_vae.decoder[-1].weight  # type: ignore[return-value]

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction of the audio's mel spectrogram from a draw of the posterior, or from its mean."""
        audio = batch["audio"]
        # Whole latent frames, so that nothing of the reconstruction need be cut off: [B, mel_bands, F].
        mel = self.mel_vae.spectrogram(pad(audio, (0, -audio.shape[-1] % self.mel_vae.hop_samples)))
        return self.reconstruct(mel, self.mel_vae.posterior(mel), self.mel_vae.decode, noise)


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
        # In single precision, as the losses want it; [B, 1, T] without the padding of the last hop.
        return Pair(audio, self.vocoder(self.vocoder.spectrogram(audio))[..., : audio.shape[-1]].float())


class DACTraining(AdversarialTraining):
    """The Descript Audio Codec, with terms of (reconstruction, original), both `[B, 1, T]`, and its quantiser's two.

    These are "commitment", which draws the encoder to its codebooks, and "codebook", which draws those to it.

    Args:
        codec: the model.
        objective, options: see `AdversarialTraining`.
    """

    own_terms = frozenset({"commitment", "codebook"})

    def __init__(self, codec: DACCodec, *objective: Any, **options: Any) -> None:
        super().__init__(*objective, **options)
        self.codec = codec

    @property
    def model(self) -> DACCodec:
        return self.codec

    @property
    def sample_rate_hz(self) -> int:
        return self.codec.sample_rate_hz

    def render(self, batch: AudioBatch, noise: torch.Generator | None) -> Pair:
        """The reconstruction through the codebooks, as the published codec always decodes."""
        with torch.random.fork_rng(devices=[]):  # the package draws its dropout of codebooks from the global generator
            if noise is not None:
                torch.default_generator.manual_seed(noise.initial_seed())
            generated, terms = self.codec.train_through(batch["audio"])
        return Pair(batch["audio"], generated.float(), terms)
