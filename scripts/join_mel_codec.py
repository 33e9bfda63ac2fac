"""Join a trained mel VAE and a vocoder into one codec directory, which `codec_path=` takes."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/join_mel_codec")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.components import save_component
    from foley.models.codec.mel_codec import MelCodec
    from foley.system.checkpoint import load_trained, trained_config

    paths = {name: Path(cfg[name]) for name in ("mel_vae", "vocoder")}
    parts = {name: load_trained(path, name) for name, path in paths.items()}
    numbers = {
        "latent_channels": parts["mel_vae"].latent_channels,
        "sample_rate_hz": parts["mel_vae"].spectrogram.sample_rate_hz,
    }
    configs = {name: trained_config(path, name) for name, path in paths.items()}
    config = {"_target_": "foley.models.codec.mel_codec.MelCodec", **numbers, **configs}
    save_component(MelCodec(**parts, **numbers), config, Path(cfg.output_dir))
    get_logger(__name__).info("wrote %s", cfg.output_dir)


if __name__ == "__main__":
    main()
