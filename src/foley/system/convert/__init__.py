"""Published checkpoints as foley components."""

from foley.system.convert.bigvgan import bigvgan
from foley.system.convert.conversion import SOURCES, convert_checkpoint, load_converted
from foley.system.convert.ezaudio import ezaudio_controlnet, ezaudio_denoiser
from foley.system.convert.files import read_model_config
from foley.system.convert.waveform_vae import waveform_vae

__all__ = [
    "SOURCES",
    "bigvgan",
    "convert_checkpoint",
    "ezaudio_controlnet",
    "ezaudio_denoiser",
    "load_converted",
    "read_model_config",
    "waveform_vae",
]
