"""Train a codec or a denoiser: `python train.py experiment=<name> [key=value ...]`; see `python train.py --help`."""

from omegaconf import DictConfig

from foley.cli.command import command


@command("train")
def main(cfg: DictConfig) -> float | None:
    """Compose the config, train, and hand a sweep its metric."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.training.run import optimized_metric, train

    return optimized_metric(cfg, train(cfg))


if __name__ == "__main__":
    main()
