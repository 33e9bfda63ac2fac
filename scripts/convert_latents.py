"""Turn a latent cache of an earlier version into one of today's format."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command


@command("script/convert_latents")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.data.latent_conversion import convert_latents

    convert_latents(Path(cfg.cache_dir), Path(cfg.output_dir))


if __name__ == "__main__":
    main()
