"""Write the clips of a manifest to WebDataset tars, on a disk or at any fsspec URL, for `data=shards`."""

from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.logs import get_logger


@command("script/make_shards")
def main(cfg: DictConfig) -> None:
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.data.manifest import ManifestOptions, read_manifest
    from foley.data.shards_writer import write_shards
    from foley.data.splits import hold_out

    root = Path(cfg.audio_dir or Path(cfg.manifest).parent)
    entries = read_manifest(cfg.manifest, root, ManifestOptions.of(cfg))
    index = write_shards(hold_out(entries, cfg.val_fraction, root, cfg.manifest), cfg.output, **cfg.writer)
    clips, seconds = (sum(getattr(shard, name) for shard in index.shards) for name in ("num_samples", "seconds"))
    message = "%d clips (%.2f hours) in %d shards, %d left out: %s"
    get_logger(__name__).info(message, clips, seconds / 3600, len(index.shards), index.left_out, cfg.output)


if __name__ == "__main__":
    main()
