"""Train a codec or a denoiser: `python train.py experiment=<name> [key=value ...]`; see `python train.py --help`."""

from omegaconf import DictConfig

from foley.cli.command import command
from foley.training.requirements import refuse_missing


@command("train")
def main(cfg: DictConfig) -> float | None:
    """Compose the config, train, and hand a sweep its metric."""
    refuse_missing(cfg)
    # Here, so that whatever is missing is named before PyTorch is loaded, in a second.
    from foley.training.run import objective

    return objective(cfg)


if __name__ == "__main__":
    main()
