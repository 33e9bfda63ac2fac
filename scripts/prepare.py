"""Turn a published data set's annotation files and a local folder of its audio into a manifest and a ledger.

python scripts/prepare.py dataset=audiocaps audio_dir=FOLDER out=FOLDER [annotations_dir=FOLDER]
"""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/prepare")
def main(cfg: DictConfig) -> None:
    """Read, match, check, write."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.data.preparation import prepare_manifest

    files = instantiate(cfg.dataset, _convert_="all")
    summary = prepare_manifest(files, Path(cfg.audio_dir), Path(cfg.out), cfg.decode, cfg.duration_seconds)
    log = get_logger(__name__)
    log.info("%s: kept %d of %d rows", Path(cfg.out) / "manifest.jsonl", summary["kept"], summary["rows"])
    for kind, count in summary["left_out"].items():
        log.info("left out, %s: %d", kind, count)
    for license, count in summary["licenses"].items():
        log.info("%d rows: %s", count, license)


if __name__ == "__main__":
    main()
