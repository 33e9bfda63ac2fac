"""Fetch a system from the Hugging Face hub, as it is there now, and check every file of it by its hash."""

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/pull_system")
def main(cfg: DictConfig) -> None:
    """Fetch it into the hub's cache, and copy it where a folder is named."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.system.sharing import pull_system

    folder = pull_system(cfg.repository, cfg.revision, cfg.output_dir, cfg.sha256, cfg.hub_dir)
    get_logger(__name__).info("%s; use it with system=%s", folder, cfg.output_dir or cfg.repository)


if __name__ == "__main__":
    main()
