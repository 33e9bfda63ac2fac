"""A mel codec of a size for tests."""

from typing import Any

from foley.core.components import build_component

SPECTROGRAM = {"_target_": "foley.models.codec.mel_vae.MelSpectrogram", "sample_rate_hz": 16000}
MEL_VAE: dict[str, Any] = {
    "_target_": "foley.models.codec.mel_vae.MelVAE",
    "spectrogram": SPECTROGRAM,
    **{"channels": 16, "multipliers": [1, 2], "strides": [2, 1], "num_blocks": 1},
    **{"latent_channels": 20, "norm_groups": 4},
}
VOCODER: dict[str, Any] = {
    "_target_": "foley.models.codec.vocoder.BigVGAN",
    "spectrogram": SPECTROGRAM,
    **{"channels": 16, "strides": [8, 8, 4], "kernels": [3, 5], "dilations": [1, 3]},
}
CODEC: dict[str, Any] = {
    "_target_": "foley.models.codec.mel_codec.MelCodec",
    **{"latent_channels": 20, "sample_rate_hz": 16000, "mel_vae": MEL_VAE, "vocoder": VOCODER},
}


def mel_codec(**changes: Any) -> Any:
    """Untrained, with `changes` to the config."""
    return build_component({**CODEC, **changes}).eval()
