"""Encode every clip of a data set with a trained codec, once, so that diffusion training reads latents."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command, renamed


@command("script/encode_latents", check=renamed(codec_ckpt="codec_path"))
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.devices import resolve_device
    from foley.data.encoding import encode_latents
    from foley.system.checkpoint import load_trained

    device = resolve_device(cfg.device)
    data = instantiate(cfg.data, _convert_="all")
    encode_latents(
        load_trained(cfg.codec_path, "codec"),
        data.whole_clips(cfg.max_duration_seconds),
        Path(cfg.output_dir),
        cfg.batch_size,
        cfg.min_duration_seconds,
        device,
        cfg.windows,
    )


if __name__ == "__main__":
    main()
