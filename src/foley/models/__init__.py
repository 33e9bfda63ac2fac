"""Networks: codecs between audio and latents, denoisers over latents, and the text encoders that condition them.

A codec's latent is `[B, C, L]`; a denoiser maps a noisy one, times `[B]` and text `[B, S, Dc]` to a prediction like it.
"""

from foley.models.codec.base import AudioVAE, GaussianPosterior
from foley.models.codec.fast_decoder import FastDecoder
from foley.models.codec.mel_codec import MelCodec
from foley.models.codec.mel_vae import MelSpectrogram, MelVAE
from foley.models.codec.normaliser import LatentNormaliser
from foley.models.codec.spectral_vae import SpectralVAE
from foley.models.codec.vocoder import BigVGAN
from foley.models.codec.waveform_vae import WaveformVAE
from foley.models.dit.controlnet import ControlledTransformer
from foley.models.dit.llama import LlamaTransformer
from foley.models.dit.masking import SpanMask
from foley.models.dit.model import DiffusionTransformer
from foley.models.lora import AdaptedDenoiser
from foley.models.text import FeatureConditioner, FrozenT5Conditioner, SmallTextEncoder, TextConditioner, TextEmbedding

__all__ = [
    "AdaptedDenoiser",
    "AudioVAE",
    "BigVGAN",
    "ControlledTransformer",
    "DiffusionTransformer",
    "FastDecoder",
    "FeatureConditioner",
    "FrozenT5Conditioner",
    "GaussianPosterior",
    "LatentNormaliser",
    "LlamaTransformer",
    "MelCodec",
    "MelSpectrogram",
    "MelVAE",
    "SmallTextEncoder",
    "SpanMask",
    "SpectralVAE",
    "TextConditioner",
    "TextEmbedding",
    "WaveformVAE",
]
