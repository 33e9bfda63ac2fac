"""The dashboard of a run, from its folder; or, with project=, the same layout as a workspace on W&B.

python scripts/wandb_report.py run=outputs/train/EXPERIMENT/DATE
python scripts/wandb_report.py project=foley entity=NAME
"""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger

log = get_logger(__name__)


@command("script/wandb_report")
def main(cfg: DictConfig) -> None:
    """Write `dashboard.md` and its figures, or save the workspace; ValueError unless told which."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.reporting.dashboard import build_workspace, write_dashboard

    if (cfg.run is None) == (cfg.project is None):
        raise ValueError("give either run=FOLDER of a training run, or project=NAME (and entity=NAME) on W&B")
    if cfg.run is not None:
        log.info("wrote %s", write_dashboard(Path(cfg.run), Path(cfg.output_dir)))
        return
    log.info("saved %s", build_workspace(cfg.entity or "", cfg.project).save().url)


if __name__ == "__main__":
    main()
