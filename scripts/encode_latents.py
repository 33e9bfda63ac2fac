"""Encode every clip of a data set with a trained codec, once, so that diffusion training reads latents."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

import foley.core.config  # noqa: F401  (registers the resolvers)
from foley.data.encoding import encode_latents
from foley.generation.text_to_audio import resolve_device
from foley.system.checkpoint import load_trained


@hydra.main(version_base="1.3", config_path="../configs", config_name="script/encode_latents")
def main(cfg: DictConfig) -> None:
    data = hydra.utils.instantiate(cfg.data, _convert_="all")
    encode_latents(
        load_trained(Path(cfg.codec_ckpt), "codec"),
        data.whole_clips(cfg.max_duration_seconds),
        Path(cfg.output_dir),
        cfg.batch_size,
        cfg.min_duration_seconds,
        resolve_device(cfg.device),
    )


if __name__ == "__main__":
    main()
