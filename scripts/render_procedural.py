"""Render procedural clips to WAV files with a manifest: a reference for scores, and prompts that match it."""

import json
from pathlib import Path

from omegaconf import DictConfig

from foley.cli.command import command
from foley.core.locks import only_writer
from foley.core.logs import get_logger


@command("script/render_procedural")
def main(cfg: DictConfig) -> None:
    """Write `per_class` clips of every class, or of those asked for, and `manifest.jsonl`."""
    # Here, so that help and mistakes in the command line are answered before PyTorch is loaded.
    from foley.core.files import write_text
    from foley.data.audio import write_wav
    from foley.data.procedural import CLASS_NAMES, ProceduralDataset

    directory, classes = Path(cfg.output_dir), cfg.classes or CLASS_NAMES
    of_all = cfg.seed, cfg.duration_seconds, cfg.sample_rate_hz
    clips = ProceduralDataset(cfg.per_class * len(classes), *of_all, classes=classes)
    with only_writer(directory, "clips"):
        rows = []
        for item in map(clips.render, range(len(clips))):
            row = {"id": item.id, "path": f"{item.id}.wav", "caption": item.caption, "label": item.label}
            write_wav(directory / row["path"], item.audio, clips.sample_rate_hz)
            rows.append(json.dumps({**row, "split": "test"}, ensure_ascii=False))
        write_text(directory / "manifest.jsonl", "\n".join(rows) + "\n")
    get_logger(__name__).info("%d clips: %s", len(rows), directory / "manifest.jsonl")


if __name__ == "__main__":
    main()
