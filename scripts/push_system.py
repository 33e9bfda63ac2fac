"""Share an exported system on the Hugging Face hub: its folder, and a card with its training, licence and hash."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/push_system")
def main(cfg: DictConfig) -> None:
    """Check the folder, write its card, and send both in one commit."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.system.sharing import push_system

    address = push_system(Path(cfg.system), cfg.repository, cfg.licence, cfg.private)
    get_logger(__name__).info("%s; use it with system=%s", address, cfg.repository)


if __name__ == "__main__":
    main()
