"""Turn a published data set's annotation files and a local folder of its audio into a manifest and a ledger.

python scripts/prepare.py dataset=audiocaps audio_dir=FOLDER out=FOLDER [annotations_dir=FOLDER]
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger

if TYPE_CHECKING:
    from foley.core.sharding import Shard


def check(cfg: DictConfig, shard: "Shard") -> None:
    """A shard of the rows; all of them at once are written with the rest, by `write`."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.remote import local_folder
    from foley.data.preparation import prepare_shard

    if shard.count > 1:
        with local_folder(cfg.out) as out:
            prepare_shard(instantiate(cfg.dataset, _convert_="all"), Path(cfg.audio_dir), out, shard, cfg.decode)


def write(cfg: DictConfig) -> None:
    """The manifest, the ledger and the summary."""
    from foley.core.remote import local_folder
    from foley.data.preparation import merge_shards, prepare_manifest

    with local_folder(cfg.out) as out:
        if cfg.shards > 1:
            summary = merge_shards(cfg.audio_dir, out, cfg.shards, cfg.duration_seconds)
        else:
            files = instantiate(cfg.dataset, _convert_="all")
            summary = prepare_manifest(files, Path(cfg.audio_dir), out, cfg.decode, cfg.duration_seconds)
    tell(summary, f"{cfg.out}/manifest.jsonl")


def tell(summary: dict[str, Any], manifest: str) -> None:
    """Show the counts."""
    log = get_logger(__name__)
    log.info("%s: kept %d of %d rows", manifest, summary["kept"], summary["rows"])
    for kind, count in summary["left_out"].items():
        log.info("left out, %s: %d", kind, count)
    for license, count in summary["licenses"].items():
        log.info("%d rows: %s", count, license)


@command("script/prepare")
def main(cfg: DictConfig) -> None:
    """Read, match, check, write."""
    from foley.cli.launching import run_shards

    run_shards(cfg, check, write, "out")


if __name__ == "__main__":
    main()
