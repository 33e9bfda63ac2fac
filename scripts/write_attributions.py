"""List the authors and licences of the recordings that a model was trained on: what its card must carry."""

from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command


@command("script/write_attributions")
def main(cfg: DictConfig) -> None:
    """Write a table of source, licence and number of clips."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.files import write_text
    from foley.data.manifest import of_split, read_manifest

    entries = of_split(read_manifest(cfg.manifest), cfg.split, cfg.manifest)
    counts = Counter((entry.source, entry.license) for entry in entries)
    rows = [f"| {source} | {license} | {n} |" for (source, license), n in sorted(counts.items())]
    header = f"# Recordings in training\n\n{len(entries)} clips.\n\n| source | licence | clips |\n|---|---|---:|"
    write_text(Path(cfg.output), "\n".join([header, *rows]) + "\n")


if __name__ == "__main__":
    main()
