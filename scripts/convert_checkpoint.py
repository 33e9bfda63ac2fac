"""Turn a published checkpoint into a component directory that foley loads.

python scripts/convert_checkpoint.py source=NAME ckpt=FILE.pt config=FILE.yml out=DIRECTORY
python scripts/convert_checkpoint.py source=dac ckpt=FILE.pth codec=dac_44khz_projected out=DIRECTORY
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/convert_checkpoint")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.system.convert import convert_checkpoint, read_model_config

    own: Any = OmegaConf.to_container(cfg.codec, resolve=True) if cfg.codec else {}
    config = own if cfg.config is None else read_model_config(Path(cfg.config))
    module = convert_checkpoint(cfg.source, Path(cfg.ckpt), config, Path(cfg.out))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    get_logger(__name__).info(
        "%s: %s parameters, every key of %s found its place", cfg.out, f"{parameters:,}", cfg.ckpt
    )


if __name__ == "__main__":
    main()
