"""Published checkpoints as foley components."""

from foley.convert.ezaudio import ezaudio_denoiser
from foley.convert.waveform_vae import waveform_vae

__all__ = ["ezaudio_denoiser", "waveform_vae"]
