"""Published checkpoints as foley components."""

from foley.convert.bigvgan import bigvgan
from foley.convert.conversion import SOURCES, convert_checkpoint, load_converted
from foley.convert.ezaudio import ezaudio_denoiser
from foley.convert.files import read_model_config
from foley.convert.waveform_vae import waveform_vae

__all__ = [
    "SOURCES",
    "bigvgan",
    "convert_checkpoint",
    "ezaudio_denoiser",
    "load_converted",
    "read_model_config",
    "waveform_vae",
]
