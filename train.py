"""Train a codec or a denoiser: `python train.py experiment=<name> [key=value ...]`; see `python train.py --help`."""

import sys

from omegaconf import DictConfig

from foley.cli.command import command
from foley.training.requirements import refuse_missing
from foley.training.values import require_values


@command("train", synonyms={"teacher": "system"})
def main(cfg: DictConfig) -> float | None:
    """Compose the config, train, and hand a sweep its metric."""
    require_values(cfg)
    refuse_missing(cfg)
    # Here, so that whatever is wrong or missing is named before PyTorch is loaded, in a second.
    from foley.cli.sampling import write_listening_page
    from foley.training.run import objective

    result = objective(cfg)
    if cfg.listen:
        write_listening_page(cfg)
    return result


if __name__ == "__main__":
    if all(word.startswith("hydra.") for word in sys.argv[1:]):  # nothing is asked for
        sys.argv.append("experiment=first")
    main()
