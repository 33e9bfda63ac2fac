"""Turn a published checkpoint into a component directory that foley loads.

python scripts/convert_checkpoint.py source=NAME ckpt=FILE.pt config=FILE.yml out=DIRECTORY
"""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/convert_checkpoint")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.system.convert import convert_checkpoint, read_model_config

    module = convert_checkpoint(cfg.source, Path(cfg.ckpt), read_model_config(Path(cfg.config)), Path(cfg.out))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    get_logger(__name__).info(
        "%s: %s parameters, every key of %s found its place", cfg.out, f"{parameters:,}", cfg.ckpt
    )


if __name__ == "__main__":
    main()
